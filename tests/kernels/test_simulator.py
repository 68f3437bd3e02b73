"""The simulated GPU computes what a GPU would."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import float32, float64, int64
from simulated import launch, no_thread_is_left, reversing, zeros  # noqa: F401

from minitransformer.errors import ConfigError, DTypeError
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.gpu.simulator import WARP, thread_order

SEEDS = st.integers(0, 2**32)


# --- what a kernel may do --------------------------------------------------------------------------------


@given(st.integers(1, 70), st.integers(1, 3), SEEDS)
def test_threads_of_a_block_meet_at_barriers(threads: int, blocks: int, seed: int) -> None:
    x = np.arange(blocks * threads, dtype=np.float32)
    out = zeros(x.size)
    with thread_order(seed):
        reversing(threads)((blocks, 1, 1), SimulatedArray(x), out)
    np.testing.assert_array_equal(out.host, x.reshape(blocks, threads)[:, ::-1].ravel())


def test_every_thread_of_every_block_runs_once_and_knows_its_place() -> None:
    def body(cuda: Any, out: Any) -> None:
        b, g = cuda.blockIdx, cuda.gridDim
        assert (cuda.threadIdx.y, cuda.threadIdx.z) == (0, 0)
        assert cuda.blockDim == (3, 1, 1)
        block = (b.z * g.y + b.y) * g.x + b.x
        out[block * 3 + cuda.threadIdx.x] += 1 + block

    out = launch(body, 2 * 3 * 4 * 3, threads=3, blocks=(2, 3, 4))
    np.testing.assert_array_equal(out, np.repeat(np.arange(24) + 1, 3))


@pytest.mark.parametrize("threads", [32, 64, 96])
@given(SEEDS)
def test_shuffles_stay_in_their_warp(threads: int, seed: int) -> None:
    def body(cuda: Any, out: Any, x: Any) -> None:
        thread = cuda.threadIdx.x
        total = x[thread]
        for distance in (16, 8, 4, 2, 1):
            total += cuda.shfl_xor_sync(-1, total, distance)
        out[thread] = total
        out[threads + thread] = cuda.shfl_down_sync(-1, x[thread], 3)
        out[2 * threads + thread] = cuda.shfl_sync(0xFFFFFFFF, x[thread], 5)

    x = np.arange(threads, dtype=np.float32) ** 2
    with thread_order(seed):
        totals, down, fifth = launch(body, 3 * threads, SimulatedArray(x), threads=threads).reshape(3, -1, WARP)
    rows = x.reshape(-1, WARP)
    np.testing.assert_array_equal(totals, np.repeat(rows.sum(1), WARP).reshape(-1, WARP))
    np.testing.assert_array_equal(down, np.hstack([rows[:, 3:], rows[:, -3:]]))
    np.testing.assert_array_equal(fifth, np.repeat(rows[:, 5], WARP).reshape(-1, WARP))


def test_warps_need_not_shuffle_in_step_and_parts_of_a_warp_may() -> None:
    def body(cuda: Any, out: Any) -> None:
        thread = cuda.threadIdx.x
        value = float(thread)
        for _ in range(thread // WARP):  # the second warp once, the first not at all
            value = cuda.shfl_xor_sync(-1, value, 1)
        cuda.syncthreads()
        out[thread] = value

    np.testing.assert_array_equal(launch(body, 36, threads=36), [*range(32), 33, 32, 35, 34])


def test_a_thread_that_has_ended_was_there_for_its_shuffles() -> None:
    def body(cuda: Any, out: Any) -> None:
        thread = cuda.threadIdx.x
        out[thread] = cuda.shfl_xor_sync(-1, thread, 1)
        if thread < 2:
            out[thread] = cuda.shfl_xor_sync(-1, out[thread], 1)

    for seed in range(5):
        with thread_order(seed):
            np.testing.assert_array_equal(launch(body, 4), [0, 1, 3, 2])


def test_device_functions_call_each_other_and_meet_at_barriers() -> None:
    def build(cuda: Any) -> Any:
        @cuda.jit(device=True)
        def neighbour(tile: Any, value: Any) -> Any:
            tile[cuda.threadIdx.x] = value
            cuda.syncthreads()
            got = tile[(cuda.threadIdx.x + 1) % 4]
            cuda.syncthreads()
            return got

        @cuda.jit(device=True, inline="always")
        def twice(value: Any) -> Any:
            tile = cuda.shared.array(4, float64)
            return neighbour(tile, neighbour(tile, value))

        def kernel(x: Any, out: Any) -> None:
            out[cuda.threadIdx.x] = twice(x[cuda.threadIdx.x])

        return kernel

    x, out = SimulatedArray(np.arange(4.0)), zeros(4, np.float64)
    Kernel(build, (float64[::1], float64[::1]), 4)((1, 1, 1), x, out)
    np.testing.assert_array_equal(out.host, [2, 3, 0, 1])


def test_memory_nobody_has_written_to_is_recognised_in_every_block() -> None:
    def body(cuda: Any, out: Any) -> None:
        thread, first = cuda.threadIdx.x, cuda.blockIdx.x * 4
        shared, own = cuda.shared.array(4, float32, 16), cuda.local.array(2, float64)
        number = cuda.shared.array(4, int64)
        out[first + thread] = math.isnan(shared[thread]) and math.isnan(own[1]) and number[thread] == -(2**63)
        shared[thread], own[1], number[thread] = 1, thread, 1
        cuda.syncthreads()
        out[first + thread] *= shared[(thread + 1) % 4] * (own[1] == thread) * number[thread]

    np.testing.assert_array_equal(launch(body, 8, blocks=(2, 1, 1)), np.ones(8))


def test_arithmetic_warns_of_nothing_as_on_a_gpu() -> None:
    def body(cuda: Any, out: Any) -> None:
        out[0] = out[0] / out[0]
        out[1] = np.exp(np.float32(1000))

    np.testing.assert_array_equal(launch(body, 2, threads=1), [np.nan, np.inf])


def test_the_order_is_that_of_the_numbers_or_drawn() -> None:
    def order(seed: int) -> tuple[int, ...]:
        seen = []
        with thread_order(seed):
            launch(lambda cuda, out: seen.append(4 * cuda.blockIdx.x + cuda.threadIdx.x), 1, blocks=(3, 1, 1))
        return tuple(seen)

    assert order(0) == tuple(range(12))
    drawn = {order(seed) for seed in range(1, 6)}
    assert len(drawn) == 5 and all(sorted(o) == list(range(12)) for o in drawn)
    assert len({tuple(n // 4 for n in o) for o in drawn}) > 1  # blocks too
    assert order(3) == order(3)


def test_python_threads_may_launch_at_once() -> None:
    def one(number: int) -> np.ndarray:
        x, out = SimulatedArray(np.full(16, number, np.float32) + np.arange(16, dtype=np.float32)), zeros(16)
        with thread_order(number):
            for _ in range(3):
                reversing(8)((2, 1, 1), x, out)
        return out.host

    with ThreadPoolExecutor(4) as pool:
        for number, got in enumerate(pool.map(one, range(8))):
            expected = number + np.arange(16).reshape(2, 8)[:, ::-1].ravel()
            np.testing.assert_array_equal(got, expected)


# --- the launch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [(0, 1, 1), (1, 0, 1), (1, 2**16, 1), (1, 1, 2**16), (2**31, 1, 1)])
def test_grids_are_those_that_a_gpu_takes(blocks: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"kernels.gpu: got a grid of \(.*\) blocks, expected at least 1 along each"):
        reversing(4)(blocks, zeros(4), zeros(4))


@pytest.mark.parametrize(
    "wrong",
    [zeros(4, np.float64), SimulatedArray(np.zeros((2, 2), np.float32)), SimulatedArray(np.zeros(8, np.float32)[::2]),
     np.zeros(4, np.float32), 3],
)  # fmt: skip
def test_arrays_are_those_that_a_kernel_is_compiled_for(wrong: Any) -> None:
    with pytest.raises(DTypeError, match=r"kernels.gpu: got \w+ of .*, expected array\(float32, 1d, C\)\. Pass arrays"):
        reversing(4)((1, 1, 1), zeros(4), wrong)


def test_numbers_are_converted_to_the_types_of_the_kernel() -> None:
    seen: list[Any] = []

    def build(cuda: Any) -> Any:
        return lambda out, a, b, c: seen.extend([a, b, c])

    kernel = Kernel(build, (float32[::1], float32, float64, int64), 1)
    kernel((1, 1, 1), zeros(1), 0.1, np.float32(0.5), np.uint8(3))
    assert seen == [np.float32(0.1), 0.5, 3]
    assert [type(x) for x in seen] == [np.float32, np.float64, int]
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        kernel((1, 1, 1), zeros(1), 0.1, 0.5, 2.5)
