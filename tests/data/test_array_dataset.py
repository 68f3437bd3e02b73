"""Rows of arrays: the same rows of every array, each batch a function of seed and step."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.data import ArrayDataset
from minitransformer.errors import AllocationError, ConfigError, DataError, DTypeError, ShapeError

counters = st.integers(0, 2**64 - 1)
rows = st.integers(1, 20)


def numbered(N: int, dtype: Any = np.float32) -> ArrayDataset:
    """Rows that hold their own number, in every array."""
    number = np.arange(N)
    return ArrayDataset(pixels=np.broadcast_to(number[:, None, None], (N, 2, 3)).astype(dtype), labels=number)


@given(rows, counters, counters, st.integers(1, 5))
def test_a_batch_holds_the_same_rows_of_every_array(N: int, seed: int, step: int, B: int) -> None:
    batch = numbered(N).batch(seed, step, B)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "pixels": ((B, 2, 3), np.dtype(np.float32)),
        "labels": ((B,), np.dtype(np.int64)),
    }
    np.testing.assert_array_equal(batch["pixels"], np.broadcast_to(batch["labels"][:, None, None], (B, 2, 3)))


@given(rows, counters, counters)
def test_a_batch_is_a_pure_function_of_seed_and_step(N: int, seed: int, step: int) -> None:
    data = numbered(N)
    first = data.batch(seed, step, 4)["labels"]
    data.batch(seed, step ^ 1, 3)
    np.testing.assert_array_equal(numbered(N).batch(seed, step, 4)["labels"], first)


def test_rows_are_drawn_uniformly_and_otherwise_at_other_steps() -> None:
    data = numbered(6)
    counts = np.bincount(data.batch(0, 0, 6000)["labels"], minlength=6)
    assert np.all(np.abs(counts - 1000) < 150)  # five standard deviations
    drawn = {numbered(10**6).batch(s, t, 4)["labels"].tobytes() for s in (0, 1, 2**63) for t in (0, 1, 2**63)}
    assert len(drawn) == 9


@given(rows, st.integers(1, 6))
def test_sequential_has_each_row_once_in_order(N: int, B: int) -> None:
    parts = list(numbered(N).sequential(B))
    assert [len(part["labels"]) for part in parts] == [B] * (N // B) + [N % B] * (N % B > 0)
    for name in ("labels", "pixels"):
        joined = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(joined.reshape(N, -1)[:, 0], np.arange(N))
    assert len(numbered(N)) == N


def test_batches_do_not_share_memory_with_the_arrays() -> None:
    data = numbered(3)
    for batch in (data.batch(0, 0, 3), next(data.sequential(3))):
        for name, array in batch.items():
            assert not np.shares_memory(array, data.arrays[name])


@given(rows, st.sampled_from([np.float32, np.float64]), st.data())
def test_the_source_tells_any_change(N: int, dtype: Any, data: st.DataObject) -> None:
    own = numbered(N, dtype)
    source = own.source
    assert json.loads(json.dumps(source)) == source == numbered(N, dtype).source
    changed = own.arrays["pixels"].copy()
    changed[data.draw(st.integers(0, N - 1)), 1, 2] += 0.5
    assert ArrayDataset(pixels=changed, labels=own.arrays["labels"]).source != source
    assert ArrayDataset(pixels=own.arrays["pixels"]).source != source
    turned = np.asfortranarray(own.arrays["pixels"])
    assert ArrayDataset(pixels=turned, labels=own.arrays["labels"]).source == source


@pytest.mark.parametrize(
    ("arrays", "kind", "message"),
    [
        (
            {"pixels": np.zeros((3, 2)), "labels": np.zeros(2)},
            ShapeError,
            "the shapes are pixels (3, 2), labels (2,), expected the same number of rows first. "
            "Give every array one row for each example.",
        ),
        ({"labels": 3}, ShapeError, "the shapes are labels (), expected the same number of rows first. Give every"),
        ({}, DataError, "there are no rows. Pass arrays that hold some, as pixels=images."),
        ({"pixels": np.zeros((0, 2))}, DataError, "there are no rows. Pass arrays that hold some"),
        ({"labels": "text"}, DTypeError, "got a builtins.str, expected a Tensor, NumPy array or number. Convert it"),
    ],
)
def test_what_cannot_serve_is_refused(arrays: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        ArrayDataset(**arrays)
    assert str(error.value).startswith(f"ArrayDataset: {message}")


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", True, None, 2**64])
def test_sizes_must_be_positive_whole_numbers(bad: Any) -> None:
    for call in (lambda: numbered(4).batch(0, 0, bad), lambda: next(numbered(4).sequential(bad))):
        with pytest.raises(ConfigError, match=r"batch_size must be a whole number from 1 to 2\*\*64 - 1, got"):
            call()
    with pytest.raises(AllocationError, match=r"^batch: a batch of shape \(1152921504606846976, 40\) uint8 needs"):
        numbered(4).batch(0, 0, 2**60)
