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
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from minitransformer.errors import CheckpointError, DTypeError
from minitransformer.files import (
    check_file,
    compare,
    is_there,
    json_bytes,
    make_folders,
    names_in,
    parse_json,
    read_bytes,
    refusals_of_the_system,
    remove,
    sealed,
    sha256,
    sync_folder,
    unseal,
    write_and_sync,
    write_bytes,
)
from minitransformer.memory import total_memory

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
    seal = {"metadata": text, "sha256": _digest_of_arrays(contiguous, text)}
    return save(contiguous, {_METADATA_KEY: json.dumps(seal, sort_keys=True)})


def unpack_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays (owned, writable) and metadata of a file that holds what `pack_arrays` returned.

    Raises `CheckpointError` naming `path` for anything else: missing, damaged, cut off, of another
    program, or pickled (which is never loaded, since that would run code from the file).
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_bytes(path, "the file of arrays", at_most=total_memory() or sys.maxsize)
    try:
        # The library's `load` drops the metadata. The header is JSON after its length in 8 bytes.
        header = data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" ")
        if not header.endswith(b"}"):
            raise ValueError("the header is padded with other than blanks")
        seal = json.loads(json.loads(header)["__metadata__"][_METADATA_KEY])
        text, expected = seal["metadata"], seal["sha256"]
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
    compare(path, expected, got)
    return arrays, parse_json(text.encode(), path, "the metadata of the file of arrays")


def _digest_of_arrays(arrays: Mapping[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()


# --- a training run on disk ------------------------------------------------------------------------------

_FORMAT = 1
_MOST_STEPS = 10**12  # a thousand of them a second for thirty years
_STEP_FOLDER = re.compile(r"step-(\d{8,})(-\d+)?", re.ASCII)
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
        last.json  best.json           pointers: step, folder, SHA-256 of the manifest, whether there is a best

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
        content = sealed(str(path / "run.json"), {"format": _FORMAT, "description": description})
        if is_there(path / "run.json"):
            command = f"minitransformer resume {shlex.quote(str(path))}"
            raise CheckpointError("run", f"{path} already holds a run", f"Use `{command}`, or name another folder")
        with refusals_of_the_system(path):
            if not path.exists():
                make_folders(path.parent)
                path.mkdir()  # fails if another process has just taken the name
                sync_folder(path.parent)
            elif not path.is_dir() or not all(_LEFT_ASIDE.fullmatch(name) for name in names_in(path)):
                what = "a folder with other files in it" if path.is_dir() else "a file"
                raise CheckpointError("run", f"{path} is {what}, expected nothing", "Name another folder")
        write_bytes(path / "run.json", content)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The run at `path`. Raises `CheckpointError` if there is none, or if a newer version wrote it."""
        path = Path(path)
        if not is_there(path / "run.json"):
            problem = f"{path} holds no training run, looked for {path / 'run.json'}"
            raise CheckpointError("run", problem, "Check the path, or start a run with `minitransformer train`")
        file, what = path / "run.json", "the description of a training run"
        data = read_bytes(file, what)
        version = parse_json(data, file, what).get("format")
        if isinstance(version, int) and version > _FORMAT:  # its seal may be another too
            problem = f"{path} has run format {version}, this version of minitransformer reads up to {_FORMAT}"
            raise CheckpointError("run", problem, "Update it with `pip install -U minitransformer`")
        content = unseal(data, file, what)
        if type(version) is not int or version != _FORMAT or not isinstance(content.get("description"), dict):
            problem = f"{path} has run format {version!r}, this version of minitransformer reads format {_FORMAT}"
            raise CheckpointError("run", problem, "Go on with the version that wrote it, or start another run")
        return cls(path, content["description"])

    def save(self, step: int, files: Mapping[str, bytes], *, best: bool) -> None:
        """Save `files` (plain file names) as the checkpoint of `step`, named by `last`, and `best` if told.

        Then remove the checkpoints that neither pointer names. Raises `CheckpointError` when the system
        refuses; what `last` and `best` name is whole all the same.
        """
        if not _is_step(step):
            problem = f"a step is an integer of at least 0 and at most {_MOST_STEPS}, got {step!r}"
            raise CheckpointError("run", problem, "Count steps")
        for name in files:
            if not _is_plain(name) or name == "manifest.json":
                raise CheckpointError("run", f"{name!r} is no name for a file of a checkpoint", "Rename it")
        folder = self.path / "checkpoints"
        aside = folder / f".step-{step:08d}.tmp"
        manifest = json_bytes(
            "the manifest",
            {"step": step, "files": {n: {"size": len(b), "sha256": sha256(b)} for n, b in files.items()}},
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
            there = best or is_there(self.path / "best.json")
            pointer = {"step": step, "folder": name, "manifest_sha256": sha256(manifest), "best": there}
            # `last` is the later one: a run that goes on from an older `last` finds this best one once more,
            # while one that went on from this `last` would not look for it again.
            for which in ("best", "last") if best else ("last",):
                target = self.path / f"{which}.json"
                write_bytes(target, sealed(str(target), pointer))
            self._prune()

    def _kept(self) -> set[str]:
        """Names of the step folders that a pointer names, or might name if it cannot be read."""
        kept = set()
        for which in ("last", "best"):
            if is_there(self.path / f"{which}.json"):
                try:
                    kept.add(self._pointer(which)["folder"])
                except CheckpointError:
                    return self._step_folders()
        return kept

    def _prune(self) -> None:
        kept = self._kept()
        for name in sorted(self._step_folders() - kept):
            remove(self.path / "checkpoints" / name)
        for folder in (self.path / "checkpoints", self.path):
            for name in names_in(folder):
                if _LEFT_ASIDE.fullmatch(name):
                    remove(folder / name)

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to go on from; not in a run stopped before its first one was complete.

        Raises `CheckpointError` if there were some, and neither pointer is left.
        """
        if is_there(self.path / "last.json") or is_there(self.path / "best.json"):
            return True
        # Without a pointer, that of step 0 was being saved: what it holds can be made again.
        folders = self._step_folders() - {"step-00000000"}
        if folders:
            newest = self.path / "checkpoints" / max(folders)
            raise CheckpointError(
                "run",
                f"last.json and best.json of {self.path} are missing, and there are checkpoints, such as {newest.name}",
                f"Restore one of them from a copy; `minitransformer generate {shlex.quote(str(newest))}` shows "
                "whether that model is worth it",
            )
        return False

    def has_best(self) -> bool:
        """Whether a best checkpoint was ever saved; `load` then finds it, or says what has become of it."""
        return is_there(self.path / "best.json") or self._pointer("last").get("best") is True

    def _step_folders(self) -> set[str]:
        return {name for name in names_in(self.path / "checkpoints") if _STEP_FOLDER.fullmatch(name)}

    def load(self, which: Literal["last", "best"] = "last") -> Checkpoint:
        """The checkpoint that `which` names, after checking every byte of its files.

        Raises `CheckpointError` if there is none, or if anything in it is damaged; it then names the
        file, and the other checkpoint if that one is intact.
        """
        other = "best" if which == "last" else "last"
        if not self.has_checkpoint():
            command = f"minitransformer resume {shlex.quote(str(self.path))}"
            problem = f"{self.path} was stopped before its first checkpoint"
            raise CheckpointError("run", problem, f"Use `{command}` to start it again")
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
        compare(folder / "manifest.json", pointer["manifest_sha256"], sha256(manifest))
        files = parse_json(manifest, folder / "manifest.json", what).get("files")
        if not isinstance(files, dict) or not all(_is_plain(n) and isinstance(e, dict) for n, e in files.items()):
            problem = f"{folder / 'manifest.json'} is no list of the files beside it"
            raise CheckpointError("checkpoint", problem, "Restore it from a copy")
        for name, entry in files.items():
            check_file(folder / name, what, entry.get("size"), entry.get("sha256"))
        return Checkpoint(pointer["step"], folder)

    def _pointer(self, which: str) -> dict[str, Any]:
        path, what = self.path / f"{which}.json", f"the pointer to the {which} checkpoint"
        pointer = unseal(read_bytes(path, what), path, what)
        step, folder = pointer.get("step"), pointer.get("folder")
        if not _is_step(step) or not isinstance(folder, str) or not _STEP_FOLDER.fullmatch(folder):
            raise CheckpointError("checkpoint", f"{path} names no checkpoint of this run", "Restore it from a copy")
        return pointer


def _is_step(step: object) -> bool:
    return type(step) is int and 0 <= step <= _MOST_STEPS


def _is_plain(name: str) -> bool:
    """Whether `name` is that of a file, which lies in the folder it is looked for in."""
    return bool(name) and Path(name).name == name and not name.startswith(".") and not set(name) & set("/\\:\0")


def next_run_folder(parent: str | Path, data_name: str) -> Path:
    """The first of `parent/<data>-1`, `-2`, ... that does not exist; `data_name` may be a path or a name."""
    last_part = re.split(r"[/\\]", data_name.rstrip("/\\"))[-1]
    name = re.sub(r"[^\w.-]+", "-", last_part).strip(".-") or "run"
    n = 1
    while (path := Path(parent) / f"{name}-{n}").exists() or path.is_symlink():
        n += 1
    return path
