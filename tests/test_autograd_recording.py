"""What is recorded and where: no_grad, detached and frozen tensors, and threads."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import minitransformer as mt


def leaf(*shape: int, seed: int = 0) -> mt.Tensor:
    return mt.tensor(np.asarray(np.random.default_rng(seed).standard_normal(shape)), requires_grad=True)


def test_no_grad_as_context_and_decorator() -> None:
    x = leaf(2)

    @mt.no_grad()
    def double(t: mt.Tensor) -> mt.Tensor:
        return t * 2.0

    with mt.no_grad():
        assert not (x * 2.0).requires_grad
        with mt.no_grad():
            pass
        assert not (x * 2.0).requires_grad
    assert not double(x).requires_grad and not double(x).requires_grad
    assert (x * 2.0).requires_grad
    with pytest.raises(KeyError), mt.no_grad():
        raise KeyError
    assert (x * 2.0).requires_grad


def test_no_grad_holds_in_its_own_thread_only() -> None:
    x, seen = leaf(2), []
    with mt.no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2.0).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_detach_and_constants_end_history() -> None:
    x = leaf(2)
    assert not x.detach().requires_grad and x.detach().is_leaf
    assert np.shares_memory(x.detach().data, x.data)
    assert not (mt.tensor([1.0]) * 2.0).requires_grad
    (x * x.detach()).sum().backward()
    np.testing.assert_array_equal(x.grad, x.data)


def test_frozen_leaves_get_nothing() -> None:
    x, y = leaf(2), leaf(2)
    y.requires_grad = False
    (x * y).sum().backward()
    assert x.grad is not None and y.grad is None


def test_threads_get_the_gradients_of_serial_runs() -> None:
    weight = leaf(8, 8)
    batches = [np.random.default_rng(i).standard_normal((4, 8)) for i in range(8)]

    def gradient(x: np.ndarray) -> np.ndarray:
        h = mt.Tensor(x)
        for _ in range(20):
            h = (h @ weight).tanh()
        return mt.grad((h * h).sum(), [weight])[0]

    serial = [gradient(x) for x in batches]
    results: list[Any] = [None] * len(batches)
    start = threading.Barrier(len(batches))

    def work(i: int) -> None:
        start.wait()
        results[i] = gradient(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(results, serial, strict=True):
        assert got.tobytes() == expected.tobytes()
    assert weight.grad is None
