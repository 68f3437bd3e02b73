"""Attention: by a softmax, with functions of your own, and linear. Layout (B, H, T, D)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minitransformer import random
from minitransformer.autograd import OPS, Tensor, as_array
from minitransformer.checks import check_flag, check_function
from minitransformer.errors import DTypeError
from minitransformer.kernels.attention.problem import Sparse
from minitransformer.kernels.gpu.arrays import like, plain
from minitransformer.masks import Mask
from minitransformer.ops.attention import make_problem, split_mask
from minitransformer.ops.shape import check_items


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
    sparse: Sparse | None = None,
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
    include the own position, None = no limit), `sparse` (a `Sparse`: of keys far behind only some, at the cost of
    those), `key_lengths` (B,) and `cu_seqlens` (packed documents) by "and". Where positions are compared and
    T != S or lengths differ, `causal_align` must name the corner: "lower_right" (the last query sees the last key)
    or "upper_left". `softcap` c turns scores s into c tanh(s/c); `alibi_slopes` (H,) subtracts slope * distance. A
    query that may attend to nothing gets output 0, log-sum-exp -inf and gradient 0. `dropout_p` always applies:
    pass 0 when evaluating. NaN or infinity in a value that is masked reaches the output all the same, as 0 * NaN:
    pad with finite numbers.

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
        "sparse": sparse,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "key_lengths": key_lengths,
        "cu_seqlens": cu_seqlens,
        "dropout_p": dropout_p,
    }
    problem = make_problem(op, q, k, v, **options)
    B, H, T, _ = q.shape
    mask, additive = split_mask(op, attn_mask, B, H, T, k.shape[2])
    bias: Any = None
    if additive is not None:  # a Tensor keeps its gradient, and its device
        bias = attn_mask if isinstance(attn_mask, Tensor) else like(q, additive)
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
    other than `buffers`, runs in NumPy, many times slower, with one `RuntimeWarning` that says why; on a GPU it is a
    `ConfigError`, and an index beyond a buffer goes unseen. A comparison of the score, as in `if score > 0`, needs
    `score.real` to be differentiated, or a `score_mod_grad`.
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
    for buffer in check_items(op, "buffers", buffers):
        if isinstance(buffer, Tensor) and buffer.requires_grad:
            raise DTypeError(op, "a buffer requires a gradient, which buffers do not get", "Pass buffer.detach()")
        arrays.append(plain(as_array(op, buffer)))
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
