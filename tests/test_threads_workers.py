"""Workers: results in order, a bounded number at a time, in the context of the caller, and no thread left."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from minitransformer.errors import ConfigError
from minitransformer.threads import (
    Workers,
    available_cores,
    single_threaded_blas,
)

PATIENCE = 60  # seconds until a hang becomes a failure; nothing waits for it otherwise


COUNTS = st.sampled_from([1, 2, 3, available_cores() + 3])


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@given(COUNTS, st.lists(st.integers(), max_size=12), st.integers(1, 3))
def test_results_come_in_order_and_the_pool_can_be_used_again(n: int, values: list[int], rounds: int) -> None:
    with Workers(n) as workers:
        for _ in range(rounds):
            assert list(workers.run([lambda v=v: v for v in values])) == values


class Buffer:
    """Stands for the gradients of one shard: it counts how many of them are alive."""

    alive: set[int] = set()  # noqa: RUF012 (shared on purpose, emptied by each test)
    most = 0
    lock = threading.Lock()

    def __init__(self) -> None:
        with Buffer.lock:
            Buffer.alive.add(id(self))
            Buffer.most = max(Buffer.most, len(Buffer.alive))
        weakref.finalize(self, Buffer.alive.discard, id(self))


@given(COUNTS, st.integers(0, 20), st.booleans())
def test_memory_holds_one_buffer_a_thread_and_one_more(n: int, num_tasks: int, slow_start: bool) -> None:
    Buffer.alive.clear()
    Buffer.most = 0
    others = threading.Semaphore(0)

    def task(index: int) -> Buffer:
        if index == 0 and slow_start:
            for _ in range(min(n, num_tasks - 1) if n > 1 else 0):  # all that may run ahead of the first
                assert others.acquire(timeout=PATIENCE)
        buffer = Buffer()
        others.release()
        return buffer

    with Workers(n) as workers:
        results = workers.run([lambda i=i: task(i) for i in range(num_tasks)])
        for result in results:  # `result` itself is the one in the caller's hands
            assert id(result) in Buffer.alive
            del result
    assert Buffer.most <= n + 1
    assert not Buffer.alive


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_held_result_counts_until_the_next_is_asked_for(n: int) -> None:
    begun: list[int] = []
    with Workers(n) as workers:
        results = workers.run([lambda i=i: begun.append(i) for i in range(20)])
        assert begun == []
        for consumed in range(20):
            next(results)
            workers_idle(workers)
            assert len(begun) <= min(20, consumed + n + 1)
            assert sorted(begun) == list(range(len(begun)))


def workers_idle(workers: Workers) -> None:
    """Wait until nothing that was handed out is left to do."""
    if workers._executor:
        gate = threading.Barrier(workers.num_threads)
        for future in [workers._executor.submit(gate.wait, PATIENCE) for _ in range(workers.num_threads)]:
            future.result(PATIENCE)


def test_tasks_run_at_the_same_time_even_above_the_cores() -> None:
    n = available_cores() + 3
    together = threading.Barrier(n)
    with Workers(n) as workers:
        ranks = list(workers.run([lambda: together.wait(PATIENCE)] * n))
    assert sorted(ranks) == list(range(n))


def test_one_thread_is_the_callers() -> None:
    with Workers(1) as workers:
        assert set(workers.run([threading.get_ident] * 3)) == {threading.get_ident()}


mode: ContextVar[str] = ContextVar("mode", default="unset")


@pytest.mark.parametrize("n", [1, 2])
def test_tasks_see_the_context_of_the_call_each_a_copy_of_its_own(n: int) -> None:
    def task(i: int) -> str:
        seen = mode.get()
        mode.set(f"of task {i}")
        return seen

    with Workers(n) as workers:
        token = mode.set("no_grad")
        results = workers.run([lambda i=i: task(i) for i in range(6)])
        mode.reset(token)
        assert list(results) == ["no_grad"] * 6
        assert mode.get() == "unset"
        assert list(workers.run([mode.get])) == ["unset"]


@given(COUNTS, st.sets(st.integers(0, 9), min_size=1), st.data())
def test_the_first_exception_in_order_is_raised_and_the_pool_stays_usable(
    n: int, failing: set[int], data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from([ValueError, KeyboardInterrupt, SystemExit]))
    begun: list[int] = []

    def task(i: int) -> int:
        begun.append(i)
        if i in failing:
            raise kind(i)
        return i

    got = []
    with Workers(n) as workers:
        with pytest.raises(kind) as caught:
            for result in workers.run([lambda i=i: task(i) for i in range(10)]):
                got.append(result)
        count = len(begun)
        assert caught.value.args == (min(failing),)
        assert got == list(range(min(failing)))
        assert count <= min(failing) + n + 1
        assert list(workers.run([lambda: "usable"] * 3)) == ["usable"] * 3
        assert len(begun) == count  # nothing of the failed run began afterwards


class Pair:
    """Tasks of which the second ends only when told, so that it runs while its caller stops."""

    def __init__(self, last_act: Callable[[], object]) -> None:
        self.last_act = last_act
        self.began, self.may_end, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.tasks = [lambda: 0, self.second, *[lambda: 2] * 7]

    def second(self) -> int:
        self.began.set()
        assert self.may_end.wait(PATIENCE)
        self.last_act()
        self.ended.set()
        return 1


def test_a_caller_who_stops_early_leaves_nothing_running() -> None:
    pair = Pair(lambda: None)
    with Workers(2) as workers:
        results = workers.run(pair.tasks)
        assert next(results) == 0
        assert pair.began.wait(PATIENCE)
        pair.may_end.set()
        results.close()  # as `break` does
        assert pair.ended.is_set()
        assert list(workers.run([lambda: "usable"] * 3)) == ["usable"] * 3


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where a shell started us in the background and had it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_caller_leaves_nothing_running() -> None:
    def interrupt_and_go_on() -> None:
        threading.Event().wait(0.1)  # time for the caller to block
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        threading.Event().wait(0.2)  # time for a caller who does not wait to be seen

    pair = Pair(interrupt_and_go_on)
    with Workers(2) as workers:
        results = workers.run(pair.tasks)
        assert next(results) == 0
        assert pair.began.wait(PATIENCE)
        with pytest.raises(KeyboardInterrupt):
            pair.may_end.set()
            list(results)
        results.close()  # already closed, unless the signal came before `list` had begun
        assert pair.ended.is_set()
        assert list(workers.run([lambda: "usable"] * 3)) == ["usable"] * 3


@pytest.mark.parametrize("n", [1, 2])
def test_a_closed_pool_is_refused(n: int) -> None:
    with Workers(n) as workers:
        results = workers.run([lambda: 1] * 9)
        assert next(results) == 1
    for use in (lambda: next(results), lambda: workers.run([])):
        with pytest.raises(ConfigError) as caught:
            use()
        assert str(caught.value) == "Workers: the pool is closed. Use it inside its `with` block."
    workers.close()


@pytest.mark.parametrize("n", [1, 2])
def test_a_task_may_run_tasks(n: int) -> None:
    with Workers(n) as workers:
        inner = [lambda i=i: i for i in range(3)]
        assert list(workers.run([lambda: list(workers.run(inner))] * 4)) == [[0, 1, 2]] * 4


def test_two_callers_share_a_pool() -> None:
    got: dict[int, list[int]] = {}
    with Workers(2) as workers:

        def caller(base: int) -> None:
            got[base] = list(workers.run([lambda i=i: base + i for i in range(20)]))

        callers = [threading.Thread(target=caller, args=(base,)) for base in (0, 100, 200)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(PATIENCE)
    assert got == {base: list(range(base, base + 20)) for base in (0, 100, 200)}


def test_shards_have_the_same_bits_whatever_the_number_of_threads() -> None:
    x = np.random.default_rng(0).standard_normal((4, 64, 96), dtype=np.float32)
    w = np.random.default_rng(1).standard_normal((96, 96), dtype=np.float32)
    sums = []
    for n in (1, 2, 4):
        total = np.zeros((96, 96), np.float32)
        with single_threaded_blas(), Workers(n) as workers:
            for dw in workers.run([lambda s=s: (x[s] @ w).T @ x[s] for s in range(4)]):
                total += dw
        sums.append(total.tobytes())
    assert len(set(sums)) == 1
