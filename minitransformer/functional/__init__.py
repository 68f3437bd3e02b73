"""The ops under the names PyTorch users know; inputs are Tensors, arrays or numbers.

Attention keeps torch's positional order; what torch does not have is keyword-only. Layout (B, H, T, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import minitransformer.ops  # noqa: F401  (fills OPS)
from minitransformer import random
from minitransformer.autograd import OPS, Tensor, as_array
from minitransformer.checks import check_flag, is_integer
from minitransformer.functional.attention import flex_attention, linear_attention, scaled_dot_product_attention
from minitransformer.kernels.attention.problem import Sparse
from minitransformer.ops.activation import check_float
from minitransformer.ops.dropout import check_rate
from minitransformer.ops.position import alibi_slopes, sinusoidal_positions
from minitransformer.ops.shape import check_items, check_shape

__all__ = [
    "Sparse",
    "alibi_slopes",
    "apply_rope",
    "concat",
    "cross_entropy",
    "dropout",
    "einsum",
    "embedding",
    "expand",
    "flex_attention",
    "gelu",
    "kl_div",
    "layer_norm",
    "linear",
    "linear_attention",
    "log_softmax",
    "matmul",
    "maximum",
    "minimum",
    "mse_loss",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "sinusoidal_positions",
    "softmax",
    "split",
    "stack",
    "swiglu",
    "tanh",
    "where",
]


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """`input @ weight.T + bias`: input (..., C_in), weight (C_out, C_in), bias (C_out,)."""
    return OPS["linear"](input, weight, bias) if bias is not None else OPS["linear"](input, weight)


def embedding(input: Any, weight: Any) -> Tensor:
    """Rows of weight (V, C) at integer ids (...): (..., C). `RangeError` names the first id out of range."""
    return OPS["embedding"](weight, input)


def layer_norm(
    x: Any, normalized_shape: int | Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """Layer norm over the last axes `normalized_shape` (Ba et al. 2016)."""
    return OPS["layer_norm"](x, weight, bias, normalized_shape=_shape("layer_norm", normalized_shape), eps=eps)


def rms_norm(x: Any, normalized_shape: int | Sequence[int], weight: Any = None, eps: float = 1e-5) -> Tensor:
    """RMS norm over the last axes `normalized_shape` (Zhang and Sennrich 2019)."""
    return OPS["rms_norm"](x, weight, normalized_shape=_shape("rms_norm", normalized_shape), eps=eps)


def _shape(op: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    return check_shape(op, (shape,) if is_integer(shape) else shape)


def softmax(x: Any, dim: int = -1) -> Tensor:
    """exp(x) / sum exp(x) along `dim`."""
    return OPS["softmax"](x, dim=dim)


def log_softmax(x: Any, dim: int = -1) -> Tensor:
    """x - log sum exp(x) along `dim`."""
    return OPS["log_softmax"](x, dim=dim)


def gelu(x: Any, approximate: str = "none") -> Tensor:
    """x Phi(x): by erf ("none", as BERT) or by tanh ("tanh", as GPT-2)."""
    return OPS["gelu"](x, approximate=approximate)


def relu(x: Any) -> Tensor:
    """max(x, 0)"""
    return OPS["relu"](x)


def silu(x: Any) -> Tensor:
    """x sigmoid(x)"""
    return OPS["silu"](x)


def sigmoid(x: Any) -> Tensor:
    """1 / (1 + exp(-x))"""
    return OPS["sigmoid"](x)


def tanh(x: Any) -> Tensor:
    return OPS["tanh"](x)


def swiglu(gate: Any, up: Any) -> Tensor:
    """silu(gate) * up (Shazeer 2020)"""
    return OPS["swiglu"](gate, up)


def dropout(x: Any, p: float = 0.5, training: bool = True, *, site: int | None = None) -> Tensor:
    """Each element 0 with probability `p`, else x / (1 - p); nothing when not `training`.

    Which elements are kept is a function of the seed, the step, the call `site` (or call order) and the
    element's index: see `minitransformer.random`.
    """
    if check_rate("dropout", p) == 0 or not check_flag("dropout", "training", training):
        check_float("dropout", x=as_array("dropout", x))
        return x if isinstance(x, Tensor) else Tensor(x)
    return OPS["dropout"](x, p=p, key=random.next_key(site))


def apply_rope(x: Any, positions: Any, *, base: float = 10000.0, layout: str = "half") -> Tensor:
    """Rotary positions (Su et al. 2021) for x (B, H, T, D), integer positions (T,) or (B, T)."""
    return OPS["rope"](x, positions, base=base, layout=layout)


def cross_entropy(
    input: Any,
    target: Any,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-log softmax(input)[target]: input (..., V) with the classes last, integer target (...).

    The mean is over targets that are not `ignore_index`; over none it is 0, where torch gives NaN.
    """
    return OPS["cross_entropy"](
        input, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


def mse_loss(input: Any, target: Any, *, reduction: str = "mean") -> Tensor:
    """(input - target)^2"""
    return OPS["mse_loss"](input, target, reduction=reduction)


def kl_div(input: Any, target: Any, *, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """target (log target - input), `input` being log-probabilities; reductions as in torch."""
    return OPS["kl_div"](input, target, reduction=reduction, log_target=log_target)


def matmul(a: Any, b: Any) -> Tensor:
    """Matrix product over the last two axes."""
    return OPS["matmul"](a, b)


def einsum(equation: str, *operands: Any) -> Tensor:
    """Einstein summation, as `einsum("bthd,bshd->bhts", q, k)`."""
    return OPS["einsum"](*operands, equation=equation)


def maximum(a: Any, b: Any) -> Tensor:
    """The larger of each pair; a tie shares the gradient equally."""
    return OPS["maximum"](a, b)


def minimum(a: Any, b: Any) -> Tensor:
    """The smaller of each pair; a tie shares the gradient equally."""
    return OPS["minimum"](a, b)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """`a` where the bool `condition` holds, else `b`."""
    return OPS["where"](a, b, condition)


def expand(x: Any, shape: Sequence[int]) -> Tensor:
    """x broadcast to `shape`."""
    return OPS["expand"](x, shape=shape)


def concat(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """The tensors one after another along `dim`."""
    return OPS["concat"](*check_items("concat", "tensors", tensors), dim=dim)


def stack(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """The tensors side by side along a new axis `dim`."""
    return OPS["stack"](*check_items("stack", "tensors", tensors), dim=dim)


def split(tensor: Any, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Consecutive pieces along `dim`, of one size (the last may be shorter) or of the given sizes."""
    return OPS["split"](tensor, sizes=split_size_or_sections, dim=dim)
