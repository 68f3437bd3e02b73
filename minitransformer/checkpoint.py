"""Save and load: arrays as safetensors, training runs as folders, written atomically and checksummed.

It knows arrays, dicts that JSON can hold, and folders; no models and no Tensors. What is read back is
exactly what was written, or a `CheckpointError` that names the file. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from minitransformer.errors import CheckpointError, DTypeError
from minitransformer.files import (
    json_bytes,
    make_folders,
    parse_json,
    read_bytes,
    read_json,
    refusals_of_the_system,
    remove,
    sync_folder,
    write_and_sync,
    write_bytes,
)

# --- arrays ----------------------------------------------------------------------------------------------

# safetensors writes several metadata keys in another order in every process, so there is only one.
_METADATA_KEY = "minitransformer"
_DTYPES = ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")


def pack_arrays(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """Arrays of any shape and a dict that JSON can hold, as one safetensors file with a checksum.

    Equal input gives equal bytes, in every process; memory layout and byte order of the arrays do not
    matter. Raises `DTypeError` for dtypes other than bool, integers, float16, float32 and float64.
    """
    from safetensors.numpy import save

    contiguous = {}
    for name, array in sorted(arrays.items()):
        if name == "__metadata__":
            raise CheckpointError("pack_arrays", f"the name {name!r} is taken by the format", "Rename it")
        if array.dtype.str[1:] not in _DTYPES:
            raise DTypeError(
                "pack_arrays",
                f"array {name!r} has dtype {array.dtype}, expected bool, an integer or float16/32/64",
                "Convert it first",
            )
        # Not ascontiguousarray, which makes a vector of a scalar.
        contiguous[name] = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    text = json_bytes("the metadata", metadata).decode()
    sealed = {"metadata": text, "sha256": _digest_of_arrays(contiguous, text)}
    return save(contiguous, {_METADATA_KEY: json.dumps(sealed, sort_keys=True)})


def unpack_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays (owned, writable) and metadata of a file that holds what `pack_arrays` returned.

    Raises `CheckpointError` naming `path` for anything else: missing, damaged, cut off, of another
    program, or pickled (which is never loaded, since that would run code from the file).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_bytes(path, "the file of arrays")
    try:
        # The library's `load` drops the metadata. The header is JSON after its length in 8 bytes.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        sealed = json.loads(header["__metadata__"][_METADATA_KEY])
        text, expected = sealed["metadata"], sealed["sha256"]
        arrays = {name: array.copy() for name, array in load(data).items()}
        got = _digest_of_arrays(arrays, text)
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = "is damaged, cut off or was not written by minitransformer"
        # A zip archive, or a pickle of protocol 2 to 5 and not a header whose length begins like one.
        if data[:4] == b"PK\x03\x04" or (re.match(rb"\x80[\x02-\x05]", data) and data[8:9] != b"{"):
            problem = "this looks like a pickled PyTorch file; minitransformer never unpickles"
        raise CheckpointError(
            "unpack_arrays", f"{path}: {problem}", "Load a safetensors file that minitransformer saved"
        ) from error
    _compare(path, expected, got)
    return arrays, parse_json(text.encode(), path, "the metadata of the file of arrays")


def _digest_of_arrays(arrays: Mapping[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


# --- a training run on disk ------------------------------------------------------------------------------

_FORMAT = 1
_STEP_FOLDER = re.compile(r"step-(\d{8,})(-\d+)?")
# Left by a process that was killed while writing: what `write_bytes` and `save` write aside.
_LEFT_ASIDE = re.compile(r"\.(run|last|best)\.json\.\d+-\d+\.tmp|\.step-\d{8,}\.tmp")


class Checkpoint(NamedTuple):
    """One verified checkpoint: the step it was saved after, and the folder that holds its files."""

    step: int
    folder: Path


class RunFolder:
    """A training run on disk; one process at a time may write to it.

        run.json                       format version and description, written once
        checkpoints/step-00001000/     the files of one checkpoint, and manifest.json with their SHA-256
        last.json  best.json           pointers: step, folder, SHA-256 of the manifest

    A checkpoint becomes visible only when a pointer is replaced, after all of it is on the disk, and what
    a pointer names is removed only after the pointer has moved on. So a fault at any moment leaves the
    old or the new checkpoint, whole. run.json and the pointers carry a checksum of themselves.
    """

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        """For `create` and `open`, which check what is on the disk."""
        self.path, self.description = path, description

    @classmethod
    def create(cls, path: str | Path, description: Mapping[str, Any]) -> RunFolder:
        """Make a new run at `path`; `description` is any dict that JSON can hold, kept in run.json.

        Raises `CheckpointError`, and changes nothing, if there is a run already, a file, or a folder that
        holds anything.
        """
        path = Path(path)
        sealed = _seal(path / "run.json", {"format": _FORMAT, "description": description})
        if (path / "run.json").exists():
            command = f"minitransformer resume {shlex.quote(str(path))}"
            raise CheckpointError(
                "run",
                f"{path} already holds a run",
                f"Use `{command}`, or name another folder",
            )
        with refusals_of_the_system(path):
            if not path.exists():
                make_folders(path.parent)
                path.mkdir()  # fails if another process has just taken the name
                sync_folder(path.parent)
            elif not path.is_dir() or not all(_LEFT_ASIDE.fullmatch(entry.name) for entry in path.iterdir()):
                what = "a folder with other files in it" if path.is_dir() else "a file"
                raise CheckpointError("run", f"{path} is {what}, expected nothing", "Name another folder")
        write_bytes(path / "run.json", sealed)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run at `path`. Raises `CheckpointError` if there is none, or if a newer version wrote it."""
        path = Path(path)
        if not (path / "run.json").exists():
            raise CheckpointError(
                "run",
                f"{path} holds no training run, looked for {path / 'run.json'}",
                "Check the path, or start a run with `minitransformer train`",
            )
        what = "the description of a training run"
        content = read_json(path / "run.json", what)
        version = content.get("format")
        if isinstance(version, int) and version > _FORMAT:
            raise CheckpointError(
                "run",
                f"{path} has run format {version}, this version of minitransformer reads up to {_FORMAT}",
                "Update it with `pip install -U minitransformer`",
            )
        return cls(path, _read_sealed(path / "run.json", what)["description"])

    def save(self, step: int, files: Mapping[str, bytes], *, best: bool) -> None:
        """Save `files` (plain file names) as the checkpoint of `step`, named by `last`, and `best` if told.

        Then remove the checkpoints that neither pointer names. Raises `CheckpointError` when the system
        refuses; what `last` and `best` name is whole all the same.
        """
        if not isinstance(step, int) or step < 0:
            raise CheckpointError("run", f"a step is an integer of at least 0, got {step!r}", "Count steps")
        for name in files:
            if not name or Path(name).name != name or name.startswith(".") or name == "manifest.json":
                raise CheckpointError("run", f"{name!r} is no name for a file of a checkpoint", "Rename it")
        folder = self.path / "checkpoints"
        aside = folder / f".step-{step:08d}.tmp"
        manifest = json_bytes(
            "the manifest",
            {"step": step, "files": {n: {"size": len(b), "sha256": _sha256(b)} for n, b in files.items()}},
            indent=2,
        )
        with refusals_of_the_system(self.path):
            make_folders(folder)
            try:
                remove(aside)
                aside.mkdir()
                for name, data in {**files, "manifest.json": manifest}.items():
                    write_and_sync(aside / name, data)
                sync_folder(aside)
                # A folder of this step may be there: left by an interrupted run, or (saved again after a
                # resume) still named by a pointer, and then this one takes the next free name beside it.
                kept, name, n = self._kept(), f"step-{step:08d}", 1
                while name in kept:
                    name, n = f"step-{step:08d}-{n + 1}", n + 1
                remove(folder / name)
                aside.rename(folder / name)
            except OSError:
                shutil.rmtree(aside, ignore_errors=True)  # give a full disk its space back
                raise
            sync_folder(folder)
            pointer = {"step": step, "folder": name, "manifest_sha256": _sha256(manifest)}
            for which in ("last", "best") if best else ("last",):
                target = self.path / f"{which}.json"
                write_bytes(target, _seal(target, pointer))
            self._prune()

    def _kept(self) -> set[str]:
        """Names of the step folders that a pointer names, or might name if it cannot be read."""
        kept = set()
        for which in ("last", "best"):
            if (self.path / f"{which}.json").exists():
                try:
                    kept.add(self._pointer(which)["folder"])
                except CheckpointError:
                    return {entry.name for entry in (self.path / "checkpoints").glob("step-*")}
        return kept

    def _prune(self) -> None:
        kept = self._kept()
        for entry in list((self.path / "checkpoints").iterdir()):
            if _STEP_FOLDER.fullmatch(entry.name) and entry.name not in kept:
                remove(entry)
        for entry in [*(self.path / "checkpoints").iterdir(), *self.path.iterdir()]:
            if _LEFT_ASIDE.fullmatch(entry.name):
                remove(entry)

    def load(self, which: Literal["last", "best"] = "last") -> Checkpoint:
        """The checkpoint that `which` names, after checking every byte of its files.

        Raises `CheckpointError` if there is none, or if anything in it is damaged; it then names the
        file, and the other checkpoint if that one is intact.
        """
        other = "best" if which == "last" else "last"
        try:
            return self._verified(which)
        except CheckpointError as error:
            try:
                intact = self._verified(other)
            except CheckpointError:
                raise error from None
            source, target = (shlex.quote(str(self.path / f"{name}.json")) for name in (other, which))
            error.fix = f"Use `cp {source} {target}` to take the {other} one (step {intact.step}), which is intact"
            raise

    def _verified(self, which: str) -> Checkpoint:
        pointer = self._pointer(which)
        folder = self.path / "checkpoints" / pointer["folder"]
        what = f"a file of the {which} checkpoint"
        manifest = read_bytes(folder / "manifest.json", what)
        _compare(folder / "manifest.json", pointer["manifest_sha256"], _sha256(manifest))
        for name, entry in parse_json(manifest, folder / "manifest.json", what)["files"].items():
            _compare(folder / name, entry["sha256"], _sha256(read_bytes(folder / name, what)))
        return Checkpoint(pointer["step"], folder)

    def _pointer(self, which: str) -> dict[str, Any]:
        return _read_sealed(self.path / f"{which}.json", f"the pointer to the {which} checkpoint")


def _seal(path: Path, content: Mapping[str, Any]) -> bytes:
    """`content` as JSON for `path`, with the SHA-256 of itself in it."""
    content = json.loads(json_bytes(str(path), content))  # as it will be read back: tuples become lists
    return json_bytes(str(path), {**content, "sha256": _sha256(json_bytes(str(path), content))}, indent=2)


def _read_sealed(path: Path, what: str) -> dict[str, Any]:
    data = read_bytes(path, what)
    content = parse_json(data, path, what)
    content.pop("sha256", None)
    # Compared as bytes, so that a change of a blank or of the checksum is noticed too.
    _compare(path, _sha256(_seal(path, content)), _sha256(data))
    return content


def _compare(path: Path, expected: str, got: str) -> None:
    if expected != got:
        raise CheckpointError(
            "checkpoint",
            f"{path} is damaged: expected SHA-256 {expected[:12]}, got {got[:12]}",
            "Restore it from a copy",
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def next_run_folder(parent: str | Path, data_name: str) -> Path:
    """The first of `parent/<data>-1`, `-2`, ... that does not exist; `data_name` may be a path or a name."""
    last_part = re.split(r"[/\\]", data_name.rstrip("/\\"))[-1]
    name = re.sub(r"[^\w.-]+", "-", last_part).strip(".-") or "run"
    n = 1
    while (path := Path(parent) / f"{name}-{n}").exists() or path.is_symlink():
        n += 1
    return path
