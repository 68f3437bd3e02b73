"""Users' mask and score functions, evaluated in NumPy: the specification of the kernels that compile them.

A `mask_mod(b, h, q, k, *buffers) -> bool` says whether query q may attend to key k, a
`score_mod(score, b, h, q, k, *buffers) -> score` changes a score before the softmax. Both are plain
Python about one cell. Code that also works on arrays (`&`, `np.tanh`) is called once for all cells;
scalar code (`if`, `and`, `math.tanh`), which arrays refuse, is called cell by cell with NumPy scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitransformer.errors import AllocationError, DTypeError, GradientError, ShapeError

Mod = Callable[..., Any]
Cells = tuple[np.ndarray, ...]  # the indices b, h, q and k of chosen cells

STEP = 2.0**-66  # 1e-20: its square is below every float64, so the complex step has no truncation error
_SAMPLES = 16
_GRADIENT_FIX = "In score_mod use numpy.tanh (not math.tanh) and its like, or give score_mod_grad"


def evaluate_mask(mask_mod: Mod, B: int, H: int, T: int, S: int, buffers: Sequence[Any] = ()) -> np.ndarray:
    """Which cells `mask_mod` allows: bool (B, H, T, S), read-only.

    A view that broadcasts over the axes that an array-style function does not look at. Raises
    `DTypeError` for results that are not bool and `ShapeError` for results that are not one per cell;
    what `mask_mod` itself raises surfaces as it is.
    """
    try:
        b, h, q, k = np.ogrid[:B, :H, :T, :S]
        return np.broadcast_to(evaluate_mask_at(mask_mod, b, h, q, k, buffers), (B, H, T, S))
    except MemoryError as error:
        problem = f"B={B}, H={H}, T={T}, S={S} are too many cells ({error})"
        raise AllocationError(name_of(mask_mod), problem, "Choose smaller sizes") from error


def evaluate_mask_at(mask_mod: Mod, b: Any, h: Any, q: Any, k: Any, buffers: Sequence[Any] = ()) -> np.ndarray:
    """`evaluate_mask` at chosen cells: bool, broadcastable to the common shape of the int64 indices."""
    result = _evaluate("mask_mod", mask_mod, (b, h, q, k), buffers, np.dtype(bool))
    if result.dtype != bool:
        raise DTypeError(
            "mask_mod",
            f"{name_of(mask_mod)} returned {_kind(result)}, expected bool",
            "Return a comparison, as in `q - k < 3`",
        )
    return result


def evaluate_score(score_mod: Mod, scores: np.ndarray, buffers: Sequence[Any] = ()) -> np.ndarray:
    """`score_mod` of real or complex scores (B, H, T, S), as a new array of their shape and dtype.

    Raises `DTypeError` for results that are not such numbers and `ShapeError` for results that are not
    one per cell; what `score_mod` itself raises surfaces as it is.
    """
    grids = np.ogrid[tuple(slice(n) for n in scores.shape)]
    return scores_at(score_mod, scores, grids, buffers)


def score_derivative(score_mod: Mod, scores: np.ndarray, buffers: Sequence[Any] = ()) -> np.ndarray:
    """d score_mod / d score at real scores (B, H, T, S), as a new array of their shape and dtype.

    By complex step in float64: f'(x) = Im f(x + ih) / h, exact to rounding, and one-sided at kinks.
    Code that drops the imaginary part would silently get 0, so some cells are compared with differences.
    Raises `GradientError` where they disagree and for functions that refuse complex numbers.
    """
    if scores.dtype.kind == "c":
        raise GradientError("score_mod", "complex scores have no complex step", "Use real queries and keys")
    grids = np.ogrid[tuple(slice(n) for n in scores.shape)]
    derivative = derivative_at(score_mod, scores, grids, buffers)
    cells = cells_to_check(scores.shape)
    check_derivative(score_mod, scores[cells], cells, lambda x, chosen: derivative[chosen], buffers)
    with np.errstate(all="ignore"):
        return derivative.astype(scores.dtype)


def derivative_at(
    score_mod: Mod, scores: np.ndarray, cells: Sequence[np.ndarray], buffers: Sequence[Any]
) -> np.ndarray:
    """The complex step of scores of chosen cells, float64; `GradientError` if the function refuses complex numbers."""
    try:
        stepped = scores_at(score_mod, scores.astype(np.complex128) + 1j * STEP, cells, buffers)
    except (TypeError, np.exceptions.ComplexWarning) as error:
        raise GradientError(
            "score_mod",
            f"{name_of(score_mod)} cannot be differentiated by complex step ({type(error).__name__}: {error})",
            _GRADIENT_FIX,
        ) from error
    return stepped.imag / STEP


def cells_to_check(shape: tuple[int, ...]) -> Cells:
    """Some cells, spread evenly, whose scores `check_derivative` chooses from."""
    size = math.prod(shape)
    return np.unravel_index(np.linspace(0, size - 1, min(size, 1024)).astype(np.int64), shape)


def check_derivative(
    score_mod: Mod,
    scores: np.ndarray,
    cells: Cells,
    derivative: Callable[[np.ndarray, Cells], np.ndarray],
    buffers: Sequence[Any],
) -> None:
    """Compare `derivative(scores, cells)` with differences at a few of these cells.

    They are evenly spaced by rank from the lowest to the highest score. A cell speaks against the derivative only if
    the function is smooth there, its two one-sided differences being equal: at a kink, a jump or a strong bend the
    differences are no evidence.
    """
    chosen = np.flatnonzero(np.isfinite(scores))
    if not chosen.size:
        return
    chosen = chosen[np.argsort(scores[chosen], kind="stable")]
    chosen = chosen[np.linspace(0, chosen.size - 1, min(chosen.size, _SAMPLES)).astype(np.int64)]
    cells = tuple(axis[chosen] for axis in cells)
    found = derivative(scores[chosen], cells)
    x = scores[chosen].astype(np.float64)
    h = 1e-6 * np.maximum(1, abs(x))
    with np.errstate(all="ignore"):
        low, middle, high = (scores_at(score_mod, at, cells, buffers) for at in (x - h, x, x + h))
        left, right = (middle - low) / h, (high - middle) / h
        noise = 64 * np.finfo(np.float64).eps * np.maximum(abs(low), abs(high)) / h
        smooth = abs(right - left) <= 0.01 * np.maximum(abs(left), abs(right)) + noise
        central = (left + right) / 2
        agrees = abs(central - found) <= 0.02 * np.maximum(abs(central), abs(found)) + noise
        for i in np.flatnonzero(smooth & ~agrees)[:1]:
            raise GradientError(
                "score_mod",
                f"the complex step of {name_of(score_mod)} gives the derivative {found[i]:.6g} at score "
                f"{x[i]:.6g}, expected {central[i]:.6g} as by central differences; abs, .real, float() and the "
                "functions of math drop the imaginary part",
                _GRADIENT_FIX,
            )


def scores_at(score_mod: Mod, scores: np.ndarray, cells: Sequence[np.ndarray], buffers: Sequence[Any]) -> np.ndarray:
    """`score_mod` of scores of chosen cells: their indices b, h, q and k broadcast to the shape of the scores."""
    result = _evaluate("score_mod", score_mod, (scores, *cells), buffers, scores.dtype)
    if result.dtype.kind not in ("iufc" if scores.dtype.kind == "c" else "iuf"):
        raise DTypeError(
            "score_mod",
            f"{name_of(score_mod)} returned {_kind(result)}, expected {scores.dtype} as its scores",
            "Return the changed score",
        )
    out = np.empty(scores.shape, scores.dtype)  # never a view of a buffer
    with np.errstate(all="ignore"):
        out[...] = result
    return out


def _evaluate(op: str, mod: Mod, arguments: Sequence[Any], buffers: Sequence[Any], dtype: np.dtype) -> np.ndarray:
    """mod(*arguments, *buffers) for every cell of the arguments' common shape, itself or broadcastable to it.

    Arguments of one element are passed as NumPy scalars: arrays of one element are accepted by some
    scalar code and not by other. Overflow and division by zero give infinity and NaN, as in a kernel.
    """
    arguments = [np.asarray(x) for x in arguments]
    shape = np.broadcast_shapes(*(x.shape for x in arguments))
    if 0 in shape:
        return np.empty(shape, dtype)
    with np.errstate(all="ignore"):
        try:
            # Copies, because array-style code may write into what it is given (`score *= 2`).
            result = np.array(mod(*(x.reshape(-1)[0] if x.size == 1 else x.copy() for x in arguments), *buffers))
            refused = False
        except (TypeError, ValueError):
            refused = True
        if refused:
            views = [np.broadcast_to(x, shape) for x in arguments]
            values = [mod(*cell, *buffers) for cell in zip(*(v.flat for v in views), strict=True)]
    if refused:
        if any(np.ndim(value) for value in values):
            raise ShapeError(
                op, f"{name_of(mod)} returned an array for one cell, expected one value", "Return a scalar"
            )
        return np.array(values).reshape(shape)
    fits = result.ndim in (0, len(shape)) and all(n in (1, size) for n, size in zip(result.shape, shape, strict=False))
    if not fits:
        raise ShapeError(
            op,
            f"{name_of(mod)} returned shape {result.shape}, expected one that broadcasts to {shape}",
            "Compute every cell from its own indices, without reductions or reshapes",
        )
    return result


def name_of(mod: Mod) -> str:
    return getattr(mod, "__name__", type(mod).__name__)


def _kind(result: np.ndarray) -> str:
    """What a function returned, in words: a dtype, or the type of what is no number."""
    return str(result.dtype) if result.dtype.kind in "biufc" else type(result.flat[0]).__name__
