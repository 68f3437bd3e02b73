"""The row kernels for a GPU against their reference, in the simulator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from against_reference import cast, check_errors, check_refusals, check_special, is_float
from kernel_calls import CALLS, ROWS
from on_simulator import check_arrays, simulated

from minitransformer.kernels.gpu import blocks
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.blocks import Block
from minitransformer.kernels.rowwise import cuda, cuda_norms, cuda_softmax, reference

ROWWISE = CALLS["rowwise"]
WRITTEN = {"add_residual": 0, "add_layer_norm": 0, "layer_norm_backward_add": 5}  # which argument
gpu = simulated(cuda)
functions = pytest.mark.parametrize("name", ROWWISE)


def calls(name: str, *shapes: tuple[int, int]) -> Iterator[tuple[Any, ...]]:
    """The arguments of the calls whose matrices have one of these shapes."""
    for args, _ in ROWWISE[name](np.random.default_rng(0), np.float64):
        if next(x for x in args if isinstance(x, np.ndarray) and x.ndim == 2).shape in shapes:
            yield args


def test_every_function_has_calls() -> None:
    assert set(cuda.__all__) == ROWWISE.keys()


@functions
def test_errors_and_the_same_bits_in_any_order_of_threads(name: str) -> None:
    for args in calls(name, *(shape for shape in ROWS if shape != (17, 64))):
        check_errors(gpu, reference, name, args)


@pytest.mark.parametrize("name", ["layer_norm_backward", "rms_norm_backward"])
def test_sums_over_more_than_one_strip_of_rows(name: str) -> None:
    (args,) = calls(name, (17, 64))
    check_errors(gpu, reference, name, tuple(x[..., :5] if x.shape[-1] == 64 else x for x in args))


@functions
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_nan_and_infinities(name: str, value: float) -> None:
    for args in calls(name, (3, 5)):
        for i, x in enumerate(args):
            if is_float(x) and x.ndim == 2:
                changed = cast(args, np.float64)
                changed[i][1, 2] = value
                check_special(gpu, reference, name, tuple(changed))


@functions
def test_rows_of_the_same_numbers(name: str) -> None:
    """Whose exponentials would overflow, or are all 0."""
    for value in (0.0, 1e4, -1e4, -math.inf):
        for args in calls(name, (3, 5)):
            for x in args:
                if is_float(x) and x.ndim == 2:
                    x[1] = value
            check_special(gpu, reference, name, args)


@functions
@pytest.mark.parametrize("block", [Block(32, 32), Block(64, 32)])
def test_blocks_of_whole_warps(name: str, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warp shuffles alone, two meet in shared memory."""
    for module in (blocks, cuda, cuda_norms, cuda_softmax):
        monkeypatch.setattr(module, "block_for", lambda *_: block)
    for args in list(calls(name, (2, 33)))[:1]:
        check_errors(gpu, reference, name, args)


@functions
def test_arrays_of_any_layout_dtype_and_device(name: str) -> None:
    check_arrays(cuda, name, next(calls(name, (3, 5))), WRITTEN.get(name))


@functions
def test_what_does_not_fit_is_refused(name: str) -> None:
    for args in calls(name, (3, 5)):
        check_refusals(gpu, name, args)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_integers_of_any_dtype(dtype: Any) -> None:
    dout, ids = np.arange(12.0).reshape(4, 3), np.array([2, 0, 2, 1])
    expected = [[3, 4, 5], [9, 10, 11], [6, 8, 10], [0, 0, 0]]
    np.testing.assert_array_equal(gpu.embedding_backward(dout, ids.astype(dtype), 4), expected)
    losses, _ = gpu.cross_entropy_forward(dout, ids.astype(dtype), np.ones(4, bool), 0.0)
    np.testing.assert_allclose(losses, reference.cross_entropy_forward(dout, ids, np.ones(4, bool), 0.0)[0])


def test_an_embedding_adds_in_the_order_of_positions() -> None:
    """Which of three numbers is added last tells: 1e8 + 1 - 1e8 is 0 in float32."""
    dout = np.array([[1e8], [1.0], [-1e8], [5.0]], np.float32)
    ids = np.array([1, 1, 1, 7])
    assert gpu.embedding_backward(dout, ids, 9)[[1, 7], 0].tolist() == [0, 5]
    assert gpu.embedding_backward(dout[[0, 2, 1, 3]], ids, 9)[1, 0] == 1
    assert gpu.embedding_backward(dout[:0], ids[:0], 2).tolist() == [[0], [0]]
    assert gpu.embedding_backward(dout[:0], ids[:0], 0).shape == (0, 1)


@pytest.mark.parametrize("target", [-100, -1, 3, 2**62])
def test_rows_that_do_not_count_are_zero_whatever_they_hold(target: int) -> None:
    logits = np.full((2, 3), math.nan)
    logits[1] = 0
    targets, valid = np.array([target, 1]), np.array([False, True])
    losses, lse = gpu.cross_entropy_forward(logits, targets, valid, 0.1)
    assert losses[0] == 0 and losses[1] == pytest.approx(math.log(3))
    dlogits = gpu.cross_entropy_backward(np.ones(2), logits, targets, valid, lse, 0.1)
    assert not dlogits[0].any() and dlogits[1].sum() == pytest.approx(0, abs=1e-15)


def test_the_mean_of_large_numbers_that_differ_little() -> None:
    x = (1e4 + np.random.default_rng(0).standard_normal((1, 999))).astype(np.float32)
    _, mean, rstd = gpu.layer_norm_forward(x, None, None, 0.0)
    np.testing.assert_allclose(mean, x.mean(axis=1, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(rstd, 1 / x.std(axis=1, dtype=np.float64), rtol=1e-6)


@pytest.mark.parametrize("N", [15, 16, 17, 600])
def test_sums_of_columns_in_several_stages(N: int) -> None:
    """Strips of sixteen rows here, then the strips of their sums."""
    x = np.random.default_rng(0).standard_normal((N, 3)).astype(np.float32).astype(np.float64)
    check_errors(gpu, reference, "column_sum", (x,))


def test_every_kernel_has_a_name_of_its_own() -> None:
    """Among those that are compiled for a GPU to see what they need; none is there twice."""
    found = list(cuda.configurations())
    assert len({name for name, _ in found}) == len({id(kernel) for _, kernel in found}) == len(found)


def test_nothing_is_launched_for_empty_arrays() -> None:
    x = SimulatedArray(np.empty((0, 3), np.float32))
    assert cuda.softmax_forward(x).shape == (0, 3)
    assert cuda.layer_norm_backward(x, x, None, x[:, 0], x[:, 0])[1].host.tolist() == [0, 0, 0]
