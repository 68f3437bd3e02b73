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
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer.cli import main
from minitransformer.doctor import checks, facts
from minitransformer.doctor.text import facts_text
from minitransformer.kernels import FAMILIES, compiled, store

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


class Driver:
    """In the place of the library of NVIDIA's driver, whose functions write what was asked for and return 0."""

    def __init__(self, version: int = 13000, capability: tuple[int, int] = (9, 0), count: int = 1, init: int = 0):
        self.version, self.capability, self.count, self.init = version, capability, count, init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, number: Any) -> int:
        number._obj.value = self.count
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: int) -> int:
        assert size == len(name) and device == 0
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: int) -> int:
        number._obj.value = {75: self.capability[0], 76: self.capability[1]}[attribute]
        return device


def cuda_text(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, *packages: str) -> str:
    """What is said with this driver, and with these packages for a GPU."""
    version = facts.installed_version

    def installed(name: str) -> str:
        if name.startswith(("numba-cuda", "cupy")) and name not in packages:
            raise PackageNotFoundError(name)
        return "1.0" if name in packages else version(name)

    def library() -> Driver:
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(facts, "installed_version", installed)
    monkeypatch.setattr(facts, "_driver_library", library)
    text = facts_text({**facts.gather(), "compiled": None})
    return " ".join(text[text.index("CUDA  ") + 4 :].split())


ALL = ("numba-cuda", "cupy-cuda13x")
DEVICE = "NVIDIA H200, compute capability 9.0, driver for CUDA 13.0"
OLDER = "NVIDIA H200, compute capability 9.0, driver for CUDA 12.4"
CUDA, CUDA12 = (f'pip install "minitransformer[{extra}]"' for extra in ("cuda", "cuda12"))


@pytest.mark.parametrize(
    ("driver", "packages", "said"),
    [
        (None, (), f"none: no driver of NVIDIA is installed with an NVIDIA GPU: {CUDA}"),
        (None, ALL, "none: no driver of NVIDIA is installed"),
        (Driver(init=100), ALL, "none: the driver finds no GPU that can be used (error 100)"),
        (Driver(count=0), ALL, "none: the driver finds no GPU"),
        (Driver(), (), f"{DEVICE} not usable: numba-cuda and CuPy are not installed {CUDA}"),
        (Driver(), ALL[:1], f"{DEVICE} not usable: CuPy is not installed {CUDA}"),
        (Driver(), ALL[1:], f"{DEVICE} not usable: numba-cuda is not installed {CUDA}"),
        (Driver(12040), (), f"{OLDER} not usable: numba-cuda and CuPy are not installed {CUDA12}"),
        (Driver(12040), ALL[:1], f"{OLDER} not usable: CuPy is not installed {CUDA12}"),
        (
            Driver(12040),
            ALL,
            f"{OLDER} not usable: cupy-cuda13x needs a driver for CUDA 13 (r580) and compute capability 7.5 "
            f"pip uninstall cupy-cuda13x && {CUDA12}",
        ),
        (
            Driver(capability=(7, 0)),
            (),
            DEVICE.replace("9.0", "7.0") + f" not usable: numba-cuda and CuPy are not installed {CUDA12}",
        ),
        (
            Driver(11080),
            (),
            OLDER.replace("12.4", "11.8")
            + " not usable: its driver is for CUDA 11.8, expected one of r525 or newer, for CUDA 12",
        ),
    ],
)
def test_what_the_gpu_lacks_is_named_with_the_line_that_installs_it(
    driver: Driver | None, packages: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda_text(monkeypatch, driver, *packages) == f"{said} simulated GPU: available"


@pytest.mark.parametrize("packages", [ALL, ("numba-cuda", "cupy-cuda12x"), ("numba-cuda", "cupy")])
def test_a_gpu_that_can_be_used_is_named_with_its_kernels(
    packages: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    families = [family for family, names in FAMILIES.items() if "cuda" in names]
    assert len(families) > 3
    assert cuda_text(monkeypatch, Driver(), *packages) == (
        f"{DEVICE} kernels: {', '.join(families)} simulated GPU: available"
    )
    if "cupy-cuda13x" not in packages:
        assert "not usable" not in cuda_text(monkeypatch, Driver(12040), *packages)


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
