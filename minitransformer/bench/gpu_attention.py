"""Attention on a GPU, timed by the GPU's own clock, beside each of PyTorch's kernels in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minitransformer.autograd import OPS
from minitransformer.bench import peer
from minitransformer.bench.attention_case import PASSES, Case, check
from minitransformer.bench.harness import OURS, alternate, compare, milliseconds, paced, spread, timed
from minitransformer.bench.report import table
from minitransformer.errors import ConfigError
from minitransformer.kernels.gpu.arrays import cupy, move
from minitransformer.ops.attention import make_problem

CASES = (Case(8, 1024, 16, 64), Case(8, 4096, 16, 64))
SQUARE = {"cuda": 4096, "simulator": 16}  # size of the matrices whose product tells what the device can do


class Theirs(NamedTuple):
    """One of PyTorch's kernels of attention, and the numbers it computes with."""

    kernel: str  # of torch.nn.attention.SDPBackend
    dtype: str = "float32"
    tf32: bool = False


# The first is what ours is checked against; the last two compute with fewer bits and are there for orientation.
TORCHES = {
    "torch (math)": Theirs("MATH"),
    "torch (memory-efficient)": Theirs("EFFICIENT_ATTENTION"),
    "torch (math, TF32)": Theirs("MATH", tf32=True),
    "torch (flash, bfloat16)": Theirs("FLASH_ATTENTION", "bfloat16"),
}


def timed_on(device: str, work: Callable[[], object], count: int) -> list[float]:
    """The seconds of each of `count` calls, on a GPU between two of its events: calls return before it is done."""
    if device != "cuda":
        return timed(work, count)
    Event = cupy().cuda.Event
    pairs = [(Event(), Event()) for _ in range(count)]
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    pairs[-1][1].synchronize()
    return [cupy().cuda.get_elapsed_time(begin, end) / 1000 for begin, end in pairs]


class Ours:
    """The pair of the op `attention`, called on arrays of the device."""

    def __init__(self, case: Case, device: str) -> None:
        self._device = device
        self._q, self._k, self._v, self._dout = (move(x, device) for x in case.inputs().values())
        self._dlse = move(np.zeros(self._q.shape[:3], np.float32), device)
        self._problem = make_problem("attention", self._q, self._k, self._v, case.mask(), is_causal=case.causal)

    def forward(self) -> tuple[Any, Any]:
        return OPS["attention"].forward(self._q, self._k, self._v, problem=self._problem)

    def both(self) -> dict[str, np.ndarray]:
        """On the device."""
        (out, _), saved = self.forward()
        dq, dk, dv, _ = OPS["attention"].backward((self._dout, self._dlse), saved)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    def time(self, passes: str, count: int) -> list[float]:
        return timed_on(self._device, self.forward if passes == "forward" else self.both, count)


def rate_of_products(device: str) -> float:
    """FLOP/s of a square float32 product on `device`, the median of 20."""
    size = SQUARE[device]
    a = move(np.random.default_rng(0).standard_normal((size, size), np.float32), device)
    timed_on(device, lambda: a @ a, 3)
    return 2 * size**3 / float(np.median(timed_on(device, lambda: a @ a, 20)))


def measure(device: str, cases: Sequence[Case] = CASES, rounds: int = 5) -> dict[str, Any]:
    """Figures of every case, ours and PyTorch's in turns. `GradientError` if results differ from PyTorch's."""
    machine = rate_of_products(device)
    found = {case.name: _measure(case, device, rounds, machine) for case in cases}
    return {"gemm_tflops": machine / 1e12, "cases": found}


def _measure(case: Case, device: str, rounds: int, machine: float) -> dict[str, Any]:
    ours, failed = Ours(case, device), {}
    timers: dict[str, Callable[[str, int], list[float]]] = {OURS: ours.time}
    with ExitStack() as stack:
        for name, theirs in TORCHES.items() if peer.installed() else ():
            torch = stack.enter_context(peer.process())
            try:
                torch.make("attention on a device", case=case, theirs=theirs, device=device)
            except ConfigError as error:
                failed[name] = str(error)
                continue
            if theirs == TORCHES["torch (math)"]:
                check(case, {name: move(x, "cpu") for name, x in ours.both().items()}, torch)
            timers[name] = partial(_ask, torch)
        sides = {(name, passes): paced(partial(time, passes)) for name, time in timers.items() for passes in PASSES}
        results = alternate(f"bench attention, {case.name}", sides, rounds)
    figures: dict[str, Any] = {"failed": failed}
    for passes, factor in PASSES.items():
        seconds = {name: results[name, passes] for name in timers}
        flops = factor * case.flops
        figures[passes] = {
            "sides": {name: _figures(blocks, flops, machine) for name, blocks in seconds.items()},
            **compare({name: blocks for name, blocks in seconds.items() if "TF32" not in name and "bf" not in name}),
        }
    return figures


def _ask(torch: peer.Peer, passes: str, count: int) -> list[float]:
    seconds: list[float] = torch.call("time", passes=passes, count=count)
    return seconds


def _figures(blocks: list[list[float]], flops: float, machine: float) -> dict[str, Any]:
    rates = spread(flops / np.concatenate(blocks[1:]) / 1e12)
    return {"ms": milliseconds(blocks), "tflops": rates, "percent_of_gemm": 100 * rates["median"] * 1e12 / machine}


def text_of(measured: Mapping[str, Any]) -> str:
    """The table of what `measure` found."""
    rows, notes = [], []
    for case, found in measured["cases"].items():
        for passes in PASSES:
            for name, side in found[passes]["sides"].items():
                row = (
                    f"{side['ms']['median']:.3f}",
                    f"{side['tflops']['median']:.2f}",
                    f"{side['percent_of_gemm']:.0f} %",
                )
                rows.append([f"{case}, {passes}: {name}", *row])
        notes += [f"{name} is left out of {case}. {why}" for name, why in found["failed"].items()]
    header = [f"of GEMM at {measured['gemm_tflops']:.3g} TFLOP/s", "ms", "TFLOP/s", "of GEMM"]
    return "\n".join([table(header, rows), *notes])
