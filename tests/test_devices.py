"""What is in the way of a GPU is said by name, with what to do; tested with packages that stand in for CuPy's."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import minitransformer as mt
from minitransformer.errors import DeviceError, MissingExtraError
from minitransformer.kernels.gpu import arrays
from minitransformer.kernels.gpu.arrays import check_device, resolve_device


class CUDARuntimeError(RuntimeError):
    pass


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine(count, packages): as if these packages were installed and CuPy counted so many GPUs, or raised."""

    def prepare(count: Any = 0, packages: tuple[str, ...] = ("cupy", "numba_cuda")) -> None:
        def number() -> int:
            if isinstance(count, Exception):
                raise count
            return int(count)

        runtime = SimpleNamespace(getDeviceCount=number, CUDARuntimeError=CUDARuntimeError)
        stand_in: Any = ModuleType("cupy")
        stand_in.cuda = SimpleNamespace(runtime=runtime)
        modules = {"cupy": stand_in, "numba_cuda": ModuleType("numba_cuda")}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module if name in packages else None)
        arrays._check_cuda.cache_clear()

    yield prepare
    monkeypatch.undo()
    arrays._check_cuda.cache_clear()


@pytest.mark.parametrize("packages", [(), ("cupy",), ("numba_cuda",)])
def test_what_is_not_installed_is_named_with_the_line_that_installs_it(machine: Any, packages: Any) -> None:
    machine(1, packages)
    missing = "numba_cuda" if "cupy" in packages else "cupy"
    problem = rf"device cuda: needs the package '{missing}', which is not installed\. Run: pip install "
    with pytest.raises(MissingExtraError, match=problem + r'"minitransformer\[cuda\]"'):
        mt.tensor([1.0], device="cuda")


def test_a_driver_that_is_too_old_is_quoted(machine: Any) -> None:
    machine(CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient"))
    problem = r"device cuda: no GPU can be used \(cudaErrorInsufficientDriver: .*\)\. Install a driver for CUDA, or use"
    with pytest.raises(DeviceError, match=problem):
        mt.tensor([1.0]).to("cuda")


def test_a_machine_without_a_gpu(machine: Any) -> None:
    machine(0)
    with pytest.raises(DeviceError, match=r"this machine has no GPU that can be used\. Use device='cpu'"):
        check_device("test", "cuda")
    assert resolve_device("test", "auto") == "cpu"


def test_auto_is_the_gpu_where_there_is_one(machine: Any) -> None:
    machine(1)
    assert resolve_device("test", "auto") == "cuda" and check_device("test", "cuda") == "cuda"
    machine(1, ())
    assert resolve_device("test", "auto") == "cpu" and resolve_device("test", "simulator") == "simulator"
