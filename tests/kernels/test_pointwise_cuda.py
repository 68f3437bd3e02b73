"""The elementwise kernels for a GPU against their reference, in the simulator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from against_reference import cast, check_errors, check_refusals, check_special, is_float
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import CALLS
from on_simulator import check_arrays, simulated

from minitransformer.kernels.gpu import blocks
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.blocks import Block
from minitransformer.kernels.pointwise import cuda, cuda_dropout, reference
from minitransformer.random import DrawKey, keep_mask

POINTWISE = CALLS["pointwise"]
ROWS = "add_bias_gelu_tanh", "gelu_tanh_bias_backward"  # take rows (N, F), the others arrays of any shape
gpu = simulated(cuda)
functions = pytest.mark.parametrize("name", POINTWISE)


def calls(name: str, most: int = 70) -> Iterator[tuple[Any, ...]]:
    """The arguments of the calls of at most so many numbers."""
    for args, _ in POINTWISE[name](np.random.default_rng(0), np.float64):
        if args[0].size <= most:
            yield args


def test_every_function_has_calls() -> None:
    assert set(cuda.__all__) == POINTWISE.keys()


@functions
def test_errors_and_the_same_bits_in_any_order_of_threads(name: str) -> None:
    for args in calls(name):
        check_errors(gpu, reference, name, args)


@pytest.mark.parametrize("name", sorted(POINTWISE.keys() - {"sigmoid_backward", "tanh_backward"}))
def test_numbers_far_out(name: str) -> None:
    """Where sigmoids and tails of the normal distribution are 0 or 1."""
    for args in calls(name, 15):
        for i, x in enumerate(args):
            if is_float(x) and x.shape == (3, 5):
                changed = cast(args, np.float64)
                changed[i] = np.linspace(-90, 90, 15).astype(np.float32).astype(np.float64).reshape(3, 5)
                check_errors(gpu, reference, name, tuple(changed))


@functions
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -30.0, 300.0])
def test_nan_and_infinities(name: str, value: float) -> None:
    for args in calls(name, 15):
        for i, x in enumerate(args):
            if is_float(x) and x.shape == (3, 5):
                changed = cast(args, np.float64)
                changed[i][1, 2] = value
                check_special(gpu, reference, name, tuple(changed))


@pytest.mark.parametrize("name", [*ROWS, "dropout_forward", "gelu_forward"])
@pytest.mark.parametrize("block", [Block(32, 32), Block(64, 32)])
def test_blocks_of_whole_warps(name: str, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (blocks, cuda, cuda_dropout):
        monkeypatch.setattr(module, "block_for", lambda *_: block)
    (*_, args) = calls(name)
    check_errors(gpu, reference, name, args)


@functions
def test_arrays_of_any_layout_dtype_and_device(name: str) -> None:
    for args in calls(name, 15):
        if args[0].shape == (3, 5):
            check_arrays(cuda, name, args, 0 if name == "gelu_tanh_bias_backward" else None)
            check_refusals(gpu, name, args)


@functions
def test_a_single_number(name: str) -> None:
    """Without an axis, as ops pass it; the references of GELU and erf want one."""
    if name not in ROWS and name != "erf" and "gelu" not in name:
        args = next(calls(name, 0))
        single = tuple(np.array(0.7).astype(x.dtype) if isinstance(x, np.ndarray) else x for x in args)
        check_errors(gpu, reference, name, single)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.tuples(st.integers(0, 2), st.integers(13, 37)),
    p=st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.5, 1 - 1e-12]),
    key=st.builds(
        DrawKey,
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**32 - 1),
    ),
)
def test_dropout_draws_the_mask_of_random(shape: tuple[int, ...], p: float, key: DrawKey) -> None:
    x = np.full(shape, math.nan, np.float32)
    out, keep = gpu.dropout_forward(x, p, key)
    np.testing.assert_array_equal(keep, keep_mask(shape, p, key))
    assert keep.dtype == np.bool_ and keep.shape == shape
    np.testing.assert_array_equal(np.isnan(out), keep)  # what is dropped is 0, NaN too


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_tail_of_the_normal_distribution_is_as_good_as_rounding(dtype: Any) -> None:
    """GELU(x) / x is the distribution function, in its lower tail far below the rounding of 1."""
    x = np.linspace(-6, 6, 48).astype(dtype)
    exact = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x])
    got = gpu.gelu_forward(x).astype(np.float64) / x
    assert (abs(got - exact) / exact).max() <= 40 * np.finfo(dtype).eps  # t^2 of a rounded argument


def test_gelus_gradient_is_written_over_what_it_was_given() -> None:
    dout, x = (SimulatedArray(np.ones((2, 3))) for _ in range(2))
    dx, dbias = cuda.gelu_tanh_bias_backward(dout, x, None)
    assert dx is dout and dx.host[0, 0] != 1
    np.testing.assert_allclose(dbias.host, dx.host.sum(axis=0))


def test_every_kernel_has_a_name_of_its_own() -> None:
    found = list(cuda.configurations())
    assert len({name for name, _ in found}) == len({id(kernel) for _, kernel in found}) == len(found)
