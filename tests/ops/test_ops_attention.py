"""The laws of attention, on the reference and through the public function."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import masks, random
from minitransformer.errors import DTypeError

attend = F.scaled_dot_product_attention
INF = np.inf
SIZES = st.fixed_dictionaries({n: st.integers(1, 4) for n in "BHTSD"} | {"seed": st.integers(0, 99)})


def arrays(
    B: int = 2, H: int = 2, T: int = 4, S: int = 4, D: int = 3, seed: int = 0, K: int | None = None
) -> list[Any]:
    rng = np.random.default_rng(seed)
    K = H if K is None else K
    return [rng.standard_normal(shape) for shape in ((B, H, T, D), (B, K, S, D), (B, K, S, D))]


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: Any = True, bias: Any = 0.0) -> np.ndarray:
    """Attention by loops, in Python numbers."""
    B, H, T, D = q.shape
    S = k.shape[2]
    allowed, bias = np.broadcast_to(allowed, (B, H, T, S)), np.broadcast_to(bias, (B, H, T, S))
    out = np.zeros((B, H, T, v.shape[3]))
    for b, h, t in np.ndindex(B, H, T):
        scores = {s: q[b, h, t] @ k[b, h, s] / math.sqrt(D) + bias[b, h, t, s] for s in range(S) if allowed[b, h, t, s]}
        total = sum(math.exp(x) for x in scores.values())
        for s, x in scores.items():
            out[b, h, t] += math.exp(x) / total * v[b, h, s] if total else 0
    return out


def gradients(call: Any, qkv: list[Any]) -> list[np.ndarray]:
    leaves = [mt.tensor(x, requires_grad=True) for x in qkv]
    out = call(*leaves)
    upstream = np.random.default_rng(3).standard_normal(out.shape)
    return [out.data, *mt.grad(out, leaves, upstream)]


def same(first: list[np.ndarray], second: list[np.ndarray], tolerance: float = 1e-12) -> None:
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@given(SIZES, st.data())
def test_attention_by_loops(sizes: dict[str, int], data: st.DataObject) -> None:
    q, k, v = arrays(**sizes)
    rng = np.random.default_rng(sizes["seed"])
    cells = tuple(data.draw(st.sampled_from([1, sizes[n]])) for n in "BHTS")
    allowed, bias = rng.random(cells) < 0.6, rng.standard_normal(cells)
    np.testing.assert_allclose(attend(q, k, v).data, plain(q, k, v), rtol=1e-12)
    np.testing.assert_allclose(attend(q, k, v, allowed).data, plain(q, k, v, allowed), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(attend(q, k, v, bias).data, plain(q, k, v, bias=bias), rtol=1e-12, atol=1e-14)


@given(SIZES, st.sampled_from(["lower_right", "upper_left"]), st.data())
def test_positional_rules_by_loops(sizes: dict[str, int], align: str, data: st.DataObject) -> None:
    """Causal, window and lengths, with the corner that was named: that of each row's own length."""
    q, k, v = arrays(**sizes)
    B, T, S = sizes["B"], sizes["T"], sizes["S"]
    lengths = data.draw(st.none() | st.lists(st.integers(0, S), min_size=B, max_size=B))
    left, right = data.draw(st.tuples(*[st.none() | st.integers(0, 3)] * 2))
    causal = data.draw(st.booleans())
    allowed = np.ones((B, 1, T, S), bool)
    for b, _, t, s in np.ndindex(allowed.shape):
        own = S if lengths is None else lengths[b]
        at = t + (own - T if align == "lower_right" else 0)
        allowed[b, 0, t, s] = (
            s < own
            and (not causal or s <= at)
            and (left is None or s >= at - left)
            and (right is None or s <= at + right)
        )
    got = attend(q, k, v, is_causal=causal, causal_align=align, window_size=(left, right), key_lengths=lengths)
    np.testing.assert_allclose(got.data, plain(q, k, v, allowed), rtol=1e-12, atol=1e-14)


def test_documents_attend_to_themselves() -> None:
    qkv = arrays(B=1, T=6, S=6)
    together = attend(*qkv, cu_seqlens=[0, 2, 2, 6], is_causal=True).data
    for start, end in ((0, 2), (2, 6)):
        alone = attend(*(x[:, :, start:end] for x in qkv), is_causal=True).data
        np.testing.assert_allclose(together[:, :, start:end], alone, rtol=1e-12)


# ---- laws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": np.zeros((4, 4), bool)},
        {"attn_mask": np.full((4, 4), -INF)},
        {"key_lengths": [0, 0]},
        {"is_causal": True, "key_lengths": [0, 0], "causal_align": "lower_right", "softcap": 2.0},
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_query_that_may_attend_to_nothing(options: dict[str, Any], dtype: Any) -> None:
    leaves = [mt.tensor(x.astype(dtype), requires_grad=True) for x in arrays()]
    out, weights, lse = attend(*leaves, need_weights=True, need_lse=True, **options)
    assert (out.data == 0).all() and (weights.data == 0).all() and (lse.data == -INF).all()
    loss = (out * 3.0).sum() + (weights * 2.0).sum() + (mt.where(lse.data > 0, lse, 1.0)).sum()
    for g in mt.grad(loss, leaves):
        assert (g == 0).all()


@given(SIZES)
def test_a_bool_mask_is_the_bias_0_or_minus_infinity(sizes: dict[str, int]) -> None:
    qkv = arrays(**sizes)
    mask = np.random.default_rng(1).random((sizes["T"], sizes["S"])) < 0.5
    bias = np.where(mask, 0.0, -INF)
    same(gradients(lambda *x: attend(*x, mask), qkv), gradients(lambda *x: attend(*x, bias), qkv))


@given(SIZES, st.sampled_from(["lower_right", "upper_left"]))
def test_causal_is_its_mask(sizes: dict[str, int], align: str) -> None:
    T, S = sizes["T"], sizes["S"]
    mask = np.tril(np.ones((T, S), bool), S - T if align == "lower_right" else 0)
    qkv = arrays(**sizes)
    expected = gradients(lambda *x: attend(*x, mask), qkv)
    same(gradients(lambda *x: attend(*x, is_causal=True, causal_align=align), qkv), expected)
    same(gradients(lambda *x: attend(*x, masks.causal(align)), qkv), expected)
    same(gradients(lambda *x: attend(*x, window_size=(None, 0), causal_align=align), qkv), expected)


def test_grouped_queries_are_repeated_keys_and_values() -> None:
    q, k, v = arrays(H=6, K=2)
    out, dq, dk, dv = gradients(lambda *x: attend(*x, enable_gqa=True), [q, k, v])
    repeated = [q, *(x.repeat(3, axis=1) for x in (k, v))]
    expected, dq_full, dk_full, dv_full = gradients(attend, repeated)
    folded = [g.reshape(2, 2, 3, 4, 3).sum(2) for g in (dk_full, dv_full)]
    same([out, dq, dk, dv], [expected, dq_full, *folded])


def test_a_window_as_long_as_the_row_is_no_window() -> None:
    qkv = arrays()
    for window in ((4, 4), (None, None), (3, 3), (None, 3)):
        same(gradients(lambda *x, w=window: attend(*x, window_size=w), qkv), gradients(attend, qkv), 0)


@given(SIZES)
def test_need_weights_changes_no_bit_and_the_weights_make_the_output(sizes: dict[str, int]) -> None:
    q, k, v = arrays(**sizes)
    mask = np.random.default_rng(2).random((sizes["T"], sizes["S"])) < 0.6
    out, weights, lse = attend(q, k, v, mask, need_weights=True, need_lse=True)
    assert out.data.tobytes() == attend(q, k, v, mask).data.tobytes()
    assert lse.data.tobytes() == attend(q, k, v, mask, need_lse=True)[1].data.tobytes()
    rows = np.broadcast_to(mask.any(-1), out.shape[:3])
    np.testing.assert_allclose(weights.data.sum(-1), rows, rtol=1e-13)
    assert (weights.data[..., ~mask] == 0).all()
    np.testing.assert_allclose(weights.data @ v, out.data, rtol=1e-12, atol=1e-14)


def test_weights_are_differentiable() -> None:
    """Through the weights as through a softmax composed of ops."""
    q, k, v = arrays()

    def composed(q: Any, k: Any, v: Any) -> mt.Tensor:
        return F.softmax(q @ k.transpose(-1, -2) / math.sqrt(3)) @ v

    def by_weights(q: Any, k: Any, v: Any) -> mt.Tensor:
        return attend(q, k, v, need_weights=True)[1] @ v

    expected = gradients(composed, [q, k, v])
    same(gradients(by_weights, [q, k, v]), expected)
    same(gradients(attend, [q, k, v]), expected)


@given(SIZES, st.randoms(use_true_random=False))
def test_the_order_of_keys_does_not_matter(sizes: dict[str, int], shuffle: Any) -> None:
    q, k, v = arrays(**sizes)
    order = list(range(sizes["S"]))
    shuffle.shuffle(order)
    mask = np.random.default_rng(2).random((sizes["T"], sizes["S"])) < 0.7
    np.testing.assert_allclose(
        attend(q, k[:, :, order], v[:, :, order], mask[:, order]).data, attend(q, k, v, mask).data, atol=1e-13
    )


@given(SIZES, st.integers(0, 4))
def test_halves_of_the_keys_merge_by_their_log_sum_exp(sizes: dict[str, int], cut: int) -> None:
    q, k, v = arrays(**sizes)
    cut = min(cut, sizes["S"])
    parts = [attend(q, k[:, :, s], v[:, :, s], need_lse=True) for s in (slice(cut), slice(cut, None))]
    whole, lse = (x.data for x in attend(q, k, v, need_lse=True))
    np.testing.assert_allclose(np.logaddexp(parts[0][1].data, parts[1][1].data), lse, rtol=1e-12, atol=1e-13)
    merged = sum(out.data * np.exp(part.data - lse)[..., None] for out, part in parts)
    np.testing.assert_allclose(merged, whole, rtol=1e-12, atol=1e-13)


@given(SIZES, st.integers(0, 3))
def test_later_keys_leave_earlier_outputs_bitwise_unchanged(sizes: dict[str, int], at: int) -> None:
    T = sizes["T"]
    sizes = {**sizes, "S": T}
    at = min(at, T - 1)
    q, k, v = arrays(**sizes)
    changed = [x.copy() for x in (k, v)]
    for x in changed:
        x[:, :, at + 1 :] = np.random.default_rng(9).standard_normal(x[:, :, at + 1 :].shape) * 100
    before, after = (attend(q, *kv, is_causal=True).data[:, :, : at + 1] for kv in ((k, v), changed))
    assert before.tobytes() == after.tobytes()


def test_masked_keys_may_hold_anything() -> None:
    """Padding leaks neither forward nor backward."""
    q, k, v = arrays()
    mask = np.array([True, True, False, True])
    dirty = [x.copy() for x in (k, v)]
    dirty[0][:, :, 2], dirty[1][:, :, 2] = 1e200, 7.0
    clean = gradients(lambda *x: attend(*x, mask), [q, k, v])
    got = gradients(lambda *x: attend(*x, mask), [q, *dirty])
    same(got, clean)
    assert (got[2][:, :, 2] == 0).all() and (got[3][:, :, 2] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huge_scores_do_not_overflow(dtype: Any) -> None:
    q, k, v = (x.astype(dtype) for x in arrays(D=4))
    out, weights = attend(q * dtype(1e10), k * dtype(1e10), v, need_weights=True)
    assert np.isfinite(out.data).all()
    np.testing.assert_allclose(weights.data.max(-1), 1)


def test_softcap_and_alibi_by_their_formulas() -> None:
    q, k, v = arrays(T=3, S=5)
    slopes = F.alibi_slopes(2)
    raw = q @ k.swapaxes(-1, -2) / math.sqrt(3)
    distance = np.abs(np.arange(3)[:, None] + 2 - np.arange(5))
    scores = 1.5 * np.tanh(raw / 1.5) - slopes[:, None, None] * distance
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    got = attend(q, k, v, softcap=1.5, alibi_slopes=slopes, causal_align="lower_right")
    np.testing.assert_allclose(got.data, weights @ v, rtol=1e-12)
    np.testing.assert_allclose(attend(q, k, v, scale=0.0).data, np.broadcast_to(v.mean(2, keepdims=True), got.shape))


def test_a_float64_mask_keeps_float32_attention() -> None:
    q, k, v = (x.astype(np.float32) for x in arrays())
    bias = np.where(np.tril(np.ones((4, 4), bool)), 0.0, -INF)
    out, weights, lse = attend(q, k, v, bias, need_weights=True, need_lse=True)
    assert {x.dtype for x in (out, weights, lse)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(out.data, attend(q, k, v, is_causal=True).data, rtol=1e-6)


def test_the_gradient_of_a_bias_sums_over_what_it_was_broadcast_to() -> None:
    q, k, v = arrays()
    full = np.random.default_rng(5).standard_normal((1, 2, 1, 4))
    wide, narrow = (mt.tensor(b, requires_grad=True) for b in (np.broadcast_to(full, (2, 2, 4, 4)), full))
    grads = [mt.grad((attend(q, k, v, b) * q).sum(), [b])[0] for b in (wide, narrow)]
    np.testing.assert_allclose(grads[0].sum((0, 2), keepdims=True), grads[1], atol=1e-13)


# ---- dropout --------------------------------------------------------------------------------------


def test_dropout_draws_one_mask_for_forward_and_backward() -> None:
    """With v = identity the output is the dropped weights, with dout = identity dv is their transpose."""
    T = 8
    q, k, _ = arrays(B=1, H=1, T=T, S=T)
    v = mt.tensor(np.eye(T)[None, None], requires_grad=True)
    out = attend(q, k, v, dropout_p=0.5)
    (dv,) = mt.grad(out, [v], np.eye(T)[None, None])
    weights = attend(q, k, v.data, need_weights=True)[1].data
    np.testing.assert_array_equal(np.swapaxes(dv, -1, -2) == 0, out.data == 0)
    np.testing.assert_allclose(np.swapaxes(dv, -1, -2), out.data, rtol=1e-12)
    np.testing.assert_allclose(out.data, np.where(out.data == 0, 0, 2 * weights), rtol=1e-12)
    assert 0 < (out.data == 0).sum() < T * T


def test_dropout_keeps_the_expectation_and_the_weights_before_it() -> None:
    q, k, v = arrays(B=1, H=1, T=1)
    many = [np.broadcast_to(x, (1, 4000, *x.shape[2:])) for x in (q, k, v)]
    out, weights = attend(*many, dropout_p=0.3, need_weights=True)
    expected = attend(q, k, v).data[0, 0]
    noise = math.sqrt(0.3 / 0.7 / 4000) * np.sqrt(weights.data[0, 0, 0] ** 2 @ v[0, 0] ** 2)
    assert (abs(out.data.mean(1)[0] - expected) < 5 * noise).all()
    np.testing.assert_allclose(weights.data.sum(-1), 1)


def test_dropout_of_a_shard_is_that_of_its_rows() -> None:
    qkv = arrays(B=4)
    with random.scope(seed=1, step=2):
        whole = attend(*qkv, dropout_p=0.5, dropout_site=7).data
    with random.scope(seed=1, step=2, first_row=2):
        shard = attend(*(x[2:] for x in qkv), dropout_p=0.5, dropout_site=7).data
    np.testing.assert_allclose(shard, whole[2:], rtol=1e-12)


# ---- flex_attention -------------------------------------------------------------------------------


def test_flex_attention_is_sdpa_with_functions() -> None:
    qkv = arrays()
    slopes = F.alibi_slopes(2)
    block = masks.create_block_mask(lambda b, h, q, k: q >= k, None, None, 4, 4)
    flex = gradients(
        lambda *x: F.flex_attention(*x, lambda s, b, h, q, k, slope: s - slope[h] * (q - k), block, buffers=(slopes,)),
        qkv,
    )
    same(flex, gradients(lambda *x: attend(*x, is_causal=True, alibi_slopes=slopes), qkv))
    out, lse = F.flex_attention(*qkv, need_lse=True)
    same([out.data, lse.data], [x.data for x in attend(*qkv, need_lse=True)])


def test_flex_attention_refusals() -> None:
    qkv = arrays()
    with pytest.raises(DTypeError, match="block_mask is a ndarray, expected a mask object"):
        F.flex_attention(*qkv, block_mask=np.ones((4, 4), bool))
    with pytest.raises(DTypeError, match="a buffer requires a gradient, which buffers do not get"):
        F.flex_attention(*qkv, buffers=(mt.tensor([1.0], requires_grad=True),))
    with pytest.raises(DTypeError, match=r"query has dtype float, expected float32"):
        F.flex_attention(2.0, *qkv[1:])
