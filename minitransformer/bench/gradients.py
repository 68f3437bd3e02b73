"""`minitransformer bench gradcheck`: the time of a gradient check, beside `torch.autograd.gradcheck`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitransformer import functional as F
from minitransformer import nn
from minitransformer.autograd import Tensor
from minitransformer.bench import peer
from minitransformer.bench.report import describe, machine, progress, table
from minitransformer.checks import check_count
from minitransformer.errors import require
from minitransformer.files import write_json
from minitransformer.gradients import gradcheck
from minitransformer.random import manual_seed
from minitransformer.threads import single_threaded_blas

MODES = ("full", "directional")


class Case(NamedTuple):
    """One function, ours and torch's, and the shapes of its float64 inputs."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Tensor]
    torch: Callable[[Any], Callable[..., Any]]  # of the module torch


CASES = (
    Case("matmul", ((3, 4), (4, 2)), lambda a, b: a @ b, lambda torch: lambda a, b: a @ b),
    Case("softmax", ((3, 4),), lambda x: F.softmax(x, -1), lambda torch: lambda x: torch.softmax(x, -1)),
    Case("gelu", ((3, 4),), F.gelu, lambda torch: torch.nn.functional.gelu),
    Case(
        "layer_norm",
        ((2, 4), (4,), (4,)),
        lambda x, w, b: F.layer_norm(x, 4, w, b),
        lambda torch: lambda x, w, b: torch.nn.functional.layer_norm(x, (4,), w, b),
    ),
    Case("linear", ((3, 4), (2, 4), (2,)), F.linear, lambda torch: torch.nn.functional.linear),
    Case(
        "attention",
        ((1, 2, 3, 2),) * 3,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda torch: lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    ),
)


class EncoderDecoder(nn.Module):
    """Two composed layers of each kind; every parameter is checked."""

    def __init__(self) -> None:
        self.encoder = [nn.EncoderLayer(16, 2, 32, dropout_rate=0.0) for _ in range(2)]
        self.decoder = [nn.DecoderLayer(16, 2, 32, dropout_rate=0.0) for _ in range(2)]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        for layer in self.encoder:
            source = layer(source)
        for cross in self.decoder:
            target = cross(target, source)
        return target


def run(*, rounds: int = 20, json_path: str | Path | None = None) -> dict[str, Any]:
    """Time one check of each function in both modes, ours and torch's in turn; print a table, return the figures.

    torch's "directional" is its `fast_mode`. The last line is a check of a whole encoder-decoder, which has
    no counterpart. `json_path` gets the figures as JSON.
    """
    check_count("bench gradcheck", "rounds", rounds, least=1)
    facts = machine()
    torch = require("torch", extra="peers", purpose="bench gradcheck") if peer.installed() else None
    if torch is not None:
        torch.set_num_threads(1)
    checks = _checks(torch)
    seconds: dict[str, list[float]] = {name: [] for name in checks}
    with single_threaded_blas(), progress(rounds + 1, "bench gradcheck", "round") as advance:
        for _ in range(rounds + 1):
            for name, check in checks.items():
                started = time.perf_counter()
                check()
                seconds[name].append(time.perf_counter() - started)
            advance()
        started = time.perf_counter()
        compared = _check_model()
        whole = time.perf_counter() - started
    medians = {name: 1000 * float(np.median(times[1:])) for name, times in seconds.items()}  # the first warms up
    figures = {"what": "gradcheck", "machine": facts, "rounds": rounds, "median_ms": medians}
    figures["encoder_decoder"] = {"seconds": whole, "compared": compared}
    print(describe(facts))
    print(_table(medians))
    print(f"encoder-decoder, 2 + 2 layers, every parameter, directional: {whole:.1f} s, {compared} products compared")
    if torch is None:
        print(f"PyTorch is not installed, so there is nothing to compare with. {peer.INSTALL}")
    if json_path is not None:
        write_json(Path(json_path), figures)
    return figures


def _checks(torch: Any) -> dict[str, Callable[[], object]]:
    """What is timed, by "case, mode, side"; `torch` may be None."""
    rng = np.random.default_rng(0)
    checks: dict[str, Callable[[], object]] = {}
    for case in CASES:
        inputs = tuple(rng.standard_normal(shape) for shape in case.shapes)
        for mode in MODES:
            checks[f"{case.name}, {mode}, ours"] = _ours(case, inputs, mode)
            if torch is not None:
                checks[f"{case.name}, {mode}, torch"] = _theirs(torch, case, inputs, mode)
    return checks


def _ours(case: Case, inputs: tuple[np.ndarray, ...], mode: str) -> Callable[[], object]:
    return lambda: gradcheck(case.ours, inputs, mode=mode)


def _theirs(torch: Any, case: Case, inputs: tuple[np.ndarray, ...], mode: str) -> Callable[[], object]:
    function, tensors = case.torch(torch), tuple(torch.tensor(x, requires_grad=True) for x in inputs)
    return lambda: torch.autograd.gradcheck(function, tensors, fast_mode=mode == "directional")


def _check_model() -> int:
    manual_seed(0)
    model = EncoderDecoder()
    model.to("float64")
    rng = np.random.default_rng(0)
    return gradcheck(model, (rng.standard_normal((2, 5, 16)), rng.standard_normal((2, 4, 16)))).compared


def _table(medians: dict[str, float]) -> str:
    sides = [side for side in ("ours", "torch") if f"{CASES[0].name}, full, {side}" in medians]
    header = ["ms per check", *(f"{mode}, {side}" for mode in MODES for side in sides)]
    rows = [
        [case.name, *(f"{medians[f'{case.name}, {mode}, {side}']:.1f}" for mode in MODES for side in sides)]
        for case in CASES
    ]
    means = [
        f"{np.mean([medians[f'{case.name}, {mode}, {side}'] for case in CASES]):.1f}"
        for mode in MODES
        for side in sides
    ]
    return table(header, [*rows, ["mean", *means]])
