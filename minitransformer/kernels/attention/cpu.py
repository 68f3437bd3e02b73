"""Attention in Numba: see `forward.py` and `backward.py`. The same functions as `reference.py`.

The arrays T x S of scores and weights are never made, except where they are what is asked for (`weights_forward`,
`weights_backward`). A `score_mod` is compiled when it is first seen, see `user_code.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minitransformer.kernels.attention import backward as _backward
from minitransformer.kernels.attention import forward as _forward
from minitransformer.kernels.attention import reference
from minitransformer.kernels.attention.few import merge, parts_of
from minitransformer.kernels.attention.layout import BackwardLayouts, Layouts, lay_out
from minitransformer.kernels.attention.mods import Cells, cells_to_check, check_derivative
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.reference import Gradients, allowed, weights_backward, weights_forward
from minitransformer.kernels.attention.rules import Sizes, reach_of, rules_of
from minitransformer.kernels.attention.user_code import Refusal, tile_code
from minitransformer.kernels.entrance import entrance
from minitransformer.kernels.simd import REGISTER_BITS
from minitransformer.kernels.simd.tiles import LINE
from minitransformer.threads import split

__all__ = ["allowed", "backward", "forward", "weights_backward", "weights_forward"]

_SMALL = 1_000_000  # multiplications of a forward, a tenth of a millisecond


@entrance(reference, "BHTD~", "BKSD~", "BKSE~", "*", "BHTE~!")
def forward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    out: np.ndarray | None,
    problem: Problem,
) -> tuple[np.ndarray, np.ndarray]:
    """out (B, H, T, E) and lse (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    sizes = _sizes(q, v)
    code = tile_code(problem, (*q.shape[:3], sizes.S), q.dtype, slopes=False)
    if isinstance(code, Refusal):
        return code.served(reference.forward(q, k, v, bias, out, problem))
    rules = rules_of(problem, bias, sizes, q.dtype, code)
    kernel = _forward.plain if rules is None else _forward.ruled
    if out is None:
        out = np.empty((*q.shape[:3], sizes.E), q.dtype)
    lse = np.empty(q.shape[:3], q.dtype)
    parts = parts_of(sizes)
    part_outs, part_lses = out, lse
    if parts > 1:
        part_outs, part_lses = (np.empty((parts * sizes.B, *x.shape[1:]), x.dtype) for x in (out, lse))
    memory, layouts = zip(*map(lay_out, (q, k, v, part_outs)), strict=True)
    arrays = *memory, part_lses.reshape(-1), Layouts(*layouts)
    settings = reach_of(problem), sizes, float(problem.scale), rules, parts

    def run(begin: int, stop: int) -> None:
        kernel(*_scratch(_forward.scratch_size, sizes, q.dtype), *arrays, *settings, begin, stop)

    _split(sizes, parts, run)
    if parts > 1:
        merge(part_outs.reshape(parts, *out.shape), part_lses.reshape(parts, *lse.shape), out, lse)
    if code is not None and code.failed[0]:  # it raises in Python too, where it can be seen
        return reference.forward(q, k, v, bias, out, problem)
    return out, lse


@entrance(reference, "BHTE~", "BHT", "BHTD~", "BKSD~", "BKSE~", "*", "BHTE~", "BHT", "BHTD~!", "BKSD~!", "BKSE~!")
def backward(
    dout: np.ndarray,
    dlse: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    out: np.ndarray,
    lse: np.ndarray,
    dq: np.ndarray | None,
    dk: np.ndarray | None,
    dv: np.ndarray | None,
    problem: Problem,
) -> Gradients:
    """dq, dk, dv and, if there is a bias, dbias (B, H, T, S)."""
    sizes = _sizes(q, v)
    shape = *q.shape[:3], sizes.S
    code = tile_code(problem, shape, q.dtype, slopes=True)
    if isinstance(code, Refusal):
        return code.served(reference.backward(dout, dlse, q, k, v, bias, out, lse, dq, dk, dv, problem))
    if code is not None and problem.score_mod is not None and problem.score_mod_grad is None:
        cells = cells_to_check(shape)
        check_derivative(problem.score_mod, _scores_of(q, k, problem, cells), cells, code.slopes_at, problem.buffers)
    rules = rules_of(problem, bias, sizes, q.dtype, code)
    kernel = _backward.plain if rules is None else _backward.ruled
    targets: Any = zip((dq, dk, dv), (q, k, v), strict=True)
    dq, dk, dv = (np.empty(x.shape, x.dtype) if target is None else target for target, x in targets)
    # What is never computed has no gradient.
    dbias = np.zeros((*q.shape[:3], sizes.S) if bias is not None else 0, q.dtype)
    memory, layouts = zip(*map(lay_out, (q, k, v, out, dout, dq, dk, dv)), strict=True)
    arrays = *memory, dlse.reshape(-1), lse.reshape(-1), dbias.reshape(-1), BackwardLayouts(*layouts)
    settings = reach_of(problem), sizes, float(problem.scale), rules

    def run(begin: int, stop: int) -> None:
        kernel(*_scratch(_backward.scratch_size, sizes, q.dtype), *arrays, *settings, begin, stop)

    _split(sizes, 1, run)
    if code is not None and code.failed[0]:
        return reference.backward(dout, dlse, q, k, v, bias, out, lse, dq, dk, dv, problem)
    return Gradients(dq, dk, dv, None if bias is None else dbias)


def _scores_of(q: np.ndarray, k: np.ndarray, problem: Problem, cells: Cells) -> np.ndarray:
    """What the `score_mod` is given at chosen cells."""
    b, h, t, s = cells
    group = q.shape[1] // k.shape[1]
    with np.errstate(all="ignore"):  # what is not finite is not checked
        scores = np.einsum("nd,nd->n", q[b, h, t], k[b, h // group, s]) * q.dtype.type(problem.scale)
        if problem.softcap:
            scores = problem.softcap * np.tanh(scores / problem.softcap)
    if problem.alibi_slopes is not None:
        offset = np.broadcast_to(problem.offset, (q.shape[0],))
        scores = scores - (problem.alibi_slopes[h] * abs(t + offset[b] - s)).astype(q.dtype)
    return scores


def _split(sizes: Sizes, parts: int, run: Callable[[int, int], None]) -> None:
    """Run all tasks, on several threads if there is so much to do that handing it over pays."""
    tasks = parts * sizes.B * sizes.K
    if sizes.B * sizes.H * sizes.T * sizes.S * (sizes.D + sizes.E) < _SMALL:
        run(0, tasks)
    else:
        split(tasks, run)


def _sizes(q: np.ndarray, v: np.ndarray) -> Sizes:
    B, H, T, D = q.shape
    return Sizes(B, H, v.shape[1], T, v.shape[2], D, v.shape[3])


def _scratch(size_of: Any, sizes: Sizes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Uninitialised memory, which the kernel uses from the first cache line on, and that of the queries' spans."""
    size = size_of(sizes, REGISTER_BITS // 8 // dtype.itemsize) + LINE // dtype.itemsize
    return np.empty(size, dtype), np.empty(4 * sizes.T, np.int64)
