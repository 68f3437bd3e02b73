"""Threads: how many there are, BLAS with one of them while anybody asks for that, and forks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis.strategies as st
import numpy as np  # noqa: F401 (its BLAS is what is counted)
import pytest
from hypothesis import given
from threadpoolctl import threadpool_info, threadpool_limits

from minitransformer import threads
from minitransformer.errors import ConfigError
from minitransformer.threads import (
    Workers,
    available_cores,
    get_num_threads,
    set_num_threads,
    single_threaded_blas,
)

PATIENCE = 60  # seconds until a hang becomes a failure; nothing waits for it otherwise


def run_python(program: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- the number of threads -------------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    before = threads._num_threads
    yield
    threads._num_threads = before


@pytest.mark.usefixtures("restored")
def test_the_number_of_threads_is_the_cores_until_it_is_set() -> None:
    threads._num_threads = None
    assert get_num_threads() == available_cores() >= 1
    set_num_threads(available_cores() + 5)
    assert get_num_threads() == available_cores() + 5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity cannot be set on this system")
def test_cores_are_those_of_the_affinity() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from minitransformer import threads; print(threads.available_cores(), threads.get_num_threads())"
    )
    assert run_python(program) == "1 1\n"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("n", [0, -1, 1.0, True, "2", None])
def test_a_bad_number_of_threads_is_refused(n: Any) -> None:
    before = get_num_threads()
    for op, setter in (("set_num_threads", set_num_threads), ("Workers", Workers)):
        with pytest.raises(ConfigError) as caught:
            setter(n)
        assert str(caught.value) == (
            f"{op}: the number of threads must be an integer of at least 1, got {n!r}. "
            f"Pass 1 to {available_cores()} to stay within the cores of this process."
        )
    assert get_num_threads() == before


def test_importing_starts_no_thread_and_searches_no_library() -> None:
    program = (
        "import sys, threading; import minitransformer.threads;"
        "print(threading.active_count(), 'threadpoolctl' in sys.modules)"
    )
    assert run_python(program) == "1 False\n"


# --- one BLAS thread -------------------------------------------------------------------------------------


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


needs_blas = pytest.mark.skipif(not blas_threads(), reason="this NumPy has no BLAS whose threads can be set")


@pytest.fixture
def three_blas_threads() -> Iterator[None]:
    """A number that nothing else sets, on any machine."""
    with threadpool_limits(3, user_api="blas"):
        yield


@needs_blas
@pytest.mark.usefixtures("three_blas_threads")
def test_blas_is_single_threaded_inside_and_as_before_outside() -> None:
    with single_threaded_blas():
        assert blas_threads() == {1}
        with single_threaded_blas():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == {3}
    with pytest.raises(KeyError), single_threaded_blas():
        raise KeyError
    assert blas_threads() == {3}


@needs_blas
@pytest.mark.usefixtures("three_blas_threads")
def test_a_failure_to_limit_leaves_nobody_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: Any) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr("threadpoolctl.threadpool_limits", refuses)
        with pytest.raises(OSError), single_threaded_blas():
            raise AssertionError("unreachable")
    with single_threaded_blas():
        assert blas_threads() == {1}
    assert blas_threads() == {3}


@needs_blas
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=12))
def test_blas_is_limited_exactly_while_somebody_is_inside(moves: list[tuple[int, bool]]) -> None:
    """Three threads enter (`True`) and leave in a drawn order; one at a time, so that it can be checked."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(threadpool_limits(3, user_api="blas"))
        team = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3)]
        blocks: list[list[contextlib.AbstractContextManager[None]]] = [[], [], []]
        moves += [(who, False) for who in range(3) for _ in moves]  # at last, all leave
        for who, enters in moves:
            if enters:
                blocks[who].append(single_threaded_blas())
                team[who].submit(blocks[who][-1].__enter__).result(PATIENCE)
            elif blocks[who]:
                team[who].submit(blocks[who].pop().__exit__, None, None, None).result(PATIENCE)
            assert blas_threads() == ({1} if any(blocks) else {3})


@needs_blas
def test_many_threads_enter_and_leave_at_once() -> None:
    wrong = []

    def hammer() -> None:
        for _ in range(20):
            with single_threaded_blas():
                if blas_threads() != {1}:
                    wrong.append(blas_threads())

    with threadpool_limits(3, user_api="blas"):
        team = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in team:
            thread.start()
        for thread in team:
            thread.join(PATIENCE)
        assert blas_threads() == {3}
    assert not wrong


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

FORK = """
import os, threading
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits
from minitransformer.threads import Workers, single_threaded_blas

def blas():
    product = np.ones((300, 300)) @ np.ones((300, 300))
    assert (product == 300).all()
    return {lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"}

def in_child(act):
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

def check(*expected):
    got = blas()
    assert got in [{n} for n in expected], (got, expected)

threadpool_limits(3, user_api="blas")
"""


@needs_fork
def test_a_child_does_not_wait_for_users_that_it_does_not_have() -> None:
    program = """
inside, leave = threading.Event(), threading.Event()

block = single_threaded_blas()

def other():
    with block:
        inside.set()
        leave.wait()

def act():
    check(3)
    block.__exit__(None, None, None)  # as a finalizer might
    check(3)
    with single_threaded_blas():
        check(1)
    check(3)

user = threading.Thread(target=other, daemon=True)
user.start()
inside.wait()
in_child(act)
check(1)
leave.set()
user.join()
check(3)
"""
    run_python(FORK + program)


@needs_fork
def test_a_child_forked_inside_stays_inside_until_it_leaves() -> None:
    program = """
block = single_threaded_blas()
block.__enter__()

def act():
    check(1)
    with single_threaded_blas():
        check(1)
    check(1)
    block.__exit__(None, None, None)
    check(3)

in_child(act)
check(1)
block.__exit__(None, None, None)
check(3)
"""
    run_python(FORK + program)


@needs_fork
def test_a_fork_waits_until_an_entry_is_complete() -> None:
    program = """
import threadpoolctl
midway, never = threading.Event(), threading.Event()

def slow_limits(**kwargs):
    handle = threadpool_limits(**kwargs)
    midway.set()
    never.wait(0.2)
    return handle

def other():
    with single_threaded_blas():
        never.wait()

def act():
    check(3)
    with single_threaded_blas():
        check(1)
    check(3)

threadpoolctl.threadpool_limits = slow_limits
threading.Thread(target=other, daemon=True).start()
midway.wait()
in_child(act)
"""
    run_python(FORK + program)


@needs_fork
def test_forks_while_others_enter_and_leave_do_not_hang() -> None:
    program = """
stop = threading.Event()

def churn():
    while not stop.is_set():
        with single_threaded_blas():
            pass

def act():
    with single_threaded_blas():
        check(1)
    check(3)

churner = threading.Thread(target=churn, daemon=True)
churner.start()
for _ in range(8):
    in_child(act)
stop.set()
churner.join()
check(3)
"""
    run_python(FORK + program)


@needs_fork
def test_a_child_starts_workers_of_its_own() -> None:
    program = """
workers = Workers(2)
tasks = [lambda i=i: i for i in range(5)]
assert list(workers.run(tasks)) == list(range(5))

def act():
    assert list(workers.run(tasks)) == list(range(5))
    workers.close()

in_child(act)
in_child(workers.close)
assert list(workers.run(tasks)) == list(range(5))
workers.close()
"""
    run_python(FORK + program)
