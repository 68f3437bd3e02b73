"""The manners of a forward and backward: no write, no alias, the same bits twice, any memory layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minitransformer.errors import MiniTransformerError
from minitransformer.gradients.function import Problem, copies

_FACTOR = 128.0  # a power of two: multiplying by it rounds nothing
# What functions raise for arrays that are locked or laid out in another way.
_REFUSALS = (MiniTransformerError, TypeError, ValueError, RuntimeError)
_STRIDED = "read-only arrays in Fortran's order, with gaps, backwards,"


class Run(NamedTuple):
    """One forward and backward: what they were given, and what came out."""

    inputs: Sequence[Any]
    outs: Sequence[np.ndarray]
    douts: Sequence[np.ndarray]
    gradients: Sequence[Any]


def complaints(
    problem: Problem, douts: Sequence[np.ndarray], run: Run, tolerance: float, atol: float | None
) -> Iterator[str]:
    """What the function of `problem` does that it should not; nothing if it behaves.

    `run` was given copies of the problem's inputs and of `douts`. `tolerance` is how far results may differ in
    another layout, `atol` the absolute part of what a gradient may be wrong by,
    None if they are not to be held to be linear.
    """
    function = problem.function
    again_outs, again = function.pull(*copies(problem.inputs))
    gradients, scaled = again(copies(douts)), again([_FACTOR * d for d in douts])
    # One backward for two questions: as a rule the bits agree.
    scales = all(g is None or _same(s, _FACTOR * g) for s, g in zip(scaled, gradients, strict=True))
    once_more = gradients if scales else again(copies(douts))
    inputs, outs, given, first = run
    for name, x, before in zip(function.names, inputs, problem.inputs, strict=False):
        if isinstance(x, np.ndarray) and not _same(x, before):
            yield f"the input {name} was written to"
    for number, (d, before) in enumerate(zip(given, douts, strict=True)):
        if not _same(d, before):
            yield f"the upstream gradient of output {number} was written to"
    if not all(map(_same, outs, again_outs)):
        yield "two runs give different outputs: it depends on something else than its inputs"
    elif not all(map(_same, first, gradients)):
        yield "two runs give different gradients: backward depends on something else than its inputs"
    elif not all(map(_same, gradients, once_more)):
        yield "a second backward of the same forward gives other gradients: the first one changed what was saved"
    elif not scales and atol is not None:
        yield from _nonlinear(problem, gradients, scaled, atol)
    if function.in_place:
        yield from _aliases(problem, first, (("an upstream gradient", given), ("an input", inputs)))
        yield from _layout(problem, douts, outs, first, tolerance)


def _nonlinear(problem: Problem, gradients: Sequence[Any], scaled: Sequence[Any], atol: float) -> Iterator[str]:
    """Many times the upstream gradient gives as many times the gradient: nothing in between is clipped."""
    for position in problem.wanted:
        g, s = gradients[position], scaled[position]
        slack = _FACTOR * atol + 0.1 * float(abs(g).max(initial=0.0))
        if not np.allclose(s, _FACTOR * g, rtol=1e-3, atol=slack):
            yield f"the gradient of {problem.function.names[position]} is not linear in the upstream gradient"


def _aliases(problem: Problem, gradients: Sequence[Any], others: Any) -> Iterator[str]:
    arrays = [
        (f"d{n}", g) for n, g in zip(problem.function.names, gradients, strict=False) if isinstance(g, np.ndarray)
    ]
    for number, (name, g) in enumerate(arrays):
        for other, h in arrays[:number]:
            if np.shares_memory(g, h):
                yield f"{name} and {other} share memory: writing into one changes the other"
        for what, group in others:
            if any(isinstance(x, np.ndarray) and np.shares_memory(g, x) for x in group):
                yield f"{name} shares memory with {what}"


def _layout(
    problem: Problem,
    douts: Sequence[np.ndarray],
    outs: Sequence[np.ndarray],
    gradients: Sequence[Any],
    tolerance: float,
) -> Iterator[str]:
    """The same numbers in another layout must give the same results, up to rounding."""
    try:
        inputs = tuple(_strided(x) if isinstance(x, np.ndarray) else x for x in problem.inputs)
        other_outs, pullback = problem.function.pull(*inputs)
        other = pullback([_strided(d) for d in douts])
    except _REFUSALS as error:
        yield f"it refuses {_STRIDED} ({type(error).__name__}: {error})"
        return
    if not all(close(a, b, tolerance) for a, b in zip(other_outs, outs, strict=True)):
        yield f"{_STRIDED} give other outputs"
    elif not all(close(a, b, tolerance) for a, b in zip(other, gradients, strict=True)):
        yield f"{_STRIDED} give other gradients"


def _strided(x: np.ndarray) -> np.ndarray:
    """`x` in another layout, the one of `_STRIDED`."""
    if x.ndim == 0:
        view = x.copy()
    else:
        view = np.full((2 * x.shape[-1], *x.shape[-2::-1]), 77).astype(x.dtype)[::-2].T
        view[...] = x
    view.flags.writeable = False
    return view


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return a is b or bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two results agree, up to `tolerance` relative to the largest number; None only with None."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if np.array_equal(a, b):  # as a rule, and much cheaper to find out
        return True
    scale = float(np.max(abs(b), where=np.isfinite(b), initial=1.0))
    return bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
