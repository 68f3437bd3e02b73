"""Norms, losses, embedding, dropout, products and positions against independent formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import random
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError

RNG = np.random.default_rng(0)


# ---- norms ------------------------------------------------------------------------------------------


@given(hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), st.integers(1, 2), st.integers(0, 9))
def test_norms_by_their_formulas(shape: tuple[int, ...], axes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tail, last = shape[-axes:], tuple(range(-axes, 0))
    x, w, b = rng.standard_normal(shape), rng.standard_normal(tail), rng.standard_normal(tail)
    normed = (x - x.mean(last, keepdims=True)) / np.sqrt(x.var(last, keepdims=True) + 1e-5)
    np.testing.assert_allclose(F.layer_norm(x, tail, w, b).data, w * normed + b, rtol=1e-10, atol=1e-12)
    rms = w * x / np.sqrt((x * x).mean(last, keepdims=True) + 1e-5)
    np.testing.assert_allclose(F.rms_norm(x, tail, w).data, rms, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 3.25, -1e4, 1e15])
def test_layer_norm_of_constant_rows_is_the_bias(value: float, dtype: Any) -> None:
    x = mt.tensor(np.full((2, 4), value, dtype), requires_grad=True)
    bias = np.array([1, 2, 3, 4], dtype)
    out = F.layer_norm(x, 4, np.ones(4, dtype), bias)
    np.testing.assert_array_equal(out.data, np.stack([bias, bias]))
    (dx,) = mt.grad((out * np.array([1, -1, 2, 5], dtype)).sum(), [x])
    assert np.isfinite(dx).all()


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e15), (np.float64, 1e150), (np.float32, 1e-15)])
def test_norms_of_huge_and_small_rows(dtype: Any, size: float) -> None:
    row = np.array([[1, -1, 3, -3]], dtype)
    x = mt.tensor(row * dtype(size), requires_grad=True)
    unit = row / math.sqrt(5) if size > 1 else row * size / math.sqrt(1e-5)
    for out in (F.layer_norm(x, 4), F.rms_norm(x, 4)):
        np.testing.assert_allclose(out.data, unit, rtol=1e-6)
        assert np.isfinite(mt.grad(out[0, 0], [x])[0]).all()


def test_norm_refusals() -> None:
    x = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"layer_norm: x has shape \(2, 3\), expected its last axes to be \(4,\)"):
        F.layer_norm(x, 4)
    with pytest.raises(ShapeError, match=r"rms_norm: x has shape \(2, 3\), expected its last axes to be \(1, 2, 3\)"):
        F.rms_norm(x, (1, 2, 3))
    with pytest.raises(ShapeError, match=r"layer_norm: bias has shape \(2,\), expected \(3,\)"):
        F.layer_norm(x, 3, np.ones(3), np.ones(2))
    with pytest.raises(DTypeError, match="rms_norm: weight has dtype int64, expected float32 or float64"):
        F.rms_norm(x, 3, np.ones(3, int))
    with pytest.raises(DTypeError, match="layer_norm: x has dtype int64"):
        F.layer_norm(np.ones((2, 3), int), 3)


# ---- losses -----------------------------------------------------------------------------------------


@given(st.data())
def test_cross_entropy_by_brute_force(data: st.DataObject) -> None:
    V, N = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 5))
    targets = data.draw(st.lists(st.sampled_from([-1, *range(V)]), min_size=N, max_size=N))
    smoothing = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    logits = np.random.default_rng(N).standard_normal((N, V))
    losses = []
    for row, target in zip(logits, targets, strict=True):
        logp = [v - math.log(sum(math.exp(u) for u in row)) for v in row]
        own = 0.0 if target == -1 else (1 - smoothing) * -logp[target] + smoothing * -sum(logp) / V
        losses.append(own)
    counted = sum(t != -1 for t in targets)
    for reduction, expected in (("none", losses), ("sum", sum(losses)), ("mean", sum(losses) / max(counted, 1))):
        got = F.cross_entropy(
            logits,
            np.array(targets, np.int64),
            ignore_index=-1,
            label_smoothing=smoothing,
            reduction=reduction,
        )
        np.testing.assert_allclose(got.data, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_extreme_logits(dtype: Any) -> None:
    logits = mt.tensor(np.array([[1e30, 0, -1e30], [-np.inf, 0, 0], [1e4, -1e4, 0]], dtype), requires_grad=True)
    losses = F.cross_entropy(logits, np.array([0, 1, 1]), reduction="none")
    np.testing.assert_allclose(losses.data, [0, math.log(2), 2e4], rtol=1e-6)
    (dlogits,) = mt.grad(losses.sum(), [logits])
    np.testing.assert_allclose(dlogits, [[0, 0, 0], [0, -0.5, 0.5], [1, -1, 0]], atol=1e-6)


def test_ignored_rows_may_hold_anything_and_all_ignored_is_0() -> None:
    logits = mt.tensor(np.array([[np.nan, np.inf], [0.0, 0.0]]), requires_grad=True)
    loss = F.cross_entropy(logits, np.array([-100, 0]))
    assert loss.item() == pytest.approx(math.log(2))
    np.testing.assert_array_equal(mt.grad(loss, [logits])[0], [[0, 0], [-0.5, 0.5]])
    none = F.cross_entropy(logits, np.array([-100, -100]))
    assert none.item() == 0
    np.testing.assert_array_equal(mt.grad(none, [logits])[0], np.zeros((2, 2)))


def test_one_row_takes_a_number_as_its_target() -> None:
    assert F.cross_entropy(np.zeros(4), 2).item() == pytest.approx(math.log(4))


def test_mse_and_kl_by_their_formulas() -> None:
    a, b = RNG.standard_normal((3, 4)), RNG.standard_normal((3, 4))
    p, logq = F.softmax(a).data, F.log_softmax(b).data
    square, divergence = (a - b) ** 2, p * (np.log(p) - logq)
    for reduction, reduce in (("none", lambda x: x), ("sum", np.sum), ("mean", np.mean)):
        np.testing.assert_allclose(F.mse_loss(a, b, reduction=reduction).data, reduce(square), rtol=1e-13)
        for target, log in ((p, False), (np.log(p), True)):
            got = F.kl_div(logq, target, reduction=reduction, log_target=log)
            np.testing.assert_allclose(got.data, reduce(divergence), rtol=1e-12)
    assert F.kl_div(logq, p, reduction="batchmean").item() == pytest.approx(divergence.sum() / 3)
    assert F.kl_div(np.log(p), p, reduction="sum").item() == pytest.approx(0, abs=1e-15)
    q = mt.tensor([0.0, 1.0], requires_grad=True)
    loss = F.kl_div(np.array([-1.0, -1.0], np.float32), q, reduction="sum")
    assert loss.item() == 1
    np.testing.assert_array_equal(mt.grad(loss, [q])[0], [0, 2])


LOGITS = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.cross_entropy(LOGITS, np.zeros(3, int)), ShapeError, r"target has shape \(3,\), expected \(2,\)"),
        (lambda: F.cross_entropy(LOGITS, np.zeros(2)), DTypeError, "target has dtype float64, expected integer class"),
        (lambda: F.cross_entropy(LOGITS, np.array([0, 3])), RangeError, r"position \(1,\) is 3, expected 0 to 2 or"),
        (lambda: F.cross_entropy(LOGITS, np.array([-1, 0])), RangeError, r"position \(0,\) is -1, .*ignore_index -100"),
        (
            lambda: F.cross_entropy(LOGITS, np.zeros(2, int), label_smoothing=1.5),
            ConfigError,
            "label_smoothing is 1.5, expected 0 to 1",
        ),
        (
            lambda: F.cross_entropy(LOGITS, np.zeros(2, int), reduction="avg"),
            ConfigError,
            r"reduction is 'avg', expected one of \('mean', 'sum', 'none'\)",
        ),
        (lambda: F.cross_entropy(LOGITS.astype(int), np.zeros(2, int)), DTypeError, "input has dtype int64"),
        (lambda: F.mse_loss(LOGITS, LOGITS[0]), ShapeError, r"mse_loss: input has shape \(2, 3\), target \(3,\)"),
        (lambda: F.kl_div(LOGITS, LOGITS[0]), ShapeError, r"kl_div: input has shape \(2, 3\), target \(3,\)"),
        (lambda: F.mse_loss(LOGITS, LOGITS, reduction="batchmean"), ConfigError, "reduction is 'batchmean'"),
    ],
)
def test_loss_refusals(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- embedding, linear, einsum ----------------------------------------------------------------------


@given(st.integers(1, 6), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), st.integers(0, 99))
def test_embedding_is_a_one_hot_product(V: int, shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = mt.tensor(rng.standard_normal((V, 3)), requires_grad=True)
    ids = np.asarray(rng.integers(0, V, shape))
    upstream = rng.standard_normal((*shape, 3))
    onehot = np.eye(V)[ids]
    out = F.embedding(ids, weight)
    np.testing.assert_array_equal(out.data, weight.data[ids])
    (dweight,) = mt.grad(out, [weight], upstream)
    expected = onehot.reshape(-1, V).T @ upstream.reshape(-1, 3)
    np.testing.assert_allclose(dweight, expected, atol=1e-13)


def test_embedding_refusals() -> None:
    weight = np.zeros((4, 2))
    with pytest.raises(RangeError, match=r"the id at position \(1, 0\) is 4, expected 0 to 3 \(vocabulary size 4\)"):
        F.embedding(np.array([[0, 1], [4, -1]]), weight)
    with pytest.raises(RangeError, match=r"position \(\) is -1"):
        F.embedding(np.array(-1), weight)
    with pytest.raises(DTypeError, match="ids have dtype float64, expected an integer type"):
        F.embedding(np.zeros(2), weight)
    with pytest.raises(ShapeError, match=r"weight has shape \(2,\), expected \(V, C\)"):
        F.embedding(np.zeros(2, int), np.zeros(2))


@given(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4), st.integers(0, 4))
def test_linear_is_its_definition(shape: tuple[int, ...], width: int) -> None:
    rng = np.random.default_rng(0)
    x, w, b = rng.standard_normal(shape), rng.standard_normal((width, shape[-1])), rng.standard_normal(width)
    np.testing.assert_allclose(F.linear(x, w, b).data, np.einsum("...i,oi->...o", x, w) + b, atol=1e-13)
    np.testing.assert_allclose(F.linear(x, w).data, np.einsum("...i,oi->...o", x, w), atol=1e-13)


def test_linear_refusals() -> None:
    with pytest.raises(ShapeError, match=r"linear: x has shape \(2, 3\), weight \(3, 4\), expected \(\.\.\., C_in\)"):
        F.linear(np.ones((2, 3)), np.ones((3, 4)))
    with pytest.raises(ShapeError, match=r"linear: bias has shape \(3,\), expected \(4,\) for weight \(4, 3\)"):
        F.linear(np.ones((2, 3)), np.ones((4, 3)), np.ones(3))


@pytest.mark.parametrize("equation", ["ij,jk->ik", "ij,jk", "ba,ac", " ij , jk -> ki ", "ij,jk->", "ij,jk->j"])
def test_einsum_is_numpys(equation: str) -> None:
    a, b = RNG.standard_normal((2, 3)), RNG.standard_normal((3, 4))
    np.testing.assert_allclose(F.einsum(equation, a, b).data, np.einsum(equation, a, b), rtol=1e-13)


# ---- dropout ----------------------------------------------------------------------------------------


def test_dropout_keeps_the_same_elements_forward_and_backward() -> None:
    x = mt.tensor(np.ones((20, 30)), requires_grad=True)
    out = F.dropout(x, 0.3)
    (dx,) = mt.grad(out.sum(), [x])
    np.testing.assert_array_equal(out.data, dx)
    np.testing.assert_array_equal(np.unique(dx), [0, 1 / 0.7])


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_expectation(p: float) -> None:
    out = F.dropout(np.ones((100, 1000)), p).data
    assert abs(out.mean() - 1) < 5 * math.sqrt(p / (1 - p) / out.size)


def test_dropout_draws_anew_each_call_and_repeats_by_seed_and_address() -> None:
    x = np.ones((4, 64))
    first, second = F.dropout(x).data, F.dropout(x).data
    assert (first != second).any()
    mt.manual_seed(0)
    np.testing.assert_array_equal(F.dropout(x).data, first)
    with random.scope(seed=1, step=2):
        whole = F.dropout(x, site=3).data
        assert (F.dropout(x, site=4).data != whole).any()
    with random.scope(seed=1, step=2, first_row=2):
        np.testing.assert_array_equal(F.dropout(x[2:], site=3).data, whole[2:])


def test_dropout_off_is_the_tensor_itself() -> None:
    x = mt.tensor([1.0])
    assert F.dropout(x, 0.0) is x and F.dropout(x, 0.5, training=False) is x
    assert isinstance(F.dropout(np.ones(2), 0.0), mt.Tensor)


@pytest.mark.parametrize("p", [1.0, -0.1, "0.5", True, math.nan])
def test_dropout_rates_are_checked(p: Any) -> None:
    with pytest.raises(ConfigError, match=r"dropout: the dropout rate is .*, expected a number in \[0, 1\)"):
        F.dropout(np.ones(2), p)


# ---- positions --------------------------------------------------------------------------------------


@given(st.sampled_from(["half", "interleaved"]), st.integers(-1000, 1000), st.integers(1, 4), st.integers(0, 9))
def test_rope_scores_depend_on_distance_only(layout: str, shift: int, half: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, 1, 1, 4, 2 * half))
    positions = np.array([3, 0, 7, 7])

    def scores(at: np.ndarray) -> np.ndarray:
        turned = [F.apply_rope(x, at, layout=layout).data for x in (q, k)]
        return turned[0] @ turned[1].swapaxes(-1, -2)

    np.testing.assert_allclose(scores(positions + shift), scores(positions), rtol=1e-9, atol=1e-9)


def test_rope_turns_each_pair_by_its_angle() -> None:
    x = RNG.standard_normal((2, 1, 3, 6))
    positions = np.array([[0, 1, 5], [2, 2, 9]])
    for layout, pairs in (("half", [(0, 3), (1, 4), (2, 5)]), ("interleaved", [(0, 1), (2, 3), (4, 5)])):
        got = F.apply_rope(x, positions, base=100.0, layout=layout).data
        for i, (a, b) in enumerate(pairs):
            turned = (x[..., a] + 1j * x[..., b]) * np.exp(1j * positions * 100.0 ** (-2 * i / 6))[:, None]
            np.testing.assert_allclose(got[..., a] + 1j * got[..., b], turned, rtol=1e-13, atol=1e-14)


def test_rope_keeps_lengths_and_positions_far_out() -> None:
    x = RNG.standard_normal((1, 2, 3, 8)).astype(np.float32)
    got = F.apply_rope(x, np.array([0, 10**7, 10**7 + 1]))
    assert got.dtype == np.float32
    np.testing.assert_allclose((got.data**2).sum(-1), (x**2).sum(-1), rtol=1e-5)
    exact = F.apply_rope(x.astype(np.float64), np.array([0, 10**7, 10**7 + 1])).data
    np.testing.assert_allclose(got.data, exact, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "positions", "options", "error", "message"),
    [
        (
            (1, 1, 2, 3),
            np.arange(2),
            {},
            ShapeError,
            r"x has shape \(1, 1, 2, 3\), expected \(B, H, T, D\) with even D",
        ),
        ((2, 4), np.arange(2), {}, ShapeError, "expected .B, H, T, D."),
        ((1, 1, 2, 4), np.arange(3), {}, ShapeError, r"positions have shape \(3,\), expected \(2,\) or \(1, 2\)"),
        ((1, 1, 2, 4), np.arange(2.0), {}, DTypeError, "positions are not integers"),
        ((1, 1, 2, 4), np.arange(2), {"layout": "paper"}, ConfigError, "layout is 'paper', expected one of"),
    ],
)
def test_rope_refusals(x: Any, positions: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match="apply_rope: .*" + message):
        F.apply_rope(np.ones(x), positions, **options)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_sinusoidal_positions(width: int) -> None:
    table = F.sinusoidal_positions(5, width)
    assert table.shape == (5, width)
    for t in range(5):
        for c in range(width):
            angle = t / 10000 ** ((c - c % 2) / width)
            assert table[t, c] == pytest.approx(math.cos(angle) if c % 2 else math.sin(angle), abs=1e-14)


def test_alibi_slopes() -> None:
    np.testing.assert_allclose(F.alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(F.alibi_slopes(3), [2**-4, 2**-8, 2**-2])
    np.testing.assert_allclose(F.alibi_slopes(1), [2**-8])
    with pytest.raises(ConfigError, match="num_heads is 0, expected a positive integer"):
        F.alibi_slopes(0)
