"""Edges that mutants of the ops and kernels slipped through: the last case before a refusal, and the first after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
import minitransformer.functional as F
from minitransformer.autograd import OPS
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.optimizer.reference import adam_step, sgd_step

X = np.ones((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.einsum("ij->i", np.ones((2, 3, 4))), ShapeError, "einsum: equation 'ij->i' does not fit shapes"),
        (lambda: F.einsum("ij,j->i", np.ones((2, 3))), ShapeError, "einsum: equation 'ij,j->i' does not fit shapes"),
        (
            lambda: F.scaled_dot_product_attention(X, X, X, cu_seqlens=[1, 3]),
            RangeError,
            r"cu_seqlens is \[1, 3\], expected ascending numbers from 0 to 3",
        ),
        (
            lambda: F.scaled_dot_product_attention(X, X[:, :, :2], X[:, :, :2], cu_seqlens=[0, 2]),
            ShapeError,
            "cu_seqlens packs one row of self-attention, got B=1, T=3, S=2",
        ),
        (lambda: F.apply_rope(X, 3), DTypeError, "apply_rope: positions are not integers"),
        (lambda: mt.stack([np.ones((1,) * 64)] * 2), ShapeError, "stack: the tensors have 64 axes"),
        (
            lambda: F.apply_rope(X, np.arange(3), base=0),
            ConfigError,
            "apply_rope: base is 0, expected a positive number",
        ),
        (
            lambda: F.scaled_dot_product_attention(X, X[:, :0], X[:, :0], enable_gqa=True),
            ShapeError,
            "2 query heads cannot share 0 key heads evenly",
        ),
        (
            lambda: F.cross_entropy(mt.tensor(1.0), mt.tensor(0)),
            ShapeError,
            r"cross_entropy: target has shape \(\), expected \(\) for input \(\)",
        ),
        (
            lambda: F.scaled_dot_product_attention(X, X, X, key_lengths=[-1]),
            RangeError,
            r"key_lengths are \[-1\], expected 0 to 3. Count the keys of each row",
        ),
        (
            lambda: F.scaled_dot_product_attention(X, X, X, alibi_slopes=[np.nan, 1]),
            DTypeError,
            "alibi_slopes are float64, expected finite real numbers",
        ),
        (
            lambda: Problem(1.0, np.zeros(1, np.int64), mask=np.ones((2, 3), bool)).check(1, 2, 3, 3),
            ShapeError,
            r"mask has shape \(2, 3\), expected \(1, 2, 3, 3\)",
        ),
        (lambda: OPS["matmul"](2.0, X), ShapeError, "matmul: an operand is a single number"),
        (lambda: OPS["add"](None, X), DTypeError, "add: an operand is None"),
        (lambda: OPS["reshape"](X, shape=24.0), DTypeError, "reshape: got 24.0, expected a tuple of integers"),
        (lambda: mt.tensor(X).reshape(-2), ShapeError, r"reshape: a size in .* is outside -1 to 2\*\*63 - 1"),
        (lambda: mt.tensor(X).reshape(2**63), ShapeError, r"reshape: a size in .* is outside -1 to 2\*\*63 - 1"),
    ],
)
def test_refusals(call: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_wide_window_is_a_window() -> None:
    q, k = np.ones((1, 1, 1, 2)), np.ones((1, 1, 200, 2))
    v = np.arange(200.0).reshape(1, 1, 200, 1)
    out = F.scaled_dot_product_attention(q, k, v, window_size=(150, 0), causal_align="lower_right")
    np.testing.assert_allclose(out.data, v[0, 0, 49:].mean(), rtol=1e-13)


def test_integers_to_the_power_of_integers_are_integers() -> None:
    assert (mt.tensor([2, 3]) ** 2).data.tolist() == [4, 9]
    assert (mt.tensor([2, 3]) ** 2).dtype == np.int64
    assert (mt.tensor([2, 4]) ** -1).data.tolist() == [0.5, 0.25]


def test_a_bias_may_hold_a_1_beside_other_numbers() -> None:
    bias = np.array([1.0, 0.5, 0.0])
    weights = np.exp(bias) / np.exp(bias).sum()
    out = F.scaled_dot_product_attention(X, X, np.arange(3.0).reshape(1, 1, 3, 1).repeat(2, 1), bias)
    np.testing.assert_allclose(out.data, weights @ np.arange(3.0), rtol=1e-13)


def test_alibi_slopes_between_powers_of_two() -> None:
    assert F.alibi_slopes(7).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3, 2.0**-5]
    assert F.alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def test_zero_to_a_power_has_slope_zero_along_the_power() -> None:
    a, b = np.array([0.0, 2.0]), mt.tensor([2.0, 2.0], dtype="float64", requires_grad=True)
    (a**b).sum().backward()
    np.testing.assert_allclose(b.grad, [0, 4 * np.log(2)], rtol=1e-15)


def test_rope_to_the_base_of_1_turns_all_pairs_alike() -> None:
    out = F.apply_rope(np.ones((1, 1, 2, 4)), np.arange(2), base=1.0).data[0, 0, 1]
    np.testing.assert_allclose(out, [np.cos(1) - np.sin(1)] * 2 + [np.cos(1) + np.sin(1)] * 2, rtol=1e-14)


@pytest.mark.parametrize("reach", [2**62, 2**62 + 2**61, 2**63, 2**70])
def test_a_window_wider_than_any_array_is_no_limit(reach: int) -> None:
    out = F.scaled_dot_product_attention(X, X, X, window_size=(reach, reach))
    assert np.array_equal(out.data, F.scaled_dot_product_attention(X, X, X).data)


def test_rms_norm_adds_1e_5_unless_told() -> None:
    x = np.full((1, 4), 1e-2)
    np.testing.assert_allclose(F.rms_norm(x, 4).data, x / np.sqrt(1e-4 + 1e-5), rtol=1e-13)
    np.testing.assert_allclose(OPS["rms_norm"](x, normalized_shape=(4,)).data, F.rms_norm(x, 4).data, rtol=1e-13)


def test_lengths_of_no_rows_may_be_of_any_integer_type() -> None:
    x = np.ones((0, 2, 3, 4))
    assert F.scaled_dot_product_attention(x, x, x, key_lengths=np.empty(0, np.uint64)).shape == x.shape


def test_a_bias_of_zeros_is_a_bias() -> None:
    out = F.scaled_dot_product_attention(X, X, X, np.zeros((3, 3)))
    assert np.array_equal(out.data, F.scaled_dot_product_attention(X, X, X).data)


def test_a_float64_weight_makes_a_float64_norm() -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    out = F.layer_norm(x, 4, np.array([1, 1 + 1e-12, 1, 1]))
    assert out.dtype == np.float64
    assert out.data[1, 1] != F.layer_norm(x, 4).data[1, 1]


def test_a_float64_bias_makes_a_float64_product() -> None:
    x, weight = np.ones((2, 3), np.float32), np.ones((1, 3), np.float32)
    out = F.linear(x, weight, np.array([1e-12]))
    assert out.dtype == np.float64
    assert (out.data == 3 + 1e-12).all()


def test_the_slope_of_the_absolute_value_at_0_is_0() -> None:
    x = mt.tensor([0.0, -2.0], requires_grad=True)
    OPS["absolute"](x).sum().backward()
    assert x.grad.tolist() == [0, -1]


def test_without_decay_an_infinite_parameter_stays_infinite() -> None:
    data = np.array([np.inf, 1.0])
    sgd_step(data, np.ones(2), None, lr=0.5, momentum=0.0, weight_decay=0.0, num_decayed=2)
    assert data.tolist() == [np.inf, 0.5]
    moments = np.zeros((2, 2))
    data = np.array([np.inf, 1.0])
    options = {"lr": 0.5, "beta1": 0.9, "beta2": 0.99, "eps": 0.0, "weight_decay": 0.0, "num_decayed": 2, "step": 1}
    adam_step(data, np.ones(2), *moments, **options)
    assert data.tolist() == [np.inf, 0.5]
