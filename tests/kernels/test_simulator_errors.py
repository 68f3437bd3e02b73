"""What goes wrong unseen on a GPU is an error on the simulated one: races, indices, barriers, shuffles, exceptions."""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numba import float32
from simulated import launch, no_thread_is_left, reversing, zeros  # noqa: F401

from minitransformer.errors import RangeError
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.gpu.memory import KernelError
from minitransformer.kernels.gpu.simulator import thread_order

SEEDS = st.integers(0, 2**32)


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
    with pytest.raises(KernelError, match=r"thread 1 .* writes to element 1 of out while thread 0"):
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


def test_a_place_of_the_code_has_one_shared_array() -> None:
    def scratch(cuda: Any) -> Any:
        return cuda.shared.array(4, float32)

    def body(cuda: Any, out: Any) -> None:
        a, b = cuda.shared.array(4, float32), cuda.shared.array(4, float32)
        a[cuda.threadIdx.x], b[cuda.threadIdx.x] = 1, 2
        out[cuda.threadIdx.x] = a[cuda.threadIdx.x] + b[cuda.threadIdx.x]
        scratch(cuda)
        if twice:
            scratch(cuda)

    twice = False
    np.testing.assert_array_equal(launch(body, 4), np.full(4, 3))
    twice = True
    with pytest.raises(KernelError, match=r"thread 0 of block \(0, 0, 0\) makes a shared array again at one place, wh"):
        launch(body, 4)


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
        for _ in range(20_000):
            cuda.syncthreads()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(body, 1)
    finally:
        signal.signal(signal.SIGINT, before)
