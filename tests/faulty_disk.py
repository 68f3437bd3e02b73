"""A disk that fails at the k-th change, and that loses power: for systems on which nothing can be traced."""

from __future__ import annotations

import errno
import io
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Kill(BaseException):
    """The process is gone: nothing catches it, and what runs after it has no effect on the disk."""


class Disk:
    """Stands between the package and the system, and fails at the k-th change of the disk.

    A "kill" ends the process there, with a write half done. "enospc" is one refused call, "full" refuses
    everything from there on except removals. `lose_power` takes back what was never synced: contents of
    files, and names made or moved in folders.
    """

    def __init__(self, patch: pytest.MonkeyPatch, grave: Path, fault: str = "", k: int = -1) -> None:
        self.fault, self.k, self.count = fault, k, 0
        self.grave = grave  # old files that a rename covered
        self.unsynced: set[int] = set()  # inodes of files
        self.synced: dict[int, int] = {}  # bytes of a file, by inode, that were synced once
        self.pending: list[tuple[int, int, Callable[[int], None]]] = []  # folder's inode, descriptor, undo
        self.dead = False
        for owner, name, wrapper in [
            (Path, "open", self.open),
            (Path, "mkdir", self.mkdir),
            (Path, "rename", self.rename),
            (Path, "replace", self.rename),
            (Path, "unlink", self.removal),
            (os, "unlink", self.removal),
            (os, "rmdir", self.removal),
            (os, "fsync", self.fsync),
        ]:
            patch.setattr(owner, name, self.around(getattr(owner, name), wrapper))

    @staticmethod
    def around(real: Any, wrapper: Any) -> Any:
        return lambda *args, **kwargs: wrapper(real, *args, **kwargs)

    def due(self, removal: bool = False) -> bool:
        if self.dead:
            raise Kill
        self.count += 1
        return self.count == self.k or (self.fault == "full" and 0 < self.k < self.count and not removal)

    def fail(self) -> None:
        if self.fault == "kill":
            self.dead = True
            raise Kill
        raise OSError(errno.ENOSPC, "No space left on device")

    def step(self, removal: bool = False) -> None:
        if self.due(removal):
            self.fail()

    def later(self, folder: Path, undo: Callable[[int], None]) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        self.pending.append((os.fstat(descriptor).st_ino, descriptor, undo))

    def open(self, real: Any, path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode[0] not in "wa":
            return real(path, mode, *args, **kwargs)
        self.step()
        if not path.exists():
            self.later(path.parent, lambda folder: os.unlink(path.name, dir_fd=folder))
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.unsynced.add(os.fstat(self.fileno()).st_ino)
                if disk.due():
                    super().write(bytes(data)[: len(data) // 2])
                    disk.fail()
                return super().write(data)

        raw = Raw(path, mode.replace("b", ""))
        if mode[0] == "w":
            self.synced.pop(os.fstat(raw.fileno()).st_ino, None)
        return io.BufferedWriter(raw)

    def mkdir(self, real: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        self.step()
        real(path, *args, **kwargs)
        self.later(path.parent, lambda folder: shutil.rmtree(path))

    def rename(self, real: Any, path: Path, target: Path) -> Any:
        self.step()
        old = None
        if target.exists():
            old = self.grave / str(self.count)
            os.link(target, old)

        def undo(folder: int) -> None:
            os.rename(target.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            if old:
                os.link(old, target.name, dst_dir_fd=folder)

        result = real(path, target)
        self.later(target.parent, undo)
        return result

    def removal(self, real: Any, *args: Any, **kwargs: Any) -> None:
        self.step(removal=True)
        real(*args, **kwargs)

    def fsync(self, real: Any, descriptor: int) -> None:
        self.step()
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self.forget(lambda inode: inode == status.st_ino)
        else:
            self.unsynced.discard(status.st_ino)
            self.synced[status.st_ino] = status.st_size

    def forget(self, which: Callable[[int], bool]) -> None:
        for inode, descriptor, _ in self.pending:
            if which(inode):
                os.close(descriptor)
        self.pending = [entry for entry in self.pending if not which(entry[0])]

    def lose_power(self, root: Path, loses: Callable[[Path], bool]) -> None:
        """Cut what was not synced of files short; undo the unsynced changes of the folders that `loses` names."""
        for path in root.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unsynced:
                kept = self.synced.get(path.stat().st_ino, 0)
                os.truncate(path, kept + (path.stat().st_size - kept) // 2)
        folders = {p.stat().st_ino for p in [root, *root.rglob("*")] if p.is_dir() and loses(p)}
        for inode, descriptor, undo in reversed(self.pending):
            if inode in folders:
                undo(descriptor)


LOSSES: dict[str, Callable[[Path], bool]] = {
    "everything": lambda folder: True,
    "names in the run folder": lambda folder: folder.name == "run",
    "names of checkpoints": lambda folder: folder.name != "run",
}
