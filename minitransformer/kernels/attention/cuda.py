"""Attention in numba.cuda: see `cuda_forward.py` and `cuda_backward.py`. The same functions as `reference.py`.

What a problem has in host memory is copied to the device of q, a mask of T x S numbers too. The arrays T x S of scores
and weights are never made, except where they are what is asked for (`weights_forward`, `weights_backward`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minitransformer.kernels.attention.cuda_backward import keys_kernel, queries_kernel
from minitransformer.kernels.attention.cuda_forward import forward_kernel, merge_kernel
from minitransformer.kernels.attention.cuda_rules import ALL_PARTS, Parts, bends_scores, is_plain, rules_of
from minitransformer.kernels.attention.cuda_tiles import FEW, Tile, backward_tile, forward_tile
from minitransformer.kernels.attention.cuda_user import Mods
from minitransformer.kernels.attention.cuda_weights import bend, cells_kernel, weigh
from minitransformer.kernels.attention.layout import BackwardLayouts, Layout, Layouts
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.reference import Gradients, allowed
from minitransformer.kernels.attention.rules import Sizes
from minitransformer.kernels.gpu.arrays import device_of, flat
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel

__all__ = ["allowed", "backward", "forward", "weights_backward", "weights_forward"]

_PIECE = 256  # keys at least that a block attends to where the keys of few queries are divided
_BLOCKS = 256  # enough for the multiprocessors of a large GPU; a fixed number, so that the bits are those of the call
_MERGERS = 128  # threads that merge what pieces give for one query


@entrance("BHTD~", "BKSD~", "BKSE~", "*", "BHTE~!")
def forward(q: Any, k: Any, v: Any, bias: Any, out: Any, problem: Problem) -> tuple[Any, Any]:
    """out (B, H, T, E) and lse (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    sizes, simulated = _sizes(q, v), device_of(q) == "simulator"
    lse = _empty(q, *q.shape[:3])
    if out is None:
        out = _empty(q, *q.shape[:3], sizes.E)
    if not lse.size:
        return out, lse
    parts, rules = rules_of(problem, bias, q, sizes, slopes=False)
    rows = sizes.H // sizes.K * sizes.T
    tile = forward_tile(q.dtype, rows, sizes.D, sizes.E, is_plain(parts), simulated)
    pieces = _pieces(sizes, rows)
    outs, lses = out, lse
    if pieces > 1:
        outs, lses = (_empty(q, pieces * sizes.B, *x.shape[1:]) for x in (out, lse))
    memory, at = _lay_out(q, k, v, outs)
    blocks = _count(rows, tile.rows) * sizes.K * sizes.B * pieces, max(1, _count(sizes.E, tile.width)), 1
    attend = forward_kernel(q.dtype, tile, parts, tile.depth >= sizes.D)
    attend(blocks, *memory, lses.reshape(-1), Layouts(*at), sizes, problem.scale, rules, pieces)
    if pieces > 1:
        (memory_out,), (at_out,) = _lay_out(out)
        merge = merge_kernel(q.dtype, tile.threads if simulated else _MERGERS)
        merge((lse.size, 1, 1), memory[3], lses.reshape(-1), memory_out, lse.reshape(-1), at_out, sizes, pieces)
    return out, lse


def _pieces(sizes: Sizes, rows: int) -> int:
    """In how many parts the keys are attended to: more than one where few queries would leave multiprocessors idle."""
    return max(1, min(sizes.S // _PIECE, _BLOCKS // (sizes.B * sizes.K))) if rows <= FEW else 1


@entrance("BHTE~", "BHT", "BHTD~", "BKSD~", "BKSE~", "*", "BHTE~", "BHT", "BHTD~!", "BKSD~!", "BKSE~!")
def backward(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    out: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    problem: Problem,
) -> Gradients:
    """dq, dk, dv and, if there is a bias, dbias (B, H, T, S)."""
    sizes = _sizes(q, v)
    targets: Any = zip((dq, dk, dv), (q, k, v), strict=True)
    dq, dk, dv = (_empty(x, *x.shape) if target is None else target for target, x in targets)
    # What is never computed has no gradient.
    dbias = None if bias is None else np.zeros_like(q, shape=(*q.shape[:3], sizes.S), order="C")
    parts, rules = rules_of(problem, bias, q, sizes, slopes=True)
    delta = ((dout * out).sum(axis=-1) - dlse).reshape(-1)
    widest = max(sizes.D, sizes.E)
    tile = backward_tile(q.dtype, widest, is_plain(parts), device_of(q) == "simulator")
    (of_q, of_k, of_v, _, of_dout, to_q, to_k, to_v), at = _lay_out(q, k, v, out, dout, dq, dk, dv)
    layouts = BackwardLayouts(*at)
    memory, statistics = (of_q, of_k, of_v, of_dout), (delta, lse.reshape(-1))
    settings = layouts, sizes, problem.scale, rules
    if dq.size:
        blocks = _count(sizes.H // sizes.K * sizes.T, tile.rows) * sizes.K * sizes.B, _count(sizes.D, tile.width), 1
        to_bias = delta if dbias is None else dbias.reshape(-1)
        queries_kernel(q.dtype, tile, parts)(blocks, *memory, to_q, *statistics, to_bias, *settings)
    for run, tiles in enumerate(_key_tiles(problem, sizes, tile) if dk.size else ()):
        blocks = tiles * sizes.K * sizes.B, _count(widest, tile.width), 1
        keys_kernel(q.dtype, tile, parts)(blocks, *memory, to_k, to_v, *statistics, *settings, run)
    return Gradients(dq, dk, dv, dbias)


def _key_tiles(problem: Problem, sizes: Sizes, tile: Tile) -> list[int]:
    """How many tiles there are of keys and, if there are any, of far ones."""
    far = range(0) if problem.sparse is None else problem.sparse.far
    counts = sizes.S, min(len(far), _count(sizes.S, far.step))
    return [_count(count, tile.rows) for count in counts if count]


@entrance("BHTD", "BKSD", "*", "BHT")
def weights_forward(q: Any, k: Any, bias: Any, lse: Any, problem: Problem) -> Any:
    """The softmax weights (B, H, T, S) before dropout, rebuilt from the log-sum-exp."""
    sizes = _sizes(q, k)
    weights = _raw_scores(q, _for_all_heads(k, sizes), problem)
    weigh(weights, lse, *rules_of(problem, bias, q, sizes, slopes=False), sizes)
    return weights


@entrance("BHTS", "BHTS", "BHTD", "BKSD", "*")
def weights_backward(
    dweights: Any, weights: Any, q: Any, k: Any, bias: Any, problem: Problem
) -> tuple[Any, Any, Any, Any]:
    """dq, dk, dbias, dlse: w = exp(s - lse), so ds = dw w and dlse = -sum ds."""
    sizes = _sizes(q, k)
    keys, scale = _for_all_heads(k, sizes), q.dtype.type(problem.scale)
    dbias = dscores = dweights * weights
    parts, rules = rules_of(problem, bias, q, sizes, slopes=True)
    if bends_scores(parts):
        dscores = dscores.copy()
        bend(dscores, _raw_scores(q, keys, problem), parts, rules, sizes)
    dkeys = np.matmul(dscores.swapaxes(-1, -2), q) * scale  # (B, H, S, D)
    dk = dkeys.reshape(sizes.B, sizes.K, sizes.H // sizes.K, sizes.S, sizes.D).sum(axis=2)
    return np.matmul(dscores, keys) * scale, dk, None if bias is None else dbias, -dbias.sum(axis=-1)


def _for_all_heads(k: Any, sizes: Sizes) -> Any:
    """(B, K, S, D) -> (B, H, S, D)"""
    return np.repeat(k, sizes.H // sizes.K, axis=1)


def _raw_scores(q: Any, keys: Any, problem: Problem) -> Any:
    """scale q k^T, (B, H, T, S)"""
    return np.matmul(q * q.dtype.type(problem.scale), keys.swapaxes(-1, -2))


def configurations() -> Iterator[tuple[str, Kernel]]:
    """Every kernel as a GPU gets it: heads of usual and other widths, a causal mask alone and all rules together."""
    relative = Mods(Problem(1.0, np.zeros(1, np.int64), score_mod=_relative, buffers=(np.zeros((1, 1), np.float32),)))
    for dtype in map(np.dtype, (np.float32, np.float64)):
        for width in (16, 32, 64, 80, 128, 256):
            yield from _kernels("causal", frozenset({"right"}), width, dtype)
            yield from _kernels("all rules", ALL_PARTS, width, dtype)
        yield from _kernels("a function of the user", frozenset({"right", relative}), 64, dtype)
        yield f"attention merge {dtype}", merge_kernel(dtype, _MERGERS)


def _kernels(name: str, parts: Parts, width: int, dtype: np.dtype) -> Iterator[tuple[str, Kernel]]:
    about = f"{name}, width {width} {dtype}"
    for kind, rows in (("few queries", 1), ("forward", FEW + 1)):
        tile = forward_tile(dtype, rows, width, width, is_plain(parts), simulated=False)
        yield f"attention {kind}, {about}", forward_kernel(dtype, tile, parts, tile.depth >= width)
    tile = backward_tile(dtype, width, is_plain(parts), simulated=False)
    yield f"attention dq, {about}", queries_kernel(dtype, tile, parts)
    yield f"attention dk and dv, {about}", keys_kernel(dtype, tile, parts)
    for kind in ("weigh", "bend"):
        yield f"attention {kind}, {name} {dtype}", cells_kernel(kind, dtype, parts, 256)


def _relative(score: Any, b: Any, h: Any, q: Any, k: Any, table: Any) -> Any:
    return score + table[h, q - k]


def _sizes(q: Any, v: Any) -> Sizes:
    B, H, T, D = q.shape
    return Sizes(B, H, v.shape[1], T, v.shape[2], D, v.shape[3])


def _empty(x: Any, *shape: int) -> Any:
    return np.empty_like(x, shape=shape, order="C")


def _count(size: int, tile: int) -> int:
    """How many tiles it takes."""
    return -(-size // tile)


def _lay_out(*arrays: Any) -> tuple[list[Any], list[Layout]]:
    """The memory of arrays (B, H, T, D), and where their rows are."""
    steps = ([stride // x.itemsize for stride in x.strides[:3]] for x in arrays)
    return [flat(x) for x in arrays], [Layout(*step) for step in steps]
