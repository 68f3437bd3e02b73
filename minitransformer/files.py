"""Files that are whole or absent: atomic writes, JSON, and logs of one JSON record a line.

Every refusal is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from minitransformer.errors import CheckpointError


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


def read_bytes(path: Path, what: str) -> bytes:
    """Read a file; `CheckpointError` with `path` and `what` it is for if that fails."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError("files", f"{what} is missing, expected at {path}", "Check that path") from error
    except OSError as error:
        raise CheckpointError(
            "files",
            f"{what} could not be read: {path} ({error.strerror})",
            "Check what is at that path and its permissions",
        ) from error


def parse_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """The JSON object that `data`, read from `path`, spells; `CheckpointError` if it spells none."""
    try:
        obj = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
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
        """Drop, atomically, the records after `step` and a last line torn by a crash; no file, no work.

        Raises `CheckpointError` naming the line if one before the last is no record: that is damage.
        """
        if not self.path.exists():
            return
        old = read_bytes(self.path, "the log")
        lines = old.split(b"\n")  # what follows the last newline is empty, or torn
        kept = []
        for number, line in enumerate(lines, 1):
            try:
                record = parse_json(line, self.path, f"line {number} of the log")
            except CheckpointError:
                if number == len(lines):
                    break
                raise
            if not _has_step(record):
                raise CheckpointError(
                    "files", f'line {number} of {self.path} has no integer "step"', "Remove that line"
                )
            if record["step"] <= step:
                kept.append(line + b"\n")
        new = b"".join(kept)
        if new != old:
            write_bytes(self.path, new)


def _has_step(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step"), int) and not isinstance(record["step"], bool)
