"""Files that are whole or absent: atomic writes, JSON with and without a seal, logs of one record a line.

Only ordinary files are read, also through links: a folder, pipe or device in the place of one is refused
before it is opened. Every refusal is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from minitransformer.errors import CheckpointError

_JSON_BYTES = 1 << 26  # five times the tokenizer that knows every character there is
_MAX_DIGITS = 100


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that, whenever the machine stops, `path` holds all of the old bytes or all of the new.

    Raises `CheckpointError` when the system refuses (disk full, no permission); the old file stays.
    """
    # Two writers of one file must not share the file written aside.
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    with refusals_of_the_system(path):
        try:
            write_and_sync(aside, data)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_json(path: Path, obj: Mapping[str, Any]) -> None:
    """`write_bytes` of `obj` as indented JSON with sorted keys.

    Raises `CheckpointError` for NaN, infinity, and whatever else JSON cannot hold.
    """
    write_bytes(path, json_bytes(str(path), obj, indent=2))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object; `what` says what the file is for ("the tokenizer of this model").

    Raises `CheckpointError` naming `path` if it is missing, unreadable, not UTF-8, cut off or no object.
    """
    return parse_json(read_bytes(path, what), path, what)


def read_bytes(path: Path, what: str, at_most: int = _JSON_BYTES) -> bytes:
    """Read a file of up to `at_most` bytes; `CheckpointError` with `path` and `what` it is for if that fails."""
    with reading(path, what) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise CheckpointError(
                "files",
                f"{what} has {size:,} bytes, expected at most {at_most:,}: {path}",
                "Check what was put at that path",
            )
        return file.read()


def check_file(path: Path, what: str, size: object, digest: object) -> None:
    """`CheckpointError` unless the file has this size and this SHA-256; it may be larger than the memory."""
    got = hashlib.sha256()
    with reading(path, what) as file:
        compare(path, size, os.fstat(file.fileno()).st_size)  # first: what replaced it may be endless
        while piece := file.read(1 << 20):
            got.update(piece)
    compare(path, digest, got.hexdigest())


def is_there(path: Path) -> bool:
    """Whether there is anything at `path`; `CheckpointError` where the system does not let us look."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return False
    except OSError as error:
        raise _unreadable(path, "what is at a path", error) from error
    return True


def names_in(folder: Path) -> list[str]:
    """The names in `folder`, none if there is no folder; `CheckpointError` where the system does not let us look."""
    try:
        return sorted(entry.name for entry in folder.iterdir()) if is_there(folder) else []
    except OSError as error:
        raise _unreadable(folder, "a folder", error) from error


def _unreadable(path: Path, what: str, error: OSError) -> CheckpointError:
    problem = f"{what} could not be read: {path} ({error.strerror})"
    return CheckpointError("files", problem, "Check what is at that path and its permissions")


@contextmanager
def reading(path: Path, what: str) -> Iterator[BinaryIO]:
    """An ordinary file, open to be read; what the system refuses, then or inside, is a `CheckpointError`."""
    try:
        mode = path.stat().st_mode  # of what a link leads to: caches of downloads consist of links
        if not stat.S_ISREG(mode):  # and not opened: that would wait at a pipe, and read a device for ever
            kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
            kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
            raise CheckpointError("files", f"{what} is {kind}, expected a file: {path}", "Put the file itself there")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError("files", f"{what} is missing, expected at {path}", "Check that path") from error
    except OSError as error:
        raise _unreadable(path, what, error) from error


def parse_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """The JSON object that `data`, read from `path`, spells; `CheckpointError` if it spells none."""
    try:
        obj = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, parse_int=_whole, parse_float=_finite)
        if not isinstance(obj, dict):
            raise ValueError(f"expected a JSON object, got {type(obj).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "files",
            f"{what} is damaged or was not written by minitransformer: {path} ({error})",
            "Restore that file from a copy",
        ) from error
    return obj


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:_MAX_DIGITS]} is too large")
    return number


def json_bytes(what: str, obj: Mapping[str, Any], indent: int | None = None) -> bytes:
    """`obj` as JSON with sorted keys and a newline; `CheckpointError` with `what` it is if it cannot be."""
    try:
        return (json.dumps(obj, sort_keys=True, indent=indent, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "files",
            f"{what} cannot be written as JSON ({error})",
            "Use dicts with string keys, lists, strings, finite numbers, bools and None",
        ) from error


def sealed(what: str, content: Mapping[str, Any]) -> bytes:
    """`content` as JSON with the SHA-256 of itself in it; `CheckpointError` with `what` it is if it cannot be."""
    content = json.loads(json_bytes(what, content))  # as it will be read back: tuples become lists
    return json_bytes(what, {**content, "sha256": sha256(json_bytes(what, content))}, indent=2)


def unseal(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """What `sealed` was given; `CheckpointError` naming `path` if a single byte of `data` was changed."""
    content = parse_json(data, path, what)
    content.pop("sha256", None)
    # Compared as bytes, so that a change of a blank or of the checksum is noticed too.
    compare(path, sha256(sealed(what, content)), sha256(data))
    return content


def compare(path: Path, expected: object, got: object) -> None:
    """`CheckpointError` unless what a file should be, a size or a digest, is what it is."""
    if expected != got:
        kind = "SHA-256" if isinstance(got, str) else "a size of"
        raise CheckpointError(
            "checkpoint",
            f"{path} is damaged: expected {kind} {str(expected)[:12]}, got {str(got)[:12]}",
            "Restore it from a copy",
        )


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def refusals_of_the_system(path: Path) -> Iterator[None]:
    """Turn every `OSError` of the writes inside into a `CheckpointError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            "files",
            f"{path} could not be written ({error.strerror or error})",
            "Check free space and permissions there; what was saved before is untouched",
        ) from error


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a file that nobody reads yet, down to the disk; its name lasts once its folder is synced."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in `folder`, with what was renamed or made there, last on the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and renames need no syncing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folders(folder: Path) -> None:
    """Make `folder` and the missing folders above it, durably."""
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove the file or folder at `path`, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class LogFile:
    """A log of one JSON object a line, each with an integer "step", in the order of the steps.

    Appended lines reach the system at once, the disk at `sync`: call it before saving a checkpoint, so
    that a log is never behind the checkpoint that a resumed run starts from.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record. Raises `CheckpointError` without a step, for NaN or infinity, or a full disk."""
        if not _has_step(record):
            raise CheckpointError("files", f'a record of {self.path} needs an integer "step", got {record!r}', "Add it")
        line = json_bytes(f"a record of {self.path}", record)
        with refusals_of_the_system(self.path), self.path.open("ab") as file:
            file.write(line)

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        if self.path.exists():
            with refusals_of_the_system(self.path), self.path.open("ab") as file:
                os.fsync(file.fileno())
                sync_folder(self.path.parent)

    def cut_back(self, step: int) -> None:
        """Drop, atomically, the records after `step` and what a crash left of them; no file, no work.

        What cannot be read is dropped where only later records follow. Raises `CheckpointError` naming the line if
        one up to `step` follows: that is damage.
        """
        if not self.path.exists():
            return
        old = read_bytes(self.path, "the log", at_most=sys.maxsize)
        kept: list[bytes] = []
        damage: CheckpointError | None = None
        for number, line in enumerate(old.split(b"\n"), 1):  # what follows the last newline is empty, or torn
            try:
                record = parse_json(line, self.path, f"line {number} of the log")
                if not _has_step(record):
                    problem = f'line {number} of {self.path} has no integer "step"'
                    raise CheckpointError("files", problem, "Remove that line")
            except CheckpointError as error:
                damage = damage or error
                continue
            if record["step"] <= step:
                if damage:
                    raise damage
                kept.append(line + b"\n")
        new = b"".join(kept)
        if new != old:
            write_bytes(self.path, new)


def _has_step(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step"), int) and not isinstance(record["step"], bool)
