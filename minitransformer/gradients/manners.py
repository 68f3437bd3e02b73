"""The manners of a forward and backward: no write, no alias, the same bits twice, any memory layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minitransformer.errors import MiniTransformerError
from minitransformer.gradients.function import Problem, copies

# What functions raise for arrays that are locked or laid out in another way.
_REFUSALS = (MiniTransformerError, TypeError, ValueError, RuntimeError)


class Run(NamedTuple):
    """One forward and backward: what they were given, and what came out."""

    inputs: Sequence[Any]
    outs: Sequence[np.ndarray]
    douts: Sequence[np.ndarray]
    gradients: Sequence[Any]


def complaints(problem: Problem, douts: Sequence[np.ndarray], run: Run, tolerance: float) -> Iterator[str]:
    """What the function of `problem` does that it should not; nothing if it behaves.

    `run` was given copies of the problem's inputs and of `douts`.
    """
    function = problem.function
    again_outs, again = function.pull(*copies(problem.inputs))
    gradients, once_more = again(copies(douts)), again(copies(douts))
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
    if function.in_place:
        yield from _aliases(problem, first, (("an upstream gradient", given), ("an input", inputs)))
        for layout in (_strided, _fortran):
            yield from _layout(problem, douts, layout, outs, first, tolerance)


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
    layout: Callable[[np.ndarray], np.ndarray],
    outs: Sequence[np.ndarray],
    gradients: Sequence[Any],
    tolerance: float,
) -> Iterator[str]:
    """The same numbers in another layout must give the same results, up to rounding."""
    what = (layout.__doc__ or "").partition(".")[0].lower()
    try:
        inputs = tuple(layout(x) if isinstance(x, np.ndarray) else x for x in problem.inputs)
        other_outs, pullback = problem.function.pull(*inputs)
        other = pullback([layout(d) for d in douts])
    except _REFUSALS as error:
        yield f"it refuses {what} ({type(error).__name__}: {error})"
        return
    if not all(_close(a, b, tolerance) for a, b in zip(other_outs, outs, strict=True)):
        yield f"{what} give other outputs"
    elif not all(_close(a, b, tolerance) for a, b in zip(other, gradients, strict=True)):
        yield f"{what} give other gradients"


def _strided(x: np.ndarray) -> np.ndarray:
    """Read-only arrays with gaps, backwards in memory."""
    view = x.copy()
    if x.ndim:
        view = np.full((*x.shape[:-1], 2 * x.shape[-1]), 77).astype(x.dtype)[..., ::-2]
        view[...] = x
    view.flags.writeable = False
    return view


def _fortran(x: np.ndarray) -> np.ndarray:
    """Read-only arrays in Fortran's order."""
    view = x.copy("F")
    view.flags.writeable = False
    return view


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return a is b or bool(a == b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _close(a: Any, b: Any, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    scale = float(np.max(abs(b), where=np.isfinite(b), initial=1.0)) if b.size else 1.0
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True))
