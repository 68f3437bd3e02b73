"""`minitransformer doctor`: what it says of a machine, with and without a GPU, and that kernels are compiled once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextvars import copy_context
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer.cli import main
from minitransformer.doctor import checks, facts
from minitransformer.doctor.text import facts_text
from minitransformer.kernels import compiled, store

ROOT = Path(mt.__file__).parent.parent
KERNELS = [
    f"{family} kernels, cpu"
    for family in ("attention", "decode", "linear_attention", "optimizer", "pointwise", "rowwise")
]
CHECKS = ["random numbers", "BLAS", "attention", *KERNELS, "training", "checkpoint", "working folder"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Leave the checks of these names; the others are not what the test is about."""
    every = checks.all_checks()

    def leave(*names: str) -> None:
        monkeypatch.setattr(checks, "all_checks", lambda: {name: every[name] for name in names})

    return leave


def cli(*argv: str) -> int:
    return copy_context().run(main, ("doctor", *argv))


# --- the report ------------------------------------------------------------------------------------------


def test_the_report_as_text(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_VERBOSE", "0")
    assert cli() == 0
    out, err = capsys.readouterr()
    assert all(line.startswith("compiling ") for line in err.splitlines())  # whatever nobody has compiled before
    assert out.startswith(f"minitransformer {mt.__version__} on Python {sys.version.split()[0]},")
    margins = [line[:12].strip() for line in out.splitlines() if not line.startswith(" ")]
    sections = ["versions", "processor", "memory", "disk", "BLAS", "threads", "environment", "kernels", "CUDA"]
    assert [margin for margin in margins if margin in sections] == sections
    assert f"numpy {np.__version__}" in out and "OPENBLAS_VERBOSE=0" in out
    assert re.findall(r"^  (\w+) +(.+?) +\d+\.\d\d s$", out, re.M) == [("ok", name) for name in CHECKS]
    assert re.fullmatch(rf"all {len(CHECKS)} checks passed in \d+\.\d s", out.splitlines()[-1])
    assert list(folder.iterdir()) == []


def test_the_report_as_json(capsys: pytest.CaptureFixture[str], only: Callable[..., None]) -> None:
    only("random numbers")
    assert cli("--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == "" and out.count("\n}\n") == 1
    assert {name: type(value) for name, value in report.items()} == {
        **dict.fromkeys(("versions", "platform", "processor", "memory", "disk", "threads"), dict),
        **dict.fromkeys(("environment", "cache", "cuda", "unknown"), dict),
        "blas": list,
        "checks": list,
        "passed": bool,
        "compiled": type(None),
    }
    assert report["unknown"] == {} or not sys.platform.startswith("linux")
    assert {*facts.REQUIRED, "python", "minitransformer"} <= report["versions"].keys()
    assert report["processor"]["cores_available"] <= report["processor"]["cores_present"]
    assert all(report["processor"][name] for name in ("name", "llvm_name", "triple"))
    assert report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]
    assert report["disk"]["folder"] == str(Path.cwd()) and report["disk"]["free_bytes"] > 0
    assert report["threads"]["numba"]["layers"] and report["threads"]["numba"]["num_threads"] >= 1
    assert report["cache"].keys() == {"folder", "problem", "kernels", "bytes"}
    (check,) = report["checks"]
    assert check.pop("seconds") >= 0
    assert check == {"name": "random numbers", "passed": True, "problem": None, "fix": None}


def test_the_number_of_threads_can_be_given(capsys: pytest.CaptureFixture[str], only: Callable[..., None]) -> None:
    only("random numbers")
    before = mt.threads.get_num_threads()
    try:
        assert cli("--json", "--threads", "3") == 0
    finally:
        mt.threads._num_threads = None
    assert mt.threads.get_num_threads() == before
    assert json.loads(capsys.readouterr().out)["threads"]["training"] == 3


def test_what_is_not_known_comes_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(facts, "installed_version", missing)
    monkeypatch.setattr(facts, "_processor_name", lambda: None)
    monkeypatch.setattr(facts, "total_memory", lambda: None)
    monkeypatch.setattr(facts, "available_memory", lambda: None)
    monkeypatch.setattr(facts.shutil, "disk_usage", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    report = {**facts.gather(), "compiled": None}
    assert report["unknown"]["disk.free_bytes"] == "Input/output error"
    text = " ".join(facts_text(report).split())
    assert "numpy unknown (it is not installed, or without its metadata)" in text
    assert "unknown (this system does not name it)" in text
    assert "unknown (this system does not say) available, unknown (this system does not say) in all" in text
    assert "unknown (Input/output error) free in" in text


# --- the GPU ---------------------------------------------------------------------------------------------


def cuda_text(monkeypatch: pytest.MonkeyPatch, cuda: Any = None) -> str:
    """What is said with a numba-cuda in the place of ours, or without one."""
    version = facts.installed_version

    def installed(name: str) -> str:
        if name == "numba-cuda":
            if cuda is None:
                raise PackageNotFoundError(name)
            return "0.30.4"
        return version(name)

    monkeypatch.setattr(facts, "installed_version", installed)
    if cuda is not None:
        driver = ModuleType("numba.cuda.cudadrv.driver")
        driver.CudaDriverError = ArithmeticError  # type: ignore[attr-defined]
        driver.driver = SimpleNamespace(get_version=lambda: (13, 0))  # type: ignore[attr-defined]
        monkeypatch.setattr(facts, "import_module", {"numba.cuda": cuda, driver.__name__: driver}.__getitem__)
    text = facts_text({**facts.gather(), "compiled": None})
    return " ".join(text[text.index("CUDA  ") + 4 :].split())


def test_without_numba_cuda_the_report_gives_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = 'none: numba-cuda is not installed with an NVIDIA GPU: pip install "numba-cuda[cu13]"'
    assert cuda_text(monkeypatch) == f"{expected} no kernel of this version runs on a GPU"


def test_the_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name=b"NVIDIA H200", compute_capability=(9, 0))
    cuda = SimpleNamespace(is_available=lambda: True, get_current_device=lambda: device)
    expected = "NVIDIA H200, compute capability 9.0, driver for CUDA 13.0 no kernel of this version runs on a GPU"
    assert cuda_text(monkeypatch, cuda) == expected


def test_a_gpu_that_is_not_there_or_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: False, cuda_error=lambda: "driver too old")
    assert cuda_text(monkeypatch, cuda).startswith("none: numba-cuda finds no GPU (driver too old) no kernel")

    def broken() -> Any:
        raise ArithmeticError("busy")

    cuda = SimpleNamespace(is_available=lambda: True, get_current_device=broken)
    assert cuda_text(monkeypatch, cuda).startswith("none: the GPU does not answer (busy) no kernel")


# --- the cache -------------------------------------------------------------------------------------------


def doctor_process(cache: Path, *argv: str) -> tuple[int, dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "minitransformer", "doctor", "--json", *argv]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    return run.returncode, json.loads(run.stdout)


@pytest.mark.thorough
def test_kernels_are_compiled_once(tmp_path: Path) -> None:
    number = len(list(compiled.all_kernels()))
    assert number >= 10
    for counts in ({"compiled": number, "cached": 0}, {"compiled": 0, "cached": number}):
        status, report = doctor_process(tmp_path, "--compile")
        assert status == 0 and report["compiled"] == counts
        assert [check["name"] for check in report["checks"]] == ["kernel cache", *CHECKS]
        assert report["cache"]["problem"] is None and report["cache"]["kernels"] == number
        assert report["cache"]["bytes"] > 1000 * number


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_an_unusable_cache_is_named(
    tmp_path: Path, only: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only("random numbers")
    (tmp_path / "minitransformer").mkdir()
    (tmp_path / "minitransformer").chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.folder_of.cache_clear()
    try:
        assert cli() == 0  # all works without
        text = " ".join(capsys.readouterr().out.split())
        problem = f"{tmp_path}/minitransformer is open to others (mode 0755, expected 0700)"
        assert f"kernels not kept between runs: {problem}." in text
        monkeypatch.setattr(compiled, "all_kernels", list)
        assert cli("--compile") == 1
        text = " ".join(capsys.readouterr().out.split())
        assert f"nothing that was compiled is kept: {problem}" in text
        assert text.endswith(f"kernel cache: Make {tmp_path}/minitransformer a folder of your own with mode 0700, or "
                             "set XDG_CACHE_HOME to one")  # fmt: skip
    finally:
        store.folder_of.cache_clear()


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal")
def test_a_terminal_gets_a_bar_and_fits_80_columns() -> None:
    import pty

    parent, child = pty.openpty()
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from minitransformer.cli import main; main(['doctor'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=child, stdout=child, stderr=child) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                shown += (new := os.read(parent, 65536))
            except OSError:  # Linux ends a terminal with EIO
                break
            if not new:
                break
    os.close(parent)
    assert process.returncode == 0
    text = shown.decode()
    assert re.search(rf"checking 2/{len(CHECKS)} \|.*\|, attention", text)
    assert max(len(line) for line in re.split(r"[\r\n]+", text) if "/" not in line) <= 80
