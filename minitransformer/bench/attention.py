"""`minitransformer bench attention`: attention and its gradient beside torch's, and beside what the machine can do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import OPS
from minitransformer.bench import gpu_attention, peer
from minitransformer.bench.attention_case import PASSES, Case, check
from minitransformer.bench.gemm import Square
from minitransformer.bench.harness import OURS, alternate, compare, milliseconds, paced, publish, spread, start, timed
from minitransformer.bench.report import Spread, table
from minitransformer.checks import shown
from minitransformer.errors import ConfigError
from minitransformer.kernels.gpu.arrays import resolve_device
from minitransformer.ops.attention import make_problem
from minitransformer.threads import Workers, get_num_threads, single_threaded_blas

GEMM = "GEMM"

CASES = (
    Case(12, 64, 4, 32),
    Case(16, 256, 6, 64),
    Case(2, 1024, 4, 32),
    Case(1, 4096, 8, 64),
    Case(2, 1024, 4, 32, causal=False),
)


class Ours:
    """The pair of the op `attention`, called on arrays; the problem is made once."""

    def __init__(self, case: Case) -> None:
        self._q, self._k, self._v, self._dout = case.inputs().values()
        self._dlse = np.zeros(self._q.shape[:3], np.float32)
        self._problem = make_problem("attention", self._q, self._k, self._v, case.mask(), is_causal=case.causal)

    def forward(self) -> tuple[Any, Any]:
        return OPS["attention"].forward(self._q, self._k, self._v, problem=self._problem)

    def both(self) -> dict[str, np.ndarray]:
        (out, _), saved = self.forward()
        dq, dk, dv, _ = OPS["attention"].backward((self._dout, self._dlse), saved)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    def time(self, passes: str, count: int) -> list[float]:
        return timed(self.forward if passes == "forward" else self.both, count)


def run(
    *,
    rounds: int = 10,
    backend: str | None = None,
    device: str = "cpu",
    cases: Sequence[Case] | None = None,
    json_path: str | Path | None = None,
    plot_path: str | Path | None = None,
) -> dict[str, Any]:
    """Time attention of every case, ours and torch's in turns, print a table, return the figures.

    Ours is served by `backend`, or by what serves everybody. Work is counted as 4 B H T S D forward, half of
    that if causal, and 2.5 times as much backward; it is set against the rate of a square matrix product on
    all threads, measured in the same rounds. Raises `ConfigError` for a count below 1 or a backend that
    attention lacks, `GradientError`, before anything is timed, if ours and torch's results differ.

    On another `device`, see `gpu_attention`: its own cases, clock and peers.
    """
    facts = start("bench attention", plot_path, rounds=rounds)
    device = resolve_device("bench attention", device)
    if device != "cpu":
        return _on_a_device(device, facts, rounds, backend, cases, json_path, plot_path)
    cases = CASES if cases is None else cases
    with kernels.use_backend(backend) if backend is not None else nullcontext():
        served = kernels.serve("attention").__name__.rpartition(".")[2]
        with Workers(get_num_threads()) as workers, ExitStack() as stack:
            torches = peer.of_each_policy(stack)
            square = Square(workers)
            measured = {case.name: _measure(case, torches, square, rounds) for case in cases}
    figures: dict[str, Any] = {
        "what": "attention",
        "machine": facts,
        "backend": served,
        "rounds": rounds,
        "unit": "GFLOP/s",
        "cases": measured,
    }
    groups = {
        f"{case}\n{passes}": {name: side["gflops"] for name, side in of_pass["sides"].items()}
        for case, passed in measured.items()
        for passes, of_pass in passed.items()
    }
    return publish(figures, _text(measured, served), groups=groups, json_path=json_path, plot_path=plot_path)


def _on_a_device(
    device: str,
    facts: dict[str, Any],
    rounds: int,
    backend: str | None,
    cases: Sequence[Case] | None,
    json_path: str | Path | None,
    plot_path: str | Path | None,
) -> dict[str, Any]:
    if backend is not None:
        problem = f"backend is {shown(backend)}, and on {device!r} there is only one"
        raise ConfigError("bench attention", problem, "Leave out --backend")
    found = gpu_attention.measure(device, gpu_attention.CASES if cases is None else cases, rounds)
    figures = {"what": "attention", "machine": facts, "device": device, "rounds": rounds, "unit": "TFLOP/s", **found}
    groups = {
        f"{case}\n{passes}": {name: side["tflops"] for name, side in of_case[passes]["sides"].items()}
        for case, of_case in found["cases"].items()
        for passes in PASSES
    }
    text = gpu_attention.text_of(found)
    return publish(figures, text, groups=groups, json_path=json_path, plot_path=plot_path)


def _measure(case: Case, torches: Mapping[str, peer.Peer], square: Square, rounds: int) -> dict[str, Any]:
    ours = Ours(case)
    for torch in torches.values():
        torch.make("attention", case=case, threads=get_num_threads())
    for torch in list(torches.values())[:1]:
        check(case, ours.both(), torch)
    timers: dict[str, Callable[[str, int], list[float]]] = {
        OURS: ours.time,
        **{name: partial(_ask, torch) for name, torch in torches.items()},
    }
    sides = {(name, passes): paced(partial(time, passes)) for name, time in timers.items() for passes in PASSES}
    rates: list[list[float]] = []

    def multiply(block: int) -> list[float]:
        with single_threaded_blas():
            rates.append(square.rates())
        return rates[-1]

    results = alternate(f"bench attention, {case.name}", {**sides, (GEMM, ""): multiply}, rounds)
    machine = spread(np.concatenate(rates[1:]))
    found = {}
    for passes, factor in PASSES.items():
        seconds = {name: results[name, passes] for name in timers}
        found[passes] = {
            "sides": {name: _figures(blocks, factor * case.flops, machine) for name, blocks in seconds.items()},
            "machine_gflops": machine,
            **compare(seconds),
        }
    return found


def _ask(torch: peer.Peer, passes: str, count: int) -> list[float]:
    seconds: list[float] = torch.call("time", passes=passes, count=count)
    return seconds


def _figures(blocks: list[list[float]], flops: float, machine: Spread) -> dict[str, Any]:
    rates = spread(flops / np.concatenate(blocks[1:]) / 1e9)
    return {"ms": milliseconds(blocks), "gflops": rates, "percent_of_gemm": 100 * rates["median"] / machine["median"]}


def _text(measured: dict[str, Any], served: str) -> str:
    names = list(next(iter(next(iter(measured.values())).values()))["sides"])
    header = ["ms", *names, "ours over the faster", "GFLOP/s", "of GEMM"]
    rows = []
    for case, passed in measured.items():
        for passes, found in passed.items():
            mine = found["sides"][OURS]
            rows.append(
                [
                    f"{case}, {passes}",
                    *(f"{found['sides'][name]['ms']['median']:.2f}" for name in names),
                    f"{found['ratio']:.2f}" if "ratio" in found else "",
                    f"{mine['gflops']['median']:.1f}",
                    f"{mine['percent_of_gemm']:.0f} %",
                ]
            )
    return f"{table(header, rows)}\n{OURS} is served by {served!r}"
