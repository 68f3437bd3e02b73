"""Linear attention against its formula with all T x S weights, and the laws that it has beside it."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
import minitransformer.functional as F
from minitransformer.errors import ConfigError, DTypeError, MiniTransformerError, ShapeError
from minitransformer.kernels import use_backend

BACKENDS = ["cpu", "reference"]
LENGTHS = st.integers(1, 12) | st.sampled_from([31, 32, 33, 70])


def normal(*shape: int, seed: int = 0, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def arrays(B: int, H: int, K: int, T: int, S: int, D: int, E: int, seed: int = 0) -> list[np.ndarray]:
    """q, k, v and an upstream gradient."""
    shapes = (B, H, T, D), (B, K, S, D), (B, K, S, E), (B, H, T, E)
    return [normal(*shape, seed=4 * seed + n) for n, shape in enumerate(shapes)]


def results(function: Any, q: Any, k: Any, v: Any, dout: np.ndarray, **options: Any) -> list[np.ndarray]:
    """out, dq, dk, dv"""
    leaves = [mt.Tensor(x, requires_grad=True) for x in (q, k, v)]
    out = function(*leaves, **options)
    out.backward(dout)
    return [out.data, *(leaf.grad for leaf in leaves)]


def elu_plus_one(x: Any) -> Any:
    return F.maximum(x, 0.0) + F.minimum(x, 0.0).exp()


def direct(q: Any, k: Any, v: Any, is_causal: bool = False, feature_map: str | None = "elu") -> Any:
    """By the formula, out of ops with gradients of their own."""
    H, K, (T, S) = q.shape[1], k.shape[1], (q.shape[2], k.shape[2])
    heads = np.arange(H) // (H // K)
    if feature_map is not None:
        q, k = elu_plus_one(q), elu_plus_one(k)
    weights = q @ k[:, heads].transpose(-1, -2)
    if is_causal:
        weights = F.where(np.tri(T, S, dtype=bool), weights, 0.0)
    return (weights @ v[:, heads]) / weights.sum(dim=-1, keepdim=True)


def assert_close(ours: Any, theirs: Any, factor: float = 200) -> None:
    """To some roundings of the largest number."""
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape
        eps = float(np.finfo(x.dtype).eps)
        np.testing.assert_allclose(x, y, rtol=0, atol=factor * eps * max(1.0, float(abs(y).max(initial=0))))


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    st.tuples(*[st.integers(1, 3)] * 3, LENGTHS, LENGTHS, *[st.integers(1, 18)] * 2),
    st.booleans(),
    st.sampled_from(["elu", None]),
    st.sampled_from([np.float32, np.float64]),
)
def test_it_is_the_formula(
    backend: str, sizes: tuple[int, ...], is_causal: bool, feature_map: str | None, dtype: Any
) -> None:
    B, K, group, T, S, D, E = sizes
    q, k, v, dout = arrays(B, K * group, K, T, T if is_causal else S, D, E)
    if feature_map is None:
        q, k = abs(q) + 0.1, abs(k) + 0.1
    q, k, v, dout = (x.astype(np.float32) for x in (q, k, v, dout))
    options = {"is_causal": is_causal, "feature_map": feature_map}
    exact = results(direct, *(x.astype(np.float64) for x in (q, k, v, dout)), **options)
    with use_backend(backend):
        ours = results(F.linear_attention, *(x.astype(dtype) for x in (q, k, v, dout)), **options)
    assert all(x.dtype == dtype for x in ours)
    assert_close(ours, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@given(LENGTHS, st.data())
def test_a_causal_query_does_not_see_the_future(backend: str, T: int, data: st.DataObject) -> None:
    """Nor how much of it there is; gradients of what comes later do not reach back to it either."""
    t = data.draw(st.integers(0, T - 1))
    q, k, v, dout = arrays(1, 2, 1, T, T, 5, 3)
    with use_backend(backend):
        whole = results(F.linear_attention, q, k, v, dout, is_causal=True)
        q2, k2, v2 = (np.concatenate([x[:, :, : t + 1], 9 - 2 * x[:, :, t + 1 :]], axis=2) for x in (q, k, v))
        changed = F.linear_attention(q2, k2, v2, is_causal=True).numpy()
        short = F.linear_attention(*(x[:, :, : t + 1] for x in (q, k, v)), is_causal=True).numpy()
        dout[:, :, :t] = 0
        late = results(F.linear_attention, q, k, v, dout, is_causal=True)
    if backend == "cpu":
        np.testing.assert_array_equal(changed[:, :, : t + 1], whole[0][:, :, : t + 1])
        np.testing.assert_array_equal(short, whole[0][:, :, : t + 1])
    assert_close([changed[:, :, : t + 1], short], [whole[0][:, :, : t + 1]] * 2)
    assert not late[1][:, :, :t].any()
    for late_gradient, gradient in zip(late[2:], whole[2:], strict=True):  # keys from t on have no earlier query
        assert_close([late_gradient[:, :, t:]], [gradient[:, :, t:]])


@given(st.integers(0, 2**32 - 1))
def test_the_order_of_keys_does_not_matter(seed: int) -> None:
    q, k, v, dout = arrays(2, 2, 1, 7, 40, 5, 3)
    order = np.random.default_rng(seed).permutation(40)
    out, dq, dk, dv = results(F.linear_attention, q, k, v, dout)
    moved = results(F.linear_attention, q, k[:, :, order], v[:, :, order], dout)
    assert_close(moved, [out, dq, dk[:, :, order], dv[:, :, order]])


@pytest.mark.parametrize("is_causal", [False, True])
@given(st.integers(1, 3), st.integers(1, 3), LENGTHS)
def test_shared_heads_are_repeated_heads(is_causal: bool, K: int, group: int, T: int) -> None:
    q, k, v, dout = arrays(2, K * group, K, T, T, 4, 6)
    shared = results(F.linear_attention, q, k, v, dout, is_causal=is_causal)
    repeated = results(
        F.linear_attention, q, np.repeat(k, group, axis=1), np.repeat(v, group, axis=1), dout, is_causal=is_causal
    )
    for x, y in zip(shared[:2], repeated[:2], strict=True):
        np.testing.assert_array_equal(x, y)
    folded = [x.reshape(2, K, group, *x.shape[2:]).sum(axis=2) for x in repeated[2:]]
    assert_close(shared[2:], folded)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_add_up_to_one(backend: str, is_causal: bool) -> None:
    q, k, v, _ = arrays(2, 2, 2, 40, 40, 5, 3)
    with use_backend(backend):
        out = F.linear_attention(q, k, np.full_like(v, 0.7), is_causal=is_causal).numpy()
        first = F.linear_attention(q, k, v, is_causal=True).numpy()[:, :, 0]
    np.testing.assert_allclose(out, 0.7, rtol=1e-13)
    np.testing.assert_allclose(first, v[:, :, 0], rtol=1e-14)


def test_features_may_be_ones_own() -> None:
    q, k, v, dout = arrays(1, 2, 1, 9, 9, 4, 3)

    def mapped(q: Any, k: Any, v: Any) -> Any:
        return F.linear_attention(elu_plus_one(q), elu_plus_one(k), v, is_causal=True, feature_map=None)

    assert_close(results(mapped, q, k, v, dout), results(F.linear_attention, q, k, v, dout, is_causal=True))
    scaled = [F.linear_attention(2.0**n * abs(q), abs(k), v, feature_map=None).numpy() for n in (0, 9)]
    np.testing.assert_array_equal(*scaled)  # a query's length cancels


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("feature_map", "nothing"), [("elu", -2000.0), (None, 0.0)])
def test_a_query_without_weights(
    feature_map: str | None, nothing: float, is_causal: bool, backend: str, dtype: Any
) -> None:
    """Output and gradient 0, and for all others it is as if it were not there."""
    q, k, v, dout = (x.astype(dtype) for x in arrays(1, 2, 1, 36, 36, 4, 3))
    q, k = abs(q), abs(k)
    q[:, :, 34] = nothing
    options = {"is_causal": is_causal, "feature_map": feature_map}
    silent = dout.copy()
    silent[:, :, 34] = 0
    with use_backend(backend):
        out, dq, dk, dv = results(F.linear_attention, q, k, v, dout, **options)
        _, dq2, dk2, dv2 = results(F.linear_attention, q, k, v, silent, **options)
    assert not out[:, :, 34].any() and not dq[:, :, 34].any()
    assert out[:, :, 33].any() and dq[:, :, 35].any()
    for x, y in ((dq, dq2), (dk, dk2), (dv, dv2)):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_without_weights(backend: str) -> None:
    """The first two keys count for nothing, so the first two causal queries have no weights at all."""
    q, k, v, dout = arrays(1, 1, 1, 5, 5, 4, 3)
    k[:, :, :2] = -2000
    with use_backend(backend):
        out, dq, dk, dv = results(F.linear_attention, q, k, v, dout, is_causal=True)
        rest = results(F.linear_attention, *(x[:, :, 2:] for x in (q, k, v, dout)), is_causal=True)
    for x, y in zip((out, dq, dk, dv), rest, strict=True):
        assert not x[:, :, :2].any()
        assert_close([x[:, :, 2:]], [y])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys(backend: str) -> None:
    q, k, v, dout = arrays(2, 2, 1, 3, 0, 4, 5)
    with use_backend(backend):
        out, dq, dk, dv = results(F.linear_attention, q, k, v, dout)
    assert out.shape == (2, 2, 3, 5) and not out.any() and not dq.any()
    assert dk.shape == k.shape and dv.shape == v.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_grows_with_the_length(is_causal: bool, backend: str) -> None:
    """All weights would be 128 MiB."""
    q, k, v, dout = arrays(1, 1, 1, 4096, 4096, 4, 4)
    tracemalloc.start()
    try:
        with use_backend(backend):
            results(F.linear_attention, q, k, v, dout, is_causal=is_causal)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


X = np.ones((2, 4, 3, 8))


@pytest.mark.parametrize(
    ("qkv", "options", "error", "message"),
    [
        ((X[0], X, X), {}, ShapeError, "expected 4 axes .*Split the heads first"),
        ((X, X[:1], X), {}, ShapeError, "the batch sizes differ"),
        ((X, X[..., :5], X), {}, ShapeError, "key has head width 5, query has 8 .*Project both"),
        ((X, X, X[:, :, :2]), {}, ShapeError, "key and value differ in heads or length"),
        ((X, X[:, :3], X[:, :3]), {}, ShapeError, "4 query heads cannot share 3 key heads"),
        ((X.astype(int), X, X), {}, DTypeError, "query has dtype int64"),
        (
            (X, X[:, :, :2], X[:, :, :2]),
            {"is_causal": True},
            ShapeError,
            r"is_causal lets query t see the keys up to t, but there are 3 queries and 2 keys "
            r"\(query \(2, 4, 3, 8\), key \(2, 4, 2, 8\)\)\. Pass as many keys as queries, or leave is_causal out",
        ),
        ((X, X, X), {"is_causal": 1}, ConfigError, "is_causal is 1, expected a bool"),
        ((X, X, X), {"feature_map": "relu"}, ConfigError, r"feature_map is 'relu', expected one of \('elu', None\)"),
    ],
)
def test_refusals(qkv: Any, options: dict[str, Any], error: type[MiniTransformerError], message: str) -> None:
    with pytest.raises(error, match="^linear_attention: " + message):
        F.linear_attention(*qkv, **options)
