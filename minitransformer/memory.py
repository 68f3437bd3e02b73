"""How much memory there is, and one setting of the memory allocator that array programs want."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT_BYTES = 1 << 28

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def owner_of(array: np.ndarray) -> np.ndarray:
    """The array whose memory `array` looks into."""
    kind = np.ndarray if isinstance(array, np.ndarray) else type(array)
    while isinstance(array.base, kind):
        array = array.base
    return array


def keep_freed_memory() -> None:
    """Let the process keep memory it frees, up to 256 MiB, instead of returning it to the system.

    By default glibc gives every large block back at once, and the next allocation of the same size pays
    for it with a page fault every 4 KiB: about a tenth of a small training step. For the whole process, from
    now on; does nothing where the C library is another.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
            mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def total_memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or its container's limit if that is less.

    None where the system does not say.
    """
    if sys.platform == "win32":
        return _windows_memory()[0]
    if sys.platform == "linux":
        return min(_meminfo("MemTotal") + [limit for limit, _ in _cgroup_limits()], default=None)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int | None:
    """Bytes that can be allocated now without swapping, in the machine and in every container around us.

    File caches count as available: the system drops them when memory is asked for. None where the system
    does not say (macOS).
    """
    if sys.platform == "win32":
        return _windows_memory()[1]
    rooms = [max(0, limit - used) for limit, used in _cgroup_limits()]
    return min(_meminfo("MemAvailable") + rooms, default=None)


def _meminfo(name: str) -> list[int]:
    """The field `name` of /proc/meminfo in bytes; empty where there is none."""
    return [value * 1024 for value in _fields(_PROC / "meminfo", f"{name}:")]


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every control group that we are in, of both versions of the interface.

    A process sees its own path in a container or the path on the host, depending on how the container was
    made; the folders that do not exist are passed over, and the top one always exists.
    """
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit_name, use_name, cache_name = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif controllers == "memory":
            top, limit_name = _CGROUPS / "memory", "memory.limit_in_bytes"
            use_name, cache_name = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = _text(folder / limit_name).strip(), _text(folder / use_name).strip()
            if limit.isdecimal() and used.isdecimal():  # not "max", not missing
                yield int(limit), int(used) - sum(_fields(folder / "memory.stat", cache_name))
            if folder == top:
                break


def _fields(file: Path, name: str) -> list[int]:
    return [int(words[1]) for words in map(str.split, _text(file).splitlines()) if words and words[0] == name]


def _text(file: Path) -> str:
    """What the system says in `file`; nothing where it has no such file or does not let us read it."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


if sys.platform == "win32":

    class _MemoryStatus(ctypes.Structure):
        """MEMORYSTATUSEX of the Windows interface."""

        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total", ctypes.c_uint64),
            ("available", ctypes.c_uint64),
            ("rest", ctypes.c_uint64 * 5),
        )

    def _windows_memory() -> tuple[int | None, int | None]:
        status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
        known = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return (status.total, status.available) if known else (None, None)
