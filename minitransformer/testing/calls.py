"""Drawn calls of every op, with kinks, ties, masks and empty rows: for checks of the ops and of their formulas.

They need a random generator and no Hypothesis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import minitransformer.ops  # noqa: F401  (fills OPS)
from minitransformer.autograd import OPS
from minitransformer.kernels.attention.problem import Problem, Sparse
from minitransformer.kernels.decode.step import block_shapes
from minitransformer.ops.decoder_layer import DecoderOptions
from minitransformer.ops.encoder_layer import EncoderOptions
from minitransformer.ops.gpt_block import BlockOptions
from minitransformer.random import DrawKey

Inputs = tuple[list[Any], dict[str, Any]]  # what a forward takes: arrays, and settings by name


def some(rng: np.random.Generator, axes: int) -> list[int]:
    """Sizes of 1 to 4."""
    return [int(n) for n in rng.integers(1, 5, axes)]


def pair(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Two shapes that broadcast, each to a shape of which it may lack axes."""
    full = some(rng, 3)
    a, b = ([1 if rng.random() < 0.3 else n for n in full][rng.integers(0, 4) :] for _ in range(2))
    return a, b


def reals(*shapes: int) -> Callable[[np.random.Generator], Inputs]:
    """Inputs of so many axes each, in no relation."""
    return lambda rng: ([rng.standard_normal(some(rng, n)) for n in shapes], {})


def positive(rng: np.random.Generator) -> Inputs:
    return [rng.uniform(0.1, 3, some(rng, 2))], {}


def tied(rng: np.random.Generator) -> Inputs:
    """Few different values, 0 among them: kinks and ties, but not everywhere, which would leave nothing to check."""
    x = rng.integers(-2, 3, some(rng, 2)).astype(float)
    x.flat[0] = 2
    return [x], {}


def operands(rng: np.random.Generator) -> Inputs:
    return [rng.standard_normal(shape) for shape in pair(rng)], {}


def tied_operands(rng: np.random.Generator) -> Inputs:
    a, b = (rng.integers(-1, 2, shape).astype(float) for shape in pair(rng))
    a.flat[0] = 2
    return [a, b], {}


def powers(rng: np.random.Generator) -> Inputs:
    a, b = pair(rng)
    return [rng.choice([0.5, 1, 2.5], a), rng.choice([-1, 0, 0.5, 1, 2, 3], b)], {}  # at 0 there are poles


def permuted(rng: np.random.Generator) -> Inputs:
    dims = rng.permutation(4)
    return [rng.standard_normal(some(rng, 4))], {"dims": tuple(int(d) - 4 * (d % 2) for d in dims)}


def expanded(rng: np.random.Generator) -> Inputs:
    small, full = [*some(rng, 1), 1, *some(rng, 1)], some(rng, 2)
    return [rng.standard_normal(small)], {"shape": (full[0], small[0], full[1], small[2])}


def indexed(rng: np.random.Generator) -> Inputs:
    x = rng.standard_normal((4, 3, 5))
    several, mask = rng.integers(-4, 4, (2, 3)), rng.random(x.shape) < 0.4
    index = [np.s_[1:, ::-2], 2, (..., None, -1), several, np.s_[:, [0, 2, 2], [4, 1, 4]], mask]
    return [x], {"index": index[rng.integers(len(index))]}


def pieces(rng: np.random.Generator) -> Inputs:
    B, C = some(rng, 2)
    return [rng.standard_normal((B, n, C)) for n in some(rng, 3)], {"dim": int(rng.choice([1, -2]))}


def stacked(rng: np.random.Generator) -> Inputs:
    shape = some(rng, 2)
    return [rng.standard_normal(shape) for _ in range(3)], {"dim": int(rng.integers(-3, 3))}


def cut(rng: np.random.Generator) -> Inputs:
    sizes = [0, *some(rng, 2)]
    x = rng.standard_normal((2, sum(sizes), 3))
    return [x], {"dim": int(rng.choice([1, -2])), "sizes": sizes if rng.random() < 0.5 else sizes[1]}


def chosen(rng: np.random.Generator) -> Inputs:
    a, b = pair(rng)
    shape = np.broadcast_shapes(a, b)
    return [rng.standard_normal(a), rng.standard_normal(b), np.asarray(rng.random(shape) < 0.5)], {}


def reduced(draw: Callable[..., np.ndarray]) -> Callable[[np.random.Generator], Inputs]:
    def problem(rng: np.random.Generator) -> Inputs:
        dim = [None, 0, -1, (0, 2), (-1, 1)][rng.integers(5)]
        return [draw(rng, some(rng, 3))], {"dim": dim, "keepdim": bool(rng.random() < 0.5)}

    return problem


def few(rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    """Ties, and one element above and one below all others."""
    x = rng.integers(0, 3, shape).astype(float)
    x.flat[0], x.flat[-1] = -1, 3
    return x


def products(rng: np.random.Generator) -> Inputs:
    N, K, M, B = some(rng, 4)
    left, right = (
        (K, [(B, N, K), (1, N, K), (N, K)][rng.integers(3)]),
        (K, [(B, K, M), (K, M)][rng.integers(2)]),
    )
    return [rng.standard_normal(side[int(rng.random() < 0.8)]) for side in (left, right)], {}


def layer(rng: np.random.Generator) -> Inputs:
    B, T, C, F = some(rng, 4)
    x = rng.standard_normal([(B, T, C), (C,)][int(rng.random() < 0.2)])
    return [x, rng.standard_normal((F, C)), rng.standard_normal(F)], {}


def summed(rng: np.random.Generator) -> Inputs:
    equation = ["bthd,bshd->bhts", "ij, jk, k -> i", "ij->j", "abc,b->ca", "i,j->"][rng.integers(5)]
    sizes = dict(zip("abcdhijkst", some(rng, 10), strict=True))
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    return [rng.standard_normal([sizes[letter] for letter in term]) for term in terms], {"equation": equation}


def along(rng: np.random.Generator) -> Inputs:
    return [rng.standard_normal(some(rng, 3))], {"dim": int(rng.integers(-3, 3))}


def drawn_key(rng: np.random.Generator) -> DrawKey:
    return DrawKey(*(int(n) for n in rng.integers(0, 2**31, 4)))


def normed(parameters: int) -> Callable[[np.random.Generator], Inputs]:
    def problem(rng: np.random.Generator) -> Inputs:
        x = rng.standard_normal([2, *some(rng, 1), 3, 4])
        shape = x.shape[int(rng.integers(1, 4)) :]
        arrays = [rng.standard_normal(shape) for _ in range(parameters)]
        return [x, *arrays], {"normalized_shape": shape, "eps": float(rng.choice([1e-5, 0.1]))}

    return problem


def looked_up(rng: np.random.Generator) -> Inputs:
    V, C, *shape = some(rng, 4)
    return [rng.standard_normal((V, C)), rng.integers(0, V, shape)], {}


def rotated(rng: np.random.Generator) -> Inputs:
    B, H, T, half = some(rng, 4)
    positions = rng.integers(0, 50, [(T,), (B, T)][rng.integers(2)])
    layout = ["half", "interleaved"][rng.integers(2)]
    return [rng.standard_normal((B, H, T, 2 * half)), positions], {"base": 100.0, "layout": layout}


def attended(rng: np.random.Generator) -> Inputs:
    B, K, groups, T, S, D, Dv = some(rng, 7)
    H = K * groups

    def maybe(option: Any, off: Any) -> Any:
        return option if rng.random() < 0.5 else off

    problem = Problem(
        scale=float(rng.uniform(0.2, 2)),
        offset=rng.integers(-2, 3, maybe(B, 1)),  # a negative one leaves queries without keys
        causal=maybe(True, False),
        mask=maybe(rng.random((B, 1, T, S)) < 0.7, None),
        softcap=maybe(1.5, 0.0),
        alibi_slopes=maybe(rng.uniform(0, 1, H), None),
        dropout_p=maybe(0.4, 0.0),
        dropout_key=drawn_key(rng),
        sparse=maybe(Sparse(range(1, 9, int(rng.integers(1, 4))), 1, 2, rng.integers(-2, 3, maybe(B, 1))), None),
    )
    shapes = [(B, H, T, D), (B, K, S, D), (B, K, S, Dv), maybe((1, H, T, S), (S,))]
    return [rng.standard_normal(shape) for shape in shapes], {"problem": problem}


def weighted(rng: np.random.Generator) -> Inputs:
    (q, k, v, bias), settings = attended(rng)
    (_, lse), _ = OPS["attention"].forward(q, k, v, bias, **settings)
    return [q, k, lse, bias], settings


def linearly_attended(rng: np.random.Generator) -> Inputs:
    """Without a map, features are positive; with it, the weights of one query may underflow."""
    B, K, groups, T, S, D, Dv = some(rng, 7)
    causal, mapped = rng.random(2) < 0.5
    S = T if causal else S
    q, k = (rng.standard_normal(shape) for shape in ((B, K * groups, T, D), (B, K, S, D)))
    if not mapped:
        q, k = abs(q) + 0.1, abs(k) + 0.1
    elif rng.random() < 0.3:
        q[:, :, 0] = -2000
    settings = {"is_causal": bool(causal), "feature_map": "elu" if mapped else None}
    return [q, k, rng.standard_normal((B, K, S, Dv))], settings


def classified(rng: np.random.Generator) -> Inputs:
    B, T, V = some(rng, 3)
    reduction = ["mean", "sum", "none"][rng.integers(3)]
    smoothing = float(rng.choice([0, 0.1, 1]))
    settings = {"ignore_index": -1, "label_smoothing": smoothing, "reduction": reduction}
    return [rng.standard_normal((B, T, V)), rng.integers(-1, V, (B, T))], settings


def regressed(rng: np.random.Generator) -> Inputs:
    shape = some(rng, 2)
    reduction = ["mean", "sum", "none"][rng.integers(3)]
    return [rng.standard_normal(shape) for _ in range(2)], {"reduction": reduction}


def diverging(rng: np.random.Generator) -> Inputs:
    x, z = rng.standard_normal((2, *some(rng, 2)))
    reduction = ["mean", "batchmean", "sum", "none"][rng.integers(4)]
    if rng.random() < 0.5:
        return [x, z], {"reduction": reduction, "log_target": True}
    return [x, np.maximum(z, 0)], {"reduction": reduction}


def with_settings(axes: int, **settings: Any) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: ([rng.standard_normal([2, 3, 4][:axes])], settings)


def dropped(rng: np.random.Generator) -> Inputs:
    return [rng.standard_normal(some(rng, 3))], {"p": float(rng.choice([0.1, 0.5])), "key": drawn_key(rng)}


def gelu_form(rng: np.random.Generator) -> Inputs:
    return [3 * rng.standard_normal(some(rng, 2))], {"approximate": ["none", "tanh"][rng.integers(2)]}


def gated(rng: np.random.Generator) -> Inputs:
    return list(rng.standard_normal((2, *some(rng, 2)))), {}


def layer_weights(rng: np.random.Generator, shapes: Sequence[tuple[int, ...]]) -> list[Any]:
    """Of layers by hand, some biases there, some not: every second array is one."""
    return [
        None if i % 2 and rng.random() < 0.3 else rng.standard_normal(shape) / math.sqrt(shape[-1])
        for i, shape in enumerate(shapes)
    ]


def layered(rng: np.random.Generator) -> Inputs:
    """A GPT-2 block. Of two or three numbers that are nearly equal, as they now and then are, the norm has no gradient
    in float32 that is worth a comparison: so heads are four wide at least.
    """
    B, T, K, groups, D, F = some(rng, 6)
    H, D = K * groups, D + 3
    x = rng.standard_normal((B, T, H * D))
    problem = Problem(scale=D**-0.5, offset=np.zeros(1, np.int64), causal=True)
    weights = layer_weights(rng, block_shapes(H, K, D, F, "gelu_tanh"))
    return [x, *weights], {"options": BlockOptions(H, K, problem)}


def encoded(rng: np.random.Generator) -> Inputs:
    B, T, H, D, F = some(rng, 5)
    D += 3
    problem = Problem(scale=D**-0.5, offset=np.zeros(1, np.int64))
    weights = layer_weights(rng, block_shapes(H, H, D, F, "relu"))
    return [rng.standard_normal((B, T, H * D)), *weights], {"options": EncoderOptions(H, problem)}


def decoded(rng: np.random.Generator) -> Inputs:
    B, T, S, H, D, F = some(rng, 6)
    D += 3
    other = Problem(scale=D**-0.5, offset=np.zeros(1, np.int64))
    x, memory = (rng.standard_normal((B, n, H * D)) for n in (T, S))
    shapes = block_shapes(H, H, D, F, "relu")
    weights = layer_weights(rng, (*shapes[:6], *shapes))
    return [x, memory, *weights], {"options": DecoderOptions(H, other._replace(causal=True), other)}


CALLS: dict[str, Callable[[np.random.Generator], Inputs]] = {
    "absolute": tied,
    "add": operands,
    "attention": attended,
    "attention_weights": weighted,
    "cast": with_settings(2, dtype=np.dtype(np.float32)),
    "concat": pieces,
    "cos": reals(2),
    "cross_entropy": classified,
    "decoder_layer": decoded,
    "divide": operands,
    "dropout": dropped,
    "einsum": summed,
    "embedding": looked_up,
    "encoder_layer": encoded,
    "exp": reals(2),
    "expand": expanded,
    "gelu": gelu_form,
    "getitem": indexed,
    "gpt_block": layered,
    "kl_div": diverging,
    "layer_norm": normed(2),
    "linear": layer,
    "linear_attention": linearly_attended,
    "log": positive,
    "log_softmax": along,
    "matmul": products,
    "max": reduced(few),
    "maximum": tied_operands,
    "mean": reduced(np.random.Generator.standard_normal),
    "min": reduced(few),
    "minimum": tied_operands,
    "move": with_settings(2, device="cpu"),
    "mse_loss": regressed,
    "multiply": operands,
    "permute": permuted,
    "power": powers,
    "relu": tied,
    "reshape": with_settings(3, shape=(4, -1)),
    "rms_norm": normed(1),
    "rope": rotated,
    "sigmoid": reals(2),
    "silu": reals(2),
    "sin": reals(2),
    "softmax": along,
    "split": cut,
    "sqrt": positive,
    "stack": stacked,
    "subtract": operands,
    "sum": reduced(np.random.Generator.standard_normal),
    "swiglu": gated,
    "tanh": reals(2),
    "transpose": with_settings(3, dim0=0, dim1=-1),
    "where": chosen,
}
