"""`check_laws`: run the laws over an attention function."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from minitransformer.checks import check_count
from minitransformer.errors import ConfigError, MiniTransformerError, NonFiniteError, nearest
from minitransformer.testing.adapters import Attention, as_attention
from minitransformer.testing.laws.law import Law
from minitransformer.testing.laws.report import LawReport, Verdict
from minitransformer.testing.laws.table import ALL
from minitransformer.testing.laws.trial import Trial, Violation


class LawError(MiniTransformerError, AssertionError):
    """A function that nothing can be said of: it forgets, or writes into its inputs."""


def check_laws(fn: Any, laws: Iterable[Law | str] = ALL, max_examples: int = 100) -> LawReport:
    """Hold an attention function to the laws of attention, on problems that Hypothesis draws and shrinks.

    `fn` is an `adapters.Attention` (`adapters.ours()`, `torch_sdpa()`, `jax_sdpa()`, `attention(fn, framework)`,
    `numpy_function(forward, backward)`) or a function fn(q, k, v, **options) on NumPy arrays (B, H, T, D), with
    options named as in `F.scaled_dot_product_attention`. A law that needs more than it supports is reported as not
    applicable, with the reason. Runs are deterministic: the same function gives the same report.

    Before any law, one call is looked at: `ShapeError` for another layout, `DTypeError` for another dtype than that
    of the inputs, `NonFiniteError` for NaN, `LawError` for a function that gives different results for the same
    inputs or writes to them. What the function itself raises there is passed on; within a law it fails the law.
    """
    attention = as_attention(fn)
    chosen = [_law_of(x) for x in laws]
    if not chosen:
        raise ConfigError("check_laws", "there is no law to check", "Leave `laws` out for all of them")
    max_examples = check_count("check_laws", "max_examples", max_examples, least=1)
    _probe(attention)
    verdicts = [_judge(attention, law, max_examples) for law in chosen]
    return LawReport(f"{attention.name}, {attention.dtype}", verdicts)


def _law_of(x: Any) -> Law:
    if isinstance(x, Law):
        return x
    known = {law.name: law for law in ALL}
    if x not in known:
        raise ConfigError("check_laws", f"there is no law {x!r}", nearest(str(x), known))
    return known[x]


def _judge(attention: Attention, law: Law, max_examples: int) -> Verdict:
    bitwise = law.name in attention.bitwise
    sense = "bits" if bitwise else "rounding"
    if lacking := law.lacking(attention):
        return Verdict(law, "not applicable", sense, reason=lacking)
    examples = compared = 0
    smallest: Verdict | None = None

    # Quiet, and the same every time: nothing is printed, stored or read but the report.
    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def hold(data: st.DataObject) -> None:
        nonlocal examples, compared, smallest
        trial = Trial(attention, bitwise, data.draw)
        try:
            law.check(trial)
        except Violation as violation:
            # The last one is the smallest: Hypothesis runs it once more when it has done shrinking.
            smallest = Verdict(law, "failed", sense, reason=str(violation), calls=tuple(trial.calls))
            raise
        examples, compared = examples + 1, compared + trial.compared

    try:
        hold()
    except Violation:
        assert smallest is not None
        return smallest
    if not compared:
        return Verdict(law, "failed", sense, examples, reason=f"nothing was compared in {examples} examples")
    return Verdict(law, "held", sense, examples, compared)


def _probe(attention: Attention) -> None:
    """One call whose sizes all differ, so that no other layout can pass for the right one."""
    T, S, D = 3, 5 if "cross" in attention.supports else 3, 4
    Dv = 7 if "value_width" in attention.supports else D
    rng = np.random.default_rng(0)
    shapes = (2, 6, T, Dv), (2, 6, T, D), (2, 6, S, D), (2, 6, S, Dv)
    dout, q, k, v = arrays = [rng.standard_normal(shape).astype(attention.dtype) for shape in shapes]
    before = [x.copy() for x in arrays]

    def once() -> list[np.ndarray]:
        return [attention(q, k, v), *(attention.gradients(dout, q, k, v) if attention.pull else ())]

    first, second = once(), once()
    for what, x in zip(("output", "output", "dq", "dk", "dv"), first, strict=False):
        if not np.isfinite(x).all():
            problem = f"the {what} holds NaN or infinity for small random inputs"
            raise NonFiniteError(attention.name, problem, "No law can be looked at before that is cured")
    if any((a != b).any() for a, b in zip(first, second, strict=True)):
        problem = "two calls with the same inputs give different results"
        raise LawError(attention.name, problem, "Take dropout and other randomness out, or give it a seed")
    for what, x, y in zip(("dout", "q", "k", "v"), arrays, before, strict=True):
        if (x != y).any():
            raise LawError(attention.name, f"it writes into its input {what}", "Work on a copy")
