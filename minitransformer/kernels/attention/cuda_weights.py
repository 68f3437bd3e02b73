"""The weights of attention on a GPU, for those who ask for all T x S of them: products by the arrays' own library."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import int64
from numba.np.numpy_support import from_dtype

from minitransformer.kernels.attention.cuda_rules import Parts, Rules, rule_code, rules_type
from minitransformer.kernels.attention.cuda_tiles import U
from minitransformer.kernels.attention.rules import SIZES, Sizes
from minitransformer.kernels.gpu.arrays import device_of
from minitransformer.kernels.gpu.kernel import Kernel


def weigh(scores: Any, lse: Any, parts: Parts, rules: Rules, sizes: Sizes) -> None:
    """Make exp(score - lse) of raw scores (B, H, T, S), where they are; 0 for keys that are not attended to."""
    _launch("weigh", scores, lse, parts, rules, sizes)


def bend(dscores: Any, raw: Any, parts: Parts, rules: Rules, sizes: Sizes) -> None:
    """Make gradients of raw scores of those of scores, where they are."""
    _launch("bend", dscores, raw, parts, rules, sizes)


def _launch(name: str, x: Any, y: Any, parts: Parts, rules: Rules, sizes: Sizes) -> None:
    if x.size:
        threads = 8 if device_of(x) == "simulator" else 256
        blocks = -(-x.size // threads), 1, 1
        cells_kernel(name, x.dtype, parts, threads)(blocks, x.reshape(-1), y.reshape(-1), sizes, rules)


@cache
def cells_kernel(name: str, dtype: np.dtype, parts: Parts, threads: int) -> Kernel:
    """`weigh` or `bend`, a thread for each cell."""
    T = from_dtype(dtype)
    build = _weigh if name == "weigh" else _bend
    return Kernel(lambda cuda: build(cuda, T, parts), (T[::1], T[::1], SIZES, rules_type(T, parts)), threads)


def _place(cuda: Any) -> Any:
    @cuda.jit(device=True, forceinline=True)
    def place(sizes: Any) -> Any:
        """The number of a thread's cell, its batch row, which is B or more if there is none, head, query and key."""
        n = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        line = n // sizes.S
        return n, line // sizes.T // sizes.H, line // sizes.T % sizes.H, line % sizes.T, n % sizes.S

    return place


def _weigh(cuda: Any, T: Any, parts: Parts) -> Any:
    place, rule = _place(cuda), rule_code(cuda, T, parts, slopes=False)
    never, zero = T(-math.inf), T(0)

    def weigh(x: Any, lse: Any, sizes: Any, rules: Any) -> None:
        n, b, h, t, key = place(sizes)
        if b < sizes.B:
            weight = zero
            if rule.reaches(rules, b, t, key, sizes.S):
                score, level = rule.score(rules, x[U(n)], b, h, t, key), lse[U(n // sizes.S)]
                if score != never:
                    weight = T(math.exp(score - (level if level != never else zero)))
            x[U(n)] = weight

    return weigh


def _bend(cuda: Any, T: Any, parts: Parts) -> Any:
    place, rule = _place(cuda), rule_code(cuda, T, parts, slopes=True)
    zero = T(0)

    def bend(x: Any, raw: Any, sizes: Any, rules: Any) -> None:
        n, b, h, t, key = place(sizes)
        if b < sizes.B and x[U(n)] != zero:
            x[U(n)] *= rule.slope(rules, raw[U(n)], b, h, t, key)

    return bend
