"""Edges that mutants of the ops and kernels slipped through: the last case before a refusal, and the first after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
import minitransformer.functional as F
from minitransformer.errors import DTypeError, RangeError, ShapeError

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
    assert F.alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
