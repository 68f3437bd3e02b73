"""How much memory there is: the machine's, and what containers leave of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from minitransformer import memory
from minitransformer.memory import available_memory, total_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and control groups")
MIB = 1 << 20


def pretend(monkeypatch: pytest.MonkeyPatch, root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(memory, "_PROC", root / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", root / "cg")


MACHINE = {"proc/meminfo": "MemTotal: 8192 kB\nMemFree: 1024 kB\nMemAvailable: 4096 kB\n"}


def test_this_machine_has_memory() -> None:
    total, available = total_memory(), available_memory()
    assert total is not None and total > 64 * MIB
    assert available is None or 0 <= available <= total


@linux
@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8 * MIB, 4 * MIB),
        # the second interface, a limit of the parent, and caches that can be dropped
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "cg/a/b/memory.max": "max\n",
                "cg/a/b/memory.current": f"{MIB}\n",
                "cg/a/memory.max": f"{3 * MIB}\n",
                "cg/a/memory.current": f"{2 * MIB}\n",
                "cg/a/memory.stat": f"anon 7\ninactive_file {MIB}\n",
            },
            3 * MIB,
            2 * MIB,
        ),
        # the first interface, in a container that sees the host's path but only its own folder
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/7f\n0::/\n",
                "cg/memory/memory.limit_in_bytes": f"{2 * MIB}\n",
                "cg/memory/memory.usage_in_bytes": f"{3 * MIB}\n",
                "cg/memory/memory.stat": "inactive_file 5\ntotal_inactive_file 0\n",
            },
            2 * MIB,
            0,
        ),
        # a limit beyond the machine changes nothing
        (
            {"proc/self/cgroup": "0::/\n", "cg/memory.max": f"{1 << 62}\n", "cg/memory.current": "0\n"},
            8 * MIB,
            4 * MIB,
        ),
    ],
)
def test_the_narrowest_limit_counts(
    files: dict[str, str], total: int, available: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, tmp_path, MACHINE | files)
    assert (total_memory(), available_memory()) == (total, available)


@linux
def test_unknown_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, tmp_path, {})
    assert total_memory() is None and available_memory() is None
