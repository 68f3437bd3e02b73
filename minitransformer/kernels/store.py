"""Where compiled kernels are kept: a folder that nobody else can write to, one folder per key below it.

Numba's cache files are pickles, so whoever writes them runs code in our process. And Numba itself keeps a
kernel although a helper in another module was edited. Hence a folder of our own, and a key made of
everything that a compiled kernel depends on.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import time
import warnings
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

_UNUSED_SECONDS = 30 * 24 * 3600
_KEY = re.compile("[0-9a-f]{64}")


def cache_root() -> Path:
    """`$XDG_CACHE_HOME/minitransformer`, by default in ~/.cache; in %LOCALAPPDATA% on Windows."""
    variable, default = ("LOCALAPPDATA", "~/AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", "~/.cache")
    given = Path(os.environ.get(variable, ""))
    # A relative path is passed over, as the XDG specification asks: it would depend on the working folder.
    base = given if given.is_absolute() else Path(os.path.expanduser(default))  # noqa: PTH111 (a Path raises)
    return base / "minitransformer"


def open_folder(folder: Path) -> str | None:
    """Make `folder` if it is missing; says why it cannot be used, None if it can."""
    if not folder.is_absolute():
        return "has no place, because this user has no home folder"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status, above = folder.lstat(), folder.parent.stat()
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return "is a link, which others may have set"
    if os.name == "posix":  # Windows keeps a user's folder by other means
        if status.st_uid != os.geteuid():
            return "belongs to another user"
        if status.st_mode & 0o077:
            return f"is open to others (mode {stat.S_IMODE(status.st_mode):04o}, expected 0700)"
        if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
            return "lies in a folder where everybody may replace it"
    return None


def refusal(key: str) -> str | None:
    """Makes the folder of `key`; if it cannot be used, says which folder, why, and what to do about it."""
    root = cache_root()
    for folder in (root, root / key):
        if problem := open_folder(folder):
            variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
            return f"{folder} {problem}. Make {folder} a folder of your own with mode 0700, or set {variable} to one"
    return None


def sources_digest() -> str:
    """SHA-256 over the sources of all kernels and of everything that may be compiled into them.

    Empty where they cannot be read (a package in an archive): then nothing is kept.
    """
    root = Path(__file__).parent
    digest = hashlib.sha256()
    try:
        files = sorted(file for file in root.rglob("*.py") if file.is_file())
        for file in files:
            text = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()} {len(text)}\n".encode())
            digest.update(text)
    except OSError:
        return ""
    return digest.hexdigest() if files else ""


_imported_digest = sources_digest()


def key_of(parts: Iterable[str]) -> str | None:
    """The key of what is compiled now: the sources and `parts`, the versions and the processor.

    None if the sources were edited since they were imported: what this process compiles is neither the
    old nor the new text.
    """
    if not _imported_digest or sources_digest() != _imported_digest:
        return None
    return hashlib.sha256("\n".join([_imported_digest, *parts]).encode()).hexdigest()


@cache
def folder_of(key: str) -> Path | None:
    """The folder of `key`, made if it is missing; None, with one warning a process, if there can be none.

    Making one removes those of other keys that nobody used for 30 days.
    """
    root = cache_root()
    if problem := refusal(key):
        warnings.warn(f"compiled kernels are not kept: {problem}", RuntimeWarning, stacklevel=2)
        return None
    with suppress(OSError):  # a file system that can only be read, or another process that removes the same
        os.utime(root / key)
        if not any((root / key).iterdir()):
            _remove_unused(root)
    return root / key


def _remove_unused(root: Path) -> None:
    for folder in root.iterdir():
        if _KEY.fullmatch(folder.name) and time.time() - folder.lstat().st_mtime > _UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def read_checked(file: Path) -> bytes | None:
    """What `write_checked` wrote; None for a file that is missing, torn, damaged or not to be read."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    data = content[hashlib.sha256().digest_size :]
    return data if content == hashlib.sha256(data).digest() + data else None


def write_checked(file: Path, data: bytes) -> None:
    """Write `data` with its checksum, whole or not at all; a disk that is full or read-only costs nothing."""
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")  # one thread of a process compiles at a time
    try:
        aside.write_bytes(hashlib.sha256(data).digest() + data)
        aside.replace(file)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
