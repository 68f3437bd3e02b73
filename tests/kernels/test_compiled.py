"""Compiled kernels on disk: never stale, never from a folder that others can write to, never a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import float64

from minitransformer.errors import DTypeError
from minitransformer.kernels import compiled, store
from minitransformer.kernels.optimizer import loops
from minitransformer.kernels.store import open_folder, read_checked, write_checked

PACKAGE = Path(store.__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="modes and owners of POSIX")

PROBE = """
from numba import float64, njit
from minitransformer.kernels.compiled import kernel
from minitransformer.kernels.probe_helper import change

@kernel(lambda T: float64(T))
def probe(x):
    return change(x)
"""
HELPER = "from numba import njit\n\n@njit\ndef change(x):\n    return x {}\n"
CALL = """
from minitransformer.kernels.probe import probe
print(probe(10.0), sum(probe.stats.cache_hits.values()))
"""


def python(program: str, folder: Path, **variables: str) -> str:
    """What a fresh interpreter prints that imports the package from `folder`, with a cache of its own."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), **variables},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has one more kernel, whose helper lies in another module."""
    shutil.copytree(PACKAGE, tmp_path / "minitransformer", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "minitransformer/kernels/probe.py").write_text(PROBE)
    (tmp_path / "minitransformer/kernels/probe_helper.py").write_text(HELPER.format("+ 1"))
    return tmp_path


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of our own for this process, still to be made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.folder_of.cache_clear()
    yield tmp_path / "minitransformer"
    store.folder_of.cache_clear()


def test_a_second_process_loads_what_the_first_compiled_and_an_edited_helper_is_seen(copied: Path) -> None:
    assert python(CALL, copied).split() == ["11.0", "0"]
    assert python(CALL, copied).split() == ["11.0", "1"]
    (copied / "minitransformer/kernels/probe_helper.py").write_text(HELPER.format("* 7"))
    assert python(CALL, copied).split() == ["70.0", "0"]
    (copied / "minitransformer/kernels/probe_helper.py").write_text(HELPER.format("+ 1"))
    assert python(CALL, copied).split() == ["11.0", "1"]
    # What nothing compiled depends on may change.
    (copied / "minitransformer/version.py").write_text('__version__ = "0.9"\n')
    assert python(CALL, copied).split() == ["11.0", "1"]


def test_sources_edited_since_the_import_are_neither_kept_nor_loaded(copied: Path) -> None:
    edit = f"""
from minitransformer.kernels.probe import probe
from pathlib import Path
helper = Path("minitransformer/kernels/probe_helper.py")
helper.write_text({HELPER.format("* 7")!r})
print(probe(10.0))
"""
    assert python(edit, copied).strip() == "11.0"
    assert python(CALL, copied).split() == ["70.0", "0"]


def test_damaged_files_are_compiled_again_and_replaced(copied: Path) -> None:
    python(CALL, copied)
    (file,) = copied.glob("cache/minitransformer/*/probe.probe-*.kernel")
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], whole[:-1], b""):
        file.write_bytes(damaged)
        assert python(CALL, copied).split() == ["11.0", "0"]
        assert read_checked(file) is not None
    file.unlink()
    file.mkdir()
    assert python(CALL, copied).split() == ["11.0", "0"]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    file, data = tmp_path / "x.kernel", b"forty-two"
    write_checked(file, data)
    assert read_checked(file) == data
    content = file.read_bytes()
    for position in range(len(content)):
        file.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        assert read_checked(file) is None
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert read_checked(file) is None


def test_two_processes_may_compile_at_once(copied: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copied), "XDG_CACHE_HOME": str(copied / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", CALL], cwd=copied, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0].split()[0] for process in both] == ["11.0", "11.0"]
    assert python(CALL, copied).split() == ["11.0", "1"]
    assert [f.suffix for f in copied.glob("cache/minitransformer/*/*")] == [".kernel"]


def test_caches_of_other_packages_stay_where_they_were(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("from numba import njit\n@njit(cache=True)\ndef one():\n    return 1\n")
    program = "import minitransformer.kernels.optimizer.cpu, other; other.one(); print(other.one.stats.cache_path)"
    printed = python(program, tmp_path, PYTHONPATH=os.pathsep.join([str(PACKAGE.parent), str(tmp_path)]))
    assert printed.strip() == str(tmp_path / "__pycache__")
    assert list(tmp_path.glob("__pycache__/other.one-*.nbc"))


def test_without_compilation_kernels_are_plain_functions(tmp_path: Path) -> None:
    program = (
        "from minitransformer.kernels.optimizer import cpu; import numpy; print(cpu.squared_norm(numpy.ones(300)))"
    )
    variables = {"PYTHONPATH": str(PACKAGE.parent), "NUMBA_DISABLE_JIT": "1"}
    assert python(program, tmp_path, **variables).strip() == "300.0"
    assert not (tmp_path / "cache").exists()


# --- the folder ------------------------------------------------------------------------------------------


@posix
def test_the_folder_is_made_for_us_alone(fresh: Path) -> None:
    folder = compiled.kernel_folder()
    assert folder is not None and folder.parent == fresh
    assert [f.stat().st_mode & 0o777 for f in (fresh, folder)] == [0o700, 0o700]


@posix
@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("open", r"is open to others \(mode 0777, expected 0700\)"),
        ("readable", r"is open to others \(mode 0750, expected 0700\)"),
        ("link", "is a link, which others may have set"),
        ("file", "cannot be made"),
        ("stranger", "belongs to another user"),
        ("replaceable", "lies in a folder where everybody may replace it"),
    ],
)
def test_unsafe_folders_are_not_used(case: str, problem: str, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case == "link":
        (fresh.parent / "elsewhere").mkdir(mode=0o700)
        fresh.symlink_to(fresh.parent / "elsewhere")
    elif case == "file":
        fresh.write_text("")
    else:
        fresh.mkdir(mode=0o700)
    if case in ("open", "readable"):
        fresh.chmod(0o777 if case == "open" else 0o750)
    if case == "replaceable":
        fresh.parent.chmod(0o777)
    if case == "stranger":
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(
        RuntimeWarning, match=f"compiled kernels are not kept: {fresh} {problem}.* Make {fresh} a folder"
    ):
        assert compiled.kernel_folder() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.kernel_folder() is None  # said once
    assert case == "file" or list(fresh.iterdir()) == []


@posix
def test_an_unsafe_folder_below_a_safe_one_is_not_used(fresh: Path) -> None:
    folder = compiled.kernel_folder()
    assert folder is not None
    folder.chmod(0o770)
    store.folder_of.cache_clear()
    with pytest.warns(RuntimeWarning, match="0770"):
        assert compiled.kernel_folder() is None


@posix
def test_where_no_folder_can_be_made_kernels_are_compiled_without(tmp_path: Path) -> None:
    program = "from minitransformer.kernels.optimizer import cpu; import numpy; print(cpu.squared_norm(numpy.ones(3)))"
    variables = {"PYTHONPATH": str(PACKAGE.parent), "XDG_CACHE_HOME": "/dev/null"}
    printed = python(program, tmp_path, **variables)
    assert printed.startswith("3.0\n") and printed.count("compiled kernels are not kept: /dev/null/minitransf") == 1


def test_a_full_disk_costs_nothing_but_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def torn(self: Path, data: bytes) -> int:
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    write_checked(tmp_path / "x.kernel", b"data")
    assert list(tmp_path.iterdir()) == []


def test_only_folders_of_ours_that_nobody_used_for_30_days_are_removed(fresh: Path) -> None:
    fresh.mkdir(mode=0o700)
    old, recent, foreign = fresh / ("0" * 64), fresh / ("1" * 64), fresh / "notes"
    for folder, days in ((old, 31), (recent, 29), (foreign, 400)):
        folder.mkdir(mode=0o700)
        (folder / "file").write_text("")
        os.utime(folder, (time.time() - days * 86400,) * 2)
    folder = compiled.kernel_folder()
    assert folder is not None
    assert sorted(fresh.iterdir()) == sorted([recent, foreign, folder])
    os.utime(folder, (0, 0))
    store.folder_of.cache_clear()
    assert compiled.kernel_folder() == folder and folder.stat().st_mtime > time.time() - 60  # its use is noted


@pytest.mark.parametrize("variable", ["", "relative/path"])
def test_without_a_variable_the_folder_is_in_the_home_folder(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "name", "posix")
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.setenv("HOME", "/home/someone")
    assert store.cache_root() == Path("/home/someone/.cache/minitransformer")


def test_without_a_home_folder_there_is_no_place() -> None:
    assert open_folder(Path("~/.cache/minitransformer")) == "has no place, because this user has no home folder"


# --- the decorator ---------------------------------------------------------------------------------------


def test_other_types_are_refused_rather_than_compiled() -> None:
    served = r"expected array\(float32, 1d, C\).* or array\(float64, 1d, C\), array\(float64, 1d, C\), float64\. Norm"
    for x in (np.ones(4)[::2], np.ones((2, 1)), np.ones(2, np.int64), np.ones(2, ">f4")):
        with pytest.raises(DTypeError, match=rf"^kernels\.optimizer\.loops\.add_l1: got .*{served}"):
            loops.add_l1(x, x, 1.0)
    assert len(loops.add_l1.signatures) <= 2


def test_what_is_about_to_be_compiled_is_announced_and_what_is_loaded_is_not(copied: Path) -> None:
    call = "from minitransformer import kernels\nkernels.announcers.append(print)\n" + CALL
    assert python(call, copied).split() == ["probe.probe", "11.0", "0"]
    assert python(call, copied).split() == ["11.0", "1"]


def test_only_functions_that_the_key_covers_are_kernels() -> None:
    def outside(x: Any) -> Any:
        return x

    with pytest.raises(AssertionError, match=r"outside is no module-level function of minitransformer.kernels"):
        compiled.kernel(lambda T: float64(T))(outside)


def test_kernels_take_nothing_from_other_folders() -> None:
    """The key covers the sources below kernels/ only, so what is compiled must lie there, plain values included."""
    for file in (PACKAGE / "kernels").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "compiled import" in text or "njit" in text:
            lines = [line for line in text.splitlines() if line.startswith(("from minitransformer", "import mini"))]
            strangers = [
                n for n in lines if not n.startswith(("from minitransformer.kernels", "from minitransformer.er"))
            ]
            assert not strangers, file
