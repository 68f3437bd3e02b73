"""The ops under the names PyTorch users know; inputs are Tensors, arrays or numbers.

Attention keeps torch's positional order; what torch does not have is keyword-only. Layout (B, H, T, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import minitransformer.ops  # noqa: F401  (fills OPS)
from minitransformer import random
from minitransformer.autograd import OPS, Tensor, as_array
from minitransformer.checks import check_flag, check_function, is_integer, shown
from minitransformer.errors import DTypeError
from minitransformer.masks import Mask
from minitransformer.ops.activation import check_float
from minitransformer.ops.attention import make_problem, split_mask
from minitransformer.ops.dropout import check_rate
from minitransformer.ops.position import alibi_slopes, sinusoidal_positions
from minitransformer.ops.shape import check_shape

__all__ = [
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


def refuse(op: str, keywords: dict[str, Any]) -> None:
    """`DTypeError` (a TypeError) for keywords that `op` does not take, with the way out for padding masks."""
    for name in keywords:
        if str(name).endswith("padding_mask"):
            raise DTypeError(
                op,
                f"{name} is not taken, because in torch it means True = blocked, and here True = may attend",
                f"Pass attn_mask=masks.padding(~{name})",
            )
        raise DTypeError(op, f"got an unexpected argument {name!r}", f"See help({op})")


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str | None = None,
    window_size: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    key_lengths: Any = None,
    cu_seqlens: Any = None,
    need_weights: bool = False,
    need_lse: bool = False,
    dropout_site: int | None = None,
    **unexpected: Any,
) -> Any:
    """softmax(query key^T * scale + bias) value (Vaswani et al. 2017).

    query (B, H, T, D), key (B, K, S, D), value (B, K, S, Dv), all float32 or float64; K = H, or a
    divisor of H with `enable_gqa`. Returns (B, H, T, Dv); with `need_weights` also the weights before
    dropout (B, H, T, S), with `need_lse` also the log-sum-exp of the scores (B, H, T), in this order.

    `attn_mask` broadcasts to (B, H, T, S): bool (True = may attend), float (added, also differentiable;
    only -inf excludes) or a mask object. It combines with `is_causal`, `window_size` (left, right; both
    include the own position, None = no limit), `key_lengths` (B,) and `cu_seqlens` (packed documents) by
    "and". Where positions are compared and T != S or lengths differ, `causal_align` must name the corner:
    "lower_right" (the last query sees the last key) or "upper_left". `softcap` c turns scores s into
    c tanh(s/c); `alibi_slopes` (H,) subtracts slope * distance. A query that may attend to nothing gets
    output 0, log-sum-exp -inf and gradient 0. `dropout_p` always applies: pass 0 when evaluating. NaN or
    infinity in a value that is masked reaches the output all the same, as 0 * NaN: pad with finite numbers.

    Raises ShapeError, DTypeError, MaskError, RangeError or ConfigError before any number is computed.
    """
    op = "attention"
    refuse(op, unexpected)
    need_weights, need_lse = check_flag(op, "need_weights", need_weights), check_flag(op, "need_lse", need_lse)
    q, k, v = (as_array(op, x) for x in (query, key, value))
    options = {
        "is_causal": is_causal,
        "scale": scale,
        "enable_gqa": enable_gqa,
        "causal_align": causal_align,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "key_lengths": key_lengths,
        "cu_seqlens": cu_seqlens,
        "dropout_p": dropout_p,
    }
    problem = make_problem(op, q, k, v, **options)
    B, H, T, _ = q.shape
    mask, additive = split_mask(op, attn_mask, B, H, T, k.shape[2])
    bias = attn_mask if additive is not None else None  # a Tensor keeps its gradient
    if mask is not None and isinstance(attn_mask, Tensor):
        mask = mask.copy()  # backward needs it as it was, and a static argument has no version
    problem = problem._replace(mask=mask, dropout_key=random.next_key(dropout_site) if dropout_p else None)
    out, lse = OPS["attention"](query, key, value, bias, problem=problem)
    results = [out]
    if need_weights:
        results.append(OPS["attention_weights"](query, key, lse, bias, problem=problem))
    if need_lse:
        results.append(lse)
    return tuple(results) if len(results) > 1 else out


def flex_attention(
    query: Any,
    key: Any,
    value: Any,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Mask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    score_mod_grad: Callable[..., Any] | None = None,
    buffers: Sequence[Any] = (),
    dropout_p: float = 0.0,
    need_lse: bool = False,
) -> Any:
    """Attention with your own score and mask functions, forward and backward.

    `score_mod(score, b, h, q, k, *buffers) -> score` and the `mask_mod(b, h, q, k) -> bool` of
    `block_mask` (see `masks.create_block_mask`) are plain Python on numbers; use numpy, not math, for
    functions of the score. Its derivative is taken by complex step, or from `score_mod_grad` with the
    same arguments. `buffers` are arrays passed on to `score_mod`; they get no gradient. Shapes, result
    and errors as in `scaled_dot_product_attention`.

    Numba compiles `score_mod` into the kernels. What it cannot compile, such as a function that reads arrays
    other than `buffers`, runs in NumPy, many times slower, with one `RuntimeWarning` that says why. A comparison
    of the score, as in `if score > 0`, needs `score.real` to be differentiated, or a `score_mod_grad`.
    """
    op = "flex_attention"
    if block_mask is not None and not isinstance(block_mask, Mask):
        raise DTypeError(
            op,
            f"block_mask is a {type(block_mask).__name__}, expected a mask object",
            "Make one: masks.create_block_mask(mask_mod, B, H, T, S)",
        )
    for name, mod in (("score_mod", score_mod), ("score_mod_grad", score_mod_grad)):
        if mod is not None:
            check_function(op, name, mod, "(score, b, h, q, k, *buffers) -> score")
    arrays = []
    for buffer in _items(op, "buffers", buffers):
        if isinstance(buffer, Tensor) and buffer.requires_grad:
            raise DTypeError(op, "a buffer requires a gradient, which buffers do not get", "Pass buffer.detach()")
        arrays.append(np.asarray(as_array(op, buffer)))
    need_lse = check_flag(op, "need_lse", need_lse)
    q, k, v = (as_array(op, x) for x in (query, key, value))
    mods: dict[str, Any] = {"score_mod": score_mod, "score_mod_grad": score_mod_grad, "buffers": tuple(arrays)}
    problem = make_problem(op, q, k, v, scale=scale, enable_gqa=enable_gqa, dropout_p=dropout_p, **mods)
    B, H, T, _ = q.shape
    mask, _ = split_mask(op, block_mask, B, H, T, k.shape[2])
    problem = problem._replace(mask=mask, dropout_key=random.next_key() if dropout_p else None)
    out, lse = OPS["attention"](query, key, value, None, problem=problem)
    return (out, lse) if need_lse else out


def linear_attention(
    query: Any, key: Any, value: Any, *, is_causal: bool = False, feature_map: str | None = "elu"
) -> Tensor:
    """Attention with weights phi(q) . phi(k) in place of a softmax's (Katharopoulos et al. 2020).

        out_t = sum_s (phi(q_t) . phi(k_s)) v_s / sum_s phi(q_t) . phi(k_s)

    over all keys, or over s <= t with `is_causal`, which needs as many keys as queries. Time and memory grow with
    T + S, not with T * S. query (B, H, T, D), key (B, K, S, D), value (B, K, S, Dv), all float32 or float64; K = H,
    or a divisor of H, whose key heads are shared. Returns (B, H, T, Dv).

    phi(x) = elu(x) + 1 for "elu". With `feature_map=None` phi is the identity: `query` and `key` are features that
    you have made, as by your own map. Weights should then not be negative: where they add up to nearly 0, the result
    is anything. A query whose weights add up to exactly 0 (no keys, or all weights underflown) gets output 0 and
    gradient 0. With `is_causal`, NaN or infinity in a key or value reaches also a few outputs before it, as 0 * NaN.

    Raises ShapeError, DTypeError or ConfigError before any number is computed.
    """
    return OPS["linear_attention"](query, key, value, is_causal=is_causal, feature_map=feature_map)


def _items(op: str, name: str, values: Any) -> Sequence[Any]:
    """`values`, one by one as they are; `DTypeError` for what is no list or tuple."""
    if not isinstance(values, (list, tuple)):
        raise DTypeError(op, f"{name} is {shown(values)}, expected a list or tuple", f"Pass {name} as [a, b]")
    return values


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
    return OPS["concat"](*_items("concat", "tensors", tensors), dim=dim)


def stack(tensors: Sequence[Any], dim: int = 0) -> Tensor:
    """The tensors side by side along a new axis `dim`."""
    return OPS["stack"](*_items("stack", "tensors", tensors), dim=dim)


def split(tensor: Any, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Consecutive pieces along `dim`, of one size (the last may be shorter) or of the given sizes."""
    return OPS["split"](tensor, sizes=split_size_or_sections, dim=dim)
