"""What a kernel becomes on a GPU, found out without one: its assembly, registers and memory.

Needs numba-cuda with its compilers, which come as wheels. A driver may choose a few registers more or less.
"""

from __future__ import annotations

import re
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from minitransformer.kernels.gpu.kernel import Kernel, numba_cuda


class Resources(NamedTuple):
    """Of one kernel for one compute capability; registers and bytes are those of one thread, `shared` of a block."""

    registers: int
    spilled: int  # bytes that did not fit into registers, stored and loaded
    stack: int  # bytes of arrays that are indexed in ways only memory allows
    shared: int
    ptx: str


def compile_kernel(kernel: Kernel, capability: tuple[int, int] = (9, 0)) -> Resources:
    """Compile for a GPU of that compute capability, (9, 0) for an H100 or H200."""
    cuda, nvjitlink = numba_cuda(), import_module("cuda.bindings.nvjitlink")
    # Functions that a kernel calls are compiled for the GPU that is there; none need be.
    pretended: Any = SimpleNamespace(compute_capability=capability)
    with patch("numba.cuda.dispatcher.get_current_device", lambda: pretended):
        function = kernel.build(cuda)
        ptx, _ = cuda.compile(function, kernel.types, device=False, abi="numba", cc=capability, output="ptx")
    options = [f"-arch=sm_{capability[0]}{capability[1]}", "-Xptxas=-v", f"-maxrregcount={kernel.registers}"]
    linker = nvjitlink.create(len(options), options)
    try:
        data = ptx.encode()
        nvjitlink.add_data(linker, nvjitlink.InputType.PTX, data, len(data), "kernel")
        nvjitlink.complete(linker)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
    finally:
        nvjitlink.destroy(linker)
    return _read(log.decode(), ptx)


def _read(log: str, ptx: str) -> Resources:
    def number(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    if "Used " not in log:
        raise AssertionError(f"ptxas says nothing of registers: {log}")
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    shared = sum(int(size) for size in re.findall(r"\.shared [^\[]*\[(\d+)\]", ptx))
    return Resources(number(r"Used (\d+) registers"), spilled, number(r"(\d+) bytes stack frame"), shared, ptx)
