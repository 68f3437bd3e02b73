"""Attention in numba.cuda: see `cuda_forward.py` and `cuda_backward.py`. The same functions as `reference.py`.

A problem's arrays may be the host's; they are copied to the device of q, a mask of T x S numbers too. Only
`weights_forward` and `weights_backward` make arrays T x S.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.kernels.attention.cuda_backward import keys_kernel, queries_kernel
from minitransformer.kernels.attention.cuda_forward import forward_kernel
from minitransformer.kernels.attention.cuda_rules import is_plain, rules_of
from minitransformer.kernels.attention.cuda_tiles import Tile, backward_tile, forward_tile
from minitransformer.kernels.attention.layout import BackwardLayouts, Layout, Layouts
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.reference import Gradients
from minitransformer.kernels.attention.rules import Sizes
from minitransformer.kernels.gpu.arrays import device_of, flat
from minitransformer.kernels.gpu.entrance import entrance


@entrance("BHTD~", "BKSD~", "BKSE~", "*", "BHTE~!")
def forward(q: Any, k: Any, v: Any, bias: Any, out: Any, problem: Problem) -> tuple[Any, Any]:
    """out (B, H, T, E) and lse (B, H, T) for q (B, H, T, D), k (B, K, S, D), v (B, K, S, E)."""
    sizes = _sizes(q, v)
    lse = np.empty_like(q, shape=q.shape[:3])
    if out is None:
        out = np.empty_like(q, shape=(*q.shape[:3], sizes.E))
    if not lse.size:
        return out, lse
    parts, rules = rules_of(problem, bias, q, sizes)
    rows = sizes.H // sizes.K * sizes.T
    tile = forward_tile(q.dtype, rows, sizes.D, sizes.E, is_plain(parts), device_of(q) == "simulator")
    pieces = 1
    memory, at = _lay_out(q, k, v, out)
    blocks = -(-rows // tile.rows) * sizes.K * sizes.B * pieces, max(1, -(-sizes.E // tile.width)), 1
    kernel = forward_kernel(q.dtype, tile, parts, tile.depth >= sizes.D)
    kernel(blocks, *memory, lse.reshape(-1), Layouts(*at), sizes, problem.scale, rules, pieces)
    return out, lse


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
    dq, dk, dv = (np.empty_like(x, shape=x.shape) if target is None else target for target, x in targets)
    dbias = None if bias is None else np.zeros_like(q, shape=(*q.shape[:3], sizes.S))
    parts, rules = rules_of(problem, bias, q, sizes)
    delta = (dout * out).sum(axis=-1) - dlse
    tile = backward_tile(q.dtype, max(sizes.D, sizes.E), is_plain(parts), device_of(q) == "simulator")
    (mq, mk, mv, mdout, mdq, mdk, mdv), at = _lay_out(q, k, v, dout, dq, dk, dv)
    layouts = BackwardLayouts(*at[:3], at[3], *at[3:])
    rest = layouts, sizes, problem.scale, rules
    lines, statistics = sizes.K * sizes.B, (delta.reshape(-1), lse.reshape(-1))
    if dq.size:
        tiles = -(-sizes.H // sizes.K * sizes.T // tile.rows)
        blocks = tiles * lines, -(-sizes.D // tile.width), 1
        memory = delta if dbias is None else dbias
        queries_kernel(q.dtype, tile, parts)(blocks, mq, mk, mv, mdout, mdq, *statistics, memory.reshape(-1), *rest)
    if dk.size:
        columns = -(-max(sizes.D, sizes.E) // tile.width)
        for run, tiles in enumerate(_key_tiles(problem, sizes, tile)):
            blocks = tiles * lines, columns, 1
            keys_kernel(q.dtype, tile, parts)(blocks, mq, mk, mv, mdout, mdk, mdv, *statistics, *rest, run)
    return Gradients(dq, dk, dv, dbias)


def _key_tiles(problem: Problem, sizes: Sizes, tile: Tile) -> list[int]:
    """How many tiles there are of keys, and of far ones."""
    tiles = [-(-sizes.S // tile.rows)]
    if problem.sparse is not None:
        far = problem.sparse.far
        tiles.append(-(-min(len(far), -(-sizes.S // far.step)) // tile.rows))
    return tiles


def _sizes(q: Any, v: Any) -> Sizes:
    B, H, T, D = q.shape
    return Sizes(B, H, v.shape[1], T, v.shape[2], D, v.shape[3])


def _lay_out(*arrays: Any) -> tuple[list[Any], list[Layout]]:
    """The memory of arrays (B, H, T, D), and where their rows are."""
    steps = ([stride // x.itemsize for stride in x.strides[:3]] for x in arrays)
    return [flat(x) for x in arrays], [Layout(*step) for step in steps]
