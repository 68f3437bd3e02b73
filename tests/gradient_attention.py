"""The lines of the gradient table for attention, every option alone and with others, and for linear attention."""

from __future__ import annotations

from typing import Any

import numpy as np
from checker import Case, case

from minitransformer.autograd import OPS
from minitransformer.kernels.attention.problem import Sparse
from minitransformer.ops.attention import make_problem
from minitransformer.random import DrawKey

RNG = np.random.default_rng(2)
KEY = DrawKey(seed=5, step=3, site=17, first_row=2)
INF = np.inf


def attention(
    B: int = 2,
    H: int = 2,
    T: int = 4,
    S: int | None = None,
    D: int = 3,
    Dv: int | None = None,
    K: int | None = None,
    *,
    bias: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    weights: bool = False,
    empty: bool = False,
    **options: Any,
) -> Case:
    """A case of `attention`, or of `attention_weights` with the log-sum-exp as an input of its own."""
    S, K = T if S is None else S, H if K is None else K
    q, k, v = (
        RNG.standard_normal((B, H, T, D)),
        RNG.standard_normal((B, K, S, D)),
        RNG.standard_normal((B, K, S, D if Dv is None else Dv)),
    )
    problem = make_problem("attention", q, k, v, mask, enable_gqa=K != H, **options)
    if problem.dropout_p:
        problem = problem._replace(dropout_key=KEY)
    if not weights:
        return case(q, k, v, bias, problem=problem, empty=empty)
    (_, lse), _ = OPS["attention"].forward(q, k, v, bias, problem=problem)
    return case(q, k, lse, bias, problem=problem, empty=empty)


def some_mask(*shape: int) -> np.ndarray:
    """Half of all cells, and nothing for the first query."""
    mask = RNG.random(shape) < 0.5
    mask[..., -1] = True
    mask[..., 0, :] = False
    return mask


def some_bias(*shape: int) -> np.ndarray:
    """Finite numbers, a few -inf, and for the last query nothing else."""
    bias = np.where(RNG.random(shape) < 0.3, -INF, RNG.standard_normal(shape))
    bias[..., 0] = 0.25
    bias[..., -1, :] = -INF
    return bias


def squash(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score * np.cos(score) + 0.1 * (q - k) + 0.3 * h


def squash_grad(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return np.cos(score) - score * np.sin(score)


def relative(score: Any, b: Any, h: Any, q: Any, k: Any, table: np.ndarray) -> Any:
    return 0.5 * score + table[q - k + 3]


ATTENTION: list[dict[str, Any]] = [
    {},
    {"T": 3, "S": 5, "Dv": 2, "D": 4},
    {"T": 1, "S": 1, "B": 1, "H": 1, "D": 1},
    {"H": 4, "K": 2, "T": 3},
    {"H": 3, "K": 1, "T": 3, "S": 4},
    {"is_causal": True},
    {"is_causal": True, "T": 3, "S": 5, "causal_align": "lower_right"},
    {"is_causal": True, "T": 5, "S": 3, "causal_align": "lower_right"},  # the first two queries see nothing
    {"is_causal": True, "T": 3, "S": 5, "causal_align": "upper_left"},
    {"window_size": (1, 0)},
    {"window_size": (1, 2), "T": 5},
    {"window_size": (None, 0), "T": 3, "S": 4, "causal_align": "lower_right"},
    {"window_size": (0, None), "T": 4, "S": 2, "causal_align": "upper_left"},
    {"key_lengths": [0, 3]},
    {"key_lengths": [1, 4], "is_causal": True, "causal_align": "lower_right"},
    {"key_lengths": [2, 4], "is_causal": True, "causal_align": "upper_left", "T": 5},
    {"cu_seqlens": [0, 2, 2, 5], "B": 1, "T": 5},
    {"cu_seqlens": [0, 1, 4], "B": 1, "is_causal": True},
    {"mask": some_mask(4, 4)},
    {"mask": some_mask(2, 1, 4, 4)},
    {"mask": some_mask(2, 2, 4, 4), "is_causal": True},
    {"mask": np.zeros((4, 4), bool)},
    {"mask": np.array([True, False, True, True])},
    {"bias": RNG.standard_normal((4, 4))},
    {"bias": RNG.standard_normal((4,))},
    {"bias": RNG.standard_normal((2, 1, 1, 4))},
    {"bias": RNG.standard_normal((1, 2, 4, 1))},
    {"bias": some_bias(2, 2, 4, 4)},
    {"bias": some_bias(4, 4), "is_causal": True, "H": 4, "K": 2},
    {"softcap": 1.5},
    {"softcap": 0.7, "bias": some_bias(4, 4), "window_size": (2, 1)},
    {"alibi_slopes": [0.5, 0.25]},
    {"alibi_slopes": [0.5, 0.25], "is_causal": True, "T": 3, "S": 5, "causal_align": "lower_right"},
    {"alibi_slopes": [0.5, 0.25], "key_lengths": [2, 4], "causal_align": "lower_right", "softcap": 2.0},
    {"scale": 0.3},
    {"scale": -1.5},
    {"score_mod": squash},
    {"score_mod": squash, "score_mod_grad": squash_grad},
    {"score_mod": squash, "softcap": 2.0, "is_causal": True, "bias": some_bias(4, 4)},
    {"score_mod": relative, "buffers": (np.arange(7.0) / 5,)},
    {"T": 0, "S": 3},
    {"T": 3, "S": 0},
    {"B": 0, "empty": True},
    {"sparse": Sparse(range(1), left=1), "is_causal": True, "T": 5},
    {"sparse": Sparse(range(1, 9, 2), block=2), "is_causal": True, "T": 5, "H": 4, "K": 2, "bias": some_bias(5, 5)},
    {"sparse": Sparse(range(0, 9, 2), origin=np.array([1, -1])), "T": 3, "S": 5, "causal_align": "lower_right"},
]


def attention_cases() -> list[Case]:
    drops = [attention(dropout_p=0.4, **options) for options in ATTENTION[::3] if "empty" not in options]
    return [attention(**options) for options in ATTENTION] + drops


def attention_weights_cases() -> list[Case]:
    return [attention(weights=True, **options) for options in ATTENTION]


def linear(B: int, H: int, K: int, T: int, S: int, D: int, Dv: int, *, empty: bool = False, **options: Any) -> Case:
    """A case of `linear_attention`. Features that are given as they are are positive."""
    q, k, v = (RNG.standard_normal(shape) for shape in ((B, H, T, D), (B, K, S, D), (B, K, S, Dv)))
    if "feature_map" in options:
        q, k = abs(q) + 0.1, abs(k) + 0.1
    return case(q, k, v, empty=empty, **options)


def without_weights() -> Case:
    """The weights of one query, and of all queries for one key, underflow to 0, and so they do nearby."""
    c = linear(1, 2, 1, 4, 4, 3, 2, is_causal=True)
    c.inputs[0][0, 0, 1] = c.inputs[1][0, 0, 2] = -2000
    return c


def linear_attention_cases() -> list[Case]:
    sizes = [(2, 2, 2, 4, 4, 3, 3), (1, 4, 2, 3, 3, 2, 4), (1, 1, 1, 1, 1, 1, 1), (1, 2, 1, 33, 33, 2, 1)]
    return [
        *(linear(*n, is_causal=causal) for n in sizes for causal in (False, True)),
        *(linear(*n, is_causal=causal, feature_map=None) for n in sizes for causal in (False, True)),
        linear(1, 3, 1, 2, 5, 3, 2),
        linear(2, 2, 2, 3, 0, 2, 2),
        linear(1, 2, 1, 0, 3, 2, 2),
        linear(1, 2, 2, 3, 3, 2, 0, is_causal=True, empty=True),
        linear(0, 2, 1, 3, 3, 2, 2, is_causal=True, empty=True),
        without_weights(),
    ]
