"""The simulated GPU: what a kernel may do computes what a GPU would, and what it may not do is an error."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numba import float32, float64, int64

from minitransformer.errors import ConfigError, DTypeError, RangeError
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.gpu.memory import KernelError
from minitransformer.kernels.gpu.simulator import WARP, thread_order

SEEDS = st.integers(0, 2**32)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def zeros(size: int, dtype: Any = np.float32) -> SimulatedArray:
    return SimulatedArray(np.zeros(size, dtype))


def launch(
    body: Callable[..., None], size: int, *more: Any, threads: int = 4, blocks: tuple[int, int, int] = (1, 1, 1)
) -> np.ndarray:
    """What the kernel `body(cuda, out, *more)` makes of an array of zeros; all are vectors of float32."""
    out = zeros(size)
    kernel = Kernel(lambda cuda: partial(body, cuda), (float32[::1],) * (1 + len(more)), threads)
    kernel(blocks, out, *more)
    return out.host


# --- what a kernel may do --------------------------------------------------------------------------------


def reversing(size: int) -> Kernel:
    def build(cuda: Any) -> Any:
        def kernel(x: Any, out: Any) -> None:
            tile = cuda.shared.array(size, float32)
            thread, start = cuda.threadIdx.x, cuda.blockIdx.x * size
            tile[thread] = x[start + thread]
            cuda.syncthreads()
            out[start + thread] = tile[size - 1 - thread]

        return kernel

    return Kernel(build, (float32[::1], float32[::1]), size)


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


# --- races -----------------------------------------------------------------------------------------------

THREADS, CELLS = 3, 4
STEPS = st.one_of(
    st.just(None), st.tuples(st.booleans(), st.lists(st.integers(0, CELLS - 1), min_size=THREADS, max_size=THREADS))
)


def races(program: list[Any]) -> bool:
    """Whether two threads meet at a cell between two barriers, and one of them writes."""
    interval = 0
    touched: defaultdict[Any, set[int]] = defaultdict(set)
    written: defaultdict[Any, set[int]] = defaultdict(set)
    for step in program:
        if step is None:
            interval += 1
            continue
        writes, cells = step
        for thread, cell in enumerate(cells):
            touched[interval, cell].add(thread)
            if writes:
                written[interval, cell].add(thread)
    return any(len(touched[place]) > 1 for place in written)


@given(st.lists(STEPS, max_size=8), SEEDS, st.booleans())
@example([(True, [0, 1, 2]), (False, [1, 1, 1])], 0, True)  # no barrier between
@example([(True, [0, 1, 2]), None, (False, [1, 1, 1]), (True, [0, 1, 2])], 0, True)  # nor before what is read is gone
@example([(False, [0, 0, 0]), None, (True, [0, 1, 2]), None, (False, [0, 0, 0])], 1, True)
def test_programs_have_a_race_or_the_same_bits_in_every_order(program: list[Any], seed: int, shared: bool) -> None:
    def body(cuda: Any, out: Any, memory: Any) -> None:
        thread, value = cuda.threadIdx.x, 1
        cells = memory
        if shared:
            cells = cuda.shared.array(CELLS, float32)
            for cell in range(thread, CELLS, THREADS):
                cells[cell] = cell
            cuda.syncthreads()
        for step in program:
            if step is None:
                cuda.syncthreads()
            elif step[0]:
                cells[step[1][thread]] = value + thread
            else:
                value = 3 * value + cells[step[1][thread]]
        out[thread] = value

    def run(seed: int) -> list[bytes]:
        memory = zeros(CELLS)
        with thread_order(seed):
            return [launch(body, THREADS, memory, threads=THREADS).tobytes(), memory.host.tobytes()]

    if races(program):
        for order in (0, seed):
            with pytest.raises(KernelError, match=r"simulator: (another )?thread .* while .* Put a barrier between"):
                run(order)
    else:
        assert run(0) == run(seed)


def lost_update(cuda: Any, out: Any) -> None:
    out[0] += 1


def missing_barrier(cuda: Any, out: Any) -> None:
    tile = cuda.shared.array(4, float32)
    tile[cuda.threadIdx.x] = 1
    out[cuda.threadIdx.x] = tile[3 - cuda.threadIdx.x]


def shuffled_instead(cuda: Any, out: Any) -> None:
    tile = cuda.shared.array(4, float32)
    tile[cuda.threadIdx.x] = 1
    cuda.shfl_xor_sync(-1, 0, 1)  # orders threads, but not what they do to memory
    out[cuda.threadIdx.x] = tile[cuda.threadIdx.x ^ 1]


def of_blocks(cuda: Any, out: Any) -> None:
    cuda.syncthreads()
    out[cuda.threadIdx.x] = 1  # in every block


def read_by_blocks(cuda: Any, out: Any) -> None:
    if cuda.blockIdx.x < 2:
        assert out[2] == 0
    elif cuda.threadIdx.x == 0:
        out[2] = 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("body", "who"),
    [
        (
            lost_update,
            r"thread \d of block \((\d), 0, 0\) reads element 0 of out while thread \d of block \(\1, 0, 0\)",
        ),
        (missing_barrier, r"reads element \d of shared array 0 while|writes to element \d of shared array 0 while"),
        (shuffled_instead, r"reads element \d of shared array 0 while"),
        (of_blocks, r"writes to element \d of out while thread \d of block \(\d, 0, 0\)"),
        (read_by_blocks, r"element 2 of out while (an)?(other )?thread( \d)? of (another )?block"),
    ],
)
def test_races(body: Callable[..., None], who: str, seed: int) -> None:
    with thread_order(seed), pytest.raises(KernelError, match=who):
        launch(body, 4, blocks=(3, 1, 1))


def test_two_names_for_one_memory_do_not_hide_a_race() -> None:
    def build(cuda: Any) -> Any:
        def kernel(x: Any, out: Any) -> None:
            thread = cuda.threadIdx.x
            if thread < 3:
                out[thread] = x[thread]

        return kernel

    kernel, memory = Kernel(build, (float32[::1], float32[::1]), 4), np.zeros(4, np.float32)
    kernel((1, 1, 1), SimulatedArray(memory), SimulatedArray(memory))  # each thread at its own element
    with pytest.raises(KernelError, match="thread 1 .* writes to element 1 of out while thread 0"):
        kernel((1, 1, 1), SimulatedArray(memory[1:]), SimulatedArray(memory[:3]))


def test_launches_come_one_after_another() -> None:
    x, out = SimulatedArray(np.arange(4, dtype=np.float32)), zeros(4)
    for _ in range(2):
        reversing(4)((1, 1, 1), x, out)
        reversing(4)((1, 1, 1), out, x)
    np.testing.assert_array_equal(x.host, np.arange(4))


# --- what else a kernel may not do -----------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 4, 2**40, np.int64(-4)])
@pytest.mark.parametrize("name", ["memory", "shared array 1", "a local array"])
@pytest.mark.parametrize("writes", [True, False])
def test_no_index_is_outside(index: Any, name: str, writes: bool) -> None:
    def build(cuda: Any) -> Any:
        def kernel(memory: Any) -> None:
            cuda.shared.array(9, float32)
            local, shared = cuda.local.array(4, float32), cuda.shared.array(4, float32)
            if cuda.threadIdx.x == 2 and cuda.blockIdx.y == 1:
                array = {"memory": memory, "shared array 1": shared, "a local array": local}[name]
                array[index] = array[0] if writes else array[index]

        return kernel

    problem = rf"index {index} is outside of {name}, which has 4 elements, in thread 2 of block \(0, 1, 0\)\. Test"
    with pytest.raises(RangeError, match=rf"^simulator: {problem} the index before the access"):
        Kernel(build, (float32[::1],), 4)((1, 2, 1), zeros(4))


def test_an_index_is_a_whole_number() -> None:
    with pytest.raises(
        KernelError, match=r"TypeError \('float' object cannot be .*\) in thread 0 of block \(0, 0, 0\)"
    ):
        launch(lambda cuda, out: out[1.0], 4)


def barrier_in_a_branch(cuda: Any, out: Any) -> None:
    if cuda.threadIdx.x == 1:
        cuda.syncthreads()


def left_early(cuda: Any, out: Any) -> None:
    if cuda.threadIdx.x < 3:
        cuda.syncthreads()


def one_round_less(cuda: Any, out: Any) -> None:
    for _ in range(3 - cuda.threadIdx.x // 3):
        cuda.syncthreads()


def shuffle_against_barrier(cuda: Any, out: Any) -> None:
    if cuda.threadIdx.x < 2:
        cuda.shfl_sync(-1, 1, 0)
    else:
        cuda.syncthreads()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("body", "places"),
    [
        (barrier_in_a_branch, {"syncthreads", "its end"}),
        (left_early, {"syncthreads", "its end"}),
        (one_round_less, {"syncthreads", "its end"}),
        (shuffle_against_barrier, {"syncthreads", "a shuffle"}),
    ],
)
def test_all_threads_reach_the_same_barriers(body: Callable[..., None], places: set[str], seed: int) -> None:
    with thread_order(seed), pytest.raises(KernelError) as caught:
        launch(body, 4, blocks=(2, 1, 1))
    one, other = sorted(places)
    assert caught.value.problem.startswith("in block (")
    assert f"is at {one}" in str(caught.value) and f"is at {other}" in str(caught.value)
    assert str(caught.value).endswith("expected all at one barrier. Leave no loop or function early before a barrier.")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (lambda cuda, out: cuda.shfl_xor_sync(-1, 1, 4), r"reads thread 4, which is not there, in thread 0 of"),
        (lambda cuda, out: cuda.shfl_down_sync(-1, 1, 1), r"reads thread 4, which is not there, in thread 3 of"),
        (lambda cuda, out: cuda.shfl_sync(-1, 1, -1), r"reads thread -1, which is not there"),
        (lambda cuda, out: cuda.shfl_sync(-1, 1, 32), r"reads thread 32, which is not there"),
        (lambda cuda, out: cuda.threadIdx.x == 2 or cuda.shfl_xor_sync(-1, 1, 2), r"reads thread 2, which is not"),
        (lambda cuda, out: cuda.shfl_sync(0xF, 1, 0), r"a shuffle has the mask 0xf, expected -1"),
    ],
)
def test_shuffles_are_with_threads_that_are_there(body: Callable[..., None], problem: str) -> None:
    with pytest.raises(KernelError, match=rf"^simulator: .*{problem}.* Let whole warps take part\.$"):
        launch(body, 4)


def test_a_shuffle_does_not_reach_another_warp() -> None:
    with pytest.raises(KernelError, match="reads thread 32, which is not there, in thread 0"):
        launch(lambda cuda, out: cuda.shfl_xor_sync(-1, 1, 32), 1, threads=64)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_thread_raises_reaches_the_caller_and_ends_the_others(seed: int) -> None:
    def body(cuda: Any, out: Any) -> None:
        cuda.syncthreads()
        if cuda.blockIdx.x == 1 and cuda.threadIdx.x == 3:
            raise ZeroDivisionError("by nothing")
        cuda.syncthreads()
        out[4 * cuda.blockIdx.x + cuda.threadIdx.x] = 1
        assert cuda.blockIdx.x != 1

    with thread_order(seed), pytest.raises(KernelError) as caught:
        launch(body, 12, blocks=(3, 1, 1))
    expected = "simulator: ZeroDivisionError (by nothing) in thread 3 of block (1, 0, 0). Its traceback is above."
    assert str(caught.value) == expected
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals of POSIX")
def test_an_interrupt_stops_a_launch() -> None:
    def body(cuda: Any, out: Any) -> None:
        if cuda.threadIdx.x == 2:
            time.sleep(0.1)  # until the caller waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while True:
            cuda.syncthreads()

    with pytest.raises(KeyboardInterrupt):
        launch(body, 1)


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
