"""`threads.split`: every index once, on several threads, and on one inside a worker."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import threads


@pytest.fixture(autouse=True)
def restored() -> object:
    before = threads._num_threads
    yield
    threads._num_threads = before


@given(count=st.integers(0, 40), number=st.integers(1, 9))
def test_every_index_once(count: int, number: int) -> None:
    threads.set_num_threads(number)
    seen = np.zeros(count, int)
    slices = []

    def task(first: int, last: int) -> None:
        slices.append((first, last))
        seen[first:last] += 1

    threads.split(count, task)
    assert (seen == 1).all()
    assert len(slices) == max(1, min(number, count))
    sizes = [last - first for first, last in slices]
    assert max(sizes) - min(sizes) <= 1


def test_slices_run_at_the_same_time() -> None:
    threads.set_num_threads(3)
    barrier = threading.Barrier(3, timeout=20)
    threads.split(3, lambda first, last: barrier.wait())  # none would pass alone


def test_a_worker_has_no_threads_beside_its_own() -> None:
    threads.set_num_threads(4)
    found: list[tuple[int, int, int]] = []

    def task() -> int:
        threads.split(8, lambda first, last: found.append((first, last, threading.get_ident())))
        return threading.get_ident()

    with threads.Workers(2) as workers:
        idents = list(workers.run([task, task]))
    assert sorted(found) == sorted((0, 8, ident) for ident in idents)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_what_a_slice_raises_is_raised_after_all_have_ended(bad: int) -> None:
    threads.set_num_threads(3)
    ended = []

    def task(first: int, last: int) -> None:
        if first == bad:
            raise ValueError(f"slice {first}")
        ended.append(first)

    with pytest.raises(ValueError, match=f"slice {bad}"):
        threads.split(3, task)
    assert sorted(ended) == sorted({0, 1, 2} - {bad})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own() -> None:
    threads.set_num_threads(2)
    barrier = threading.Barrier(2, timeout=20)
    threads.split(2, lambda first, last: barrier.wait())
    child = os.fork()
    if child == 0:
        code = 1
        try:
            threads.split(2, lambda first, last: barrier.wait())
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


def test_several_threads_may_split_at_once() -> None:
    threads.set_num_threads(3)
    totals = np.zeros((8, 64), int)

    def user(row: int) -> None:
        for _ in range(20):
            threads.split(
                64, lambda first, last: totals.__setitem__((row, slice(first, last)), totals[row, first:last] + 1)
            )

    users = [threading.Thread(target=user, args=(row,)) for row in range(8)]
    for each in users:
        each.start()
    for each in users:
        each.join()
    assert (totals == 20).all()
