"""Attention to near keys and a few far ones: what is seen, what it equals, and that nothing else is read."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import functional as F
from minitransformer import kernels, masks, tensor
from minitransformer.autograd import Tensor, grad
from minitransformer.errors import MiniTransformerError

TIGHT = {"rtol": 1e-11, "atol": 1e-11}
EVERY = 2**48
LENGTHS = st.integers(1, 150)


def inputs(T: int, S: int, B: int = 2, H: int = 2, K: int = 1, D: int = 3) -> list[Tensor]:
    rng = np.random.default_rng([T, S, B])
    return [tensor(rng.standard_normal(n), requires_grad=True) for n in ((B, H, T, D), (B, K, S, D), (B, K, S, D))]


def both(arrays: list[Tensor], **options: Any) -> list[np.ndarray]:
    """The output, and the gradients of a sum of it with weights."""
    out = F.scaled_dot_product_attention(*arrays, enable_gqa=True, **options)
    weights = np.random.default_rng(1).standard_normal(out.shape)
    return [out.numpy(), *grad((out * weights).sum(), arrays)]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **TIGHT)


@st.composite
def sparse(draw: st.DrawFn, B: int = 2) -> F.Sparse:
    start, step = draw(st.integers(0, 9)), draw(st.integers(1, 40))
    stop = draw(st.sampled_from([start, start + 1, 30, EVERY]))
    origins = st.sampled_from([1, B]).flatmap(lambda n: st.lists(st.integers(-30, 30), min_size=n, max_size=n))
    left, block = draw(st.integers(0, 50)), draw(st.integers(1, 50))
    return F.Sparse(range(start, stop, step), left, block, np.array(draw(origins)))


def seen(rule: F.Sparse, b: int, q: int, k: int) -> bool:
    """The definition, cell by cell."""
    origin = int(rule.origin[b % len(rule.origin)])
    return k - origin in rule.far or k - origin >= (q - origin) // rule.block * rule.block - rule.left


@given(rule=sparse(), T=LENGTHS, S=LENGTHS, causal=st.booleans(), align=st.sampled_from(["lower_right", "upper_left"]))
def test_it_is_the_mask_of_its_definition(rule: F.Sparse, T: int, S: int, causal: bool, align: str) -> None:
    shift = S - T if align == "lower_right" else 0
    mask = np.array([[[seen(rule, b, t + shift, k) for k in range(S)] for t in range(T)] for b in range(2)])
    arrays, corner = inputs(T, S), {"is_causal": causal, "causal_align": align}
    assert_same(both(arrays, sparse=rule, **corner), both(arrays, attn_mask=mask[:, None], **corner))


@given(T=LENGTHS, n=st.integers(0, 20), left=st.integers(0, 20), stride=st.integers(1, 30))
def test_it_is_what_the_masks_say(T: int, n: int, left: int, stride: int) -> None:
    arrays = inputs(T, T)
    first = masks.causal() & (masks.window(left, 0) | masks.prefix(n))
    assert_same(both(arrays, sparse=F.Sparse(range(n), left), is_causal=True), both(arrays, attn_mask=first))
    blocks = masks.causal() & masks.strided(stride, stride)
    rule = F.Sparse(range(stride - 1, EVERY, stride), block=stride)
    assert_same(both(arrays, sparse=rule, is_causal=True), both(arrays, attn_mask=blocks))


@given(T=LENGTHS, more=st.integers(0, 3), origin=st.integers(-9, 9))
def test_at_its_limits_it_is_no_rule(T: int, more: int, origin: int) -> None:
    arrays = inputs(T, T)
    full = both(arrays, is_causal=True)
    every, block = F.Sparse(range(EVERY), origin=np.array([min(origin, 0)])), F.Sparse(range(0), block=T + more)
    for rule in (F.Sparse(range(T + more)), F.Sparse(range(0), left=T + more), every, block):
        assert_same(both(arrays, sparse=rule, is_causal=True), full)


@given(rule=sparse(), T=st.integers(2, 150), data=st.data())
def test_the_future_does_not_leak(rule: F.Sparse, T: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, T - 1), label="first changed")
    q, k, v = inputs(T, T)
    options = {"sparse": rule, "is_causal": True, "enable_gqa": True}
    before = F.scaled_dot_product_attention(q, k, v, **options).numpy()
    k.data[:, :, t:], v.data[:, :, t:] = 5, -50
    after = F.scaled_dot_product_attention(q, k, v, **options).numpy()
    np.testing.assert_array_equal(after[:, :, :t], before[:, :, :t])


@given(rule=sparse(), T=st.integers(1, 80), data=st.data())
def test_with_a_cache_it_is_the_full_pass(rule: F.Sparse, T: int, data: st.DataObject) -> None:
    """The last queries alone, behind keys of which the first were dropped where nobody sees them."""
    start = data.draw(st.integers(0, T - 1), label="first query")
    q, k, v = (x.numpy() for x in inputs(T, T))
    options = {"is_causal": True, "causal_align": "lower_right", "enable_gqa": True}
    whole = F.scaled_dot_product_attention(q, k, v, sparse=rule, window_size=(20, 0), **options).numpy()
    dropped = max(0, start - 20)
    late = rule._replace(origin=rule.origin - dropped)
    kept = (q[:, :, start:], k[:, :, dropped:], v[:, :, dropped:])
    ours = F.scaled_dot_product_attention(*kept, sparse=late, window_size=(20, 0), **options).numpy()
    np.testing.assert_allclose(ours, whole[:, :, start:], **TIGHT)


@pytest.mark.parametrize("rule", [F.Sparse(range(2), left=9), F.Sparse(range(19, EVERY, 20), block=20)], ids=str)
def test_what_nobody_sees_is_not_read(rule: F.Sparse) -> None:
    """NaN behind a mask is 0 * NaN. In keys that no later query sees it is nowhere: their tiles are not visited."""
    T, hidden = 700, slice(101, 119)
    q, k, v = (x.numpy().astype(np.float32) for x in inputs(T, T))
    k[:, :, hidden] = v[:, :, hidden] = np.nan
    with kernels.use_backend("cpu"):
        arrays = [tensor(x, requires_grad=True) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*arrays, sparse=rule, is_causal=True, enable_gqa=True)
        late = slice(300, None)
        assert np.isfinite(out.numpy()[:, :, late]).all()
        (dq,) = grad(out[:, :, late].sum(), arrays[:1])
    assert np.isfinite(dq[:, :, late]).all()
    assert np.isfinite(out.numpy()[:, :, :80]).all() and not np.isfinite(out.numpy()[:, :, 110]).any()


@pytest.mark.parametrize("rule", [F.Sparse(range(4), left=100), F.Sparse(range(63, EVERY, 64), block=64)], ids=str)
def test_nothing_of_the_size_of_all_scores_is_made(rule: F.Sparse) -> None:
    T = 4096
    arrays = [tensor(np.ones((1, 1, T, 8), np.float32), requires_grad=True) for _ in range(3)]

    def work() -> None:
        out = F.scaled_dot_product_attention(*arrays, sparse=rule, is_causal=True)
        grad(out.sum(), arrays)

    work()
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < T * T / 8  # a bit for each score


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("strided", "sparse is 'strided', expected a Sparse. Pass F.Sparse(range(4), left=255)."),
        (
            F.Sparse(range(3, -1, -1)),
            "far is range(3, -1, -1), expected a range that ascends from 0 or more, to 2**48 at most. Pass range(n) "
            "for the first n keys, range(s - 1, S, s) for the last of every s.",
        ),
        (F.Sparse(range(3), left=-1), "left is -1, expected an integer from 0. Change left."),
        (F.Sparse(range(3), block=0), "block is 0, expected an integer from 1. Change block."),
        (
            F.Sparse(range(3), origin=np.zeros(3, int)),
            "origin has shape (3,), expected (1,) or (2,). Give one key per row.",
        ),
        (F.Sparse(range(3), origin=np.zeros(1)), "origin has dtype float64, expected integers. Pass an integer array."),
        (
            F.Sparse(range(3), origin=np.array([2**60])),
            f"origin is [{2**60}], expected at most 2**48. Count keys from 0.",
        ),
        (
            F.Sparse(range(3), origin=np.array([-(2**63)])),
            f"origin is [{-(2**63)}], expected at most 2**48. Count keys from 0.",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(rule: Any, message: str) -> None:
    with pytest.raises(MiniTransformerError) as error:
        F.scaled_dot_product_attention(*inputs(3, 3), enable_gqa=True, sparse=rule)
    assert str(error.value) == f"attention: {message}"


def test_queries_that_are_not_at_their_keys_need_a_corner() -> None:
    with pytest.raises(MiniTransformerError, match="3 queries and 4 keys can be compared from either corner"):
        F.scaled_dot_product_attention(*inputs(3, 4), enable_gqa=True, sparse=F.Sparse(range(1)))
