"""Rows of tokens with their labels: drawn as a function of seed and step, in order to evaluate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.data import RowDataset
from minitransformer.errors import ConfigError, DataError, DTypeError, ShapeError


def numbered(N: int, T: int = 3) -> RowDataset:
    """Row n holds n everywhere."""
    ids = np.repeat(np.arange(N)[:, None], T, axis=1)
    return RowDataset(ids, labels=np.arange(N, dtype=np.uint8), attention_mask=ids >= 0)


@given(N=st.integers(1, 9), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**64 - 1), size=st.integers(1, 20))
def test_a_batch_holds_whole_rows_and_is_a_function_of_seed_and_step(N: int, seed: int, step: int, size: int) -> None:
    batch, again = (numbered(N).batch(seed, step, size) for _ in range(2))
    assert list(batch) == ["input_ids", "labels", "attention_mask"]
    np.testing.assert_array_equal(batch["input_ids"], np.repeat(batch["labels"][:, None], 3, axis=1))
    np.testing.assert_array_equal(batch["attention_mask"], np.ones((size, 3)))
    for name, array in batch.items():
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, again[name])


def test_rows_are_drawn_uniformly() -> None:
    counts = np.bincount(numbered(5).batch(0, 0, 10_000)["labels"], minlength=5)
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000 * 0.8)


@given(N=st.integers(1, 9), size=st.integers(1, 10))
def test_evaluation_has_every_row_once_in_order(N: int, size: int) -> None:
    batches = list(numbered(N).sequential(size))
    assert [len(b["labels"]) for b in batches[:-1]] == [size] * (len(batches) - 1)
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), np.arange(N))
    np.testing.assert_array_equal(np.concatenate([b["input_ids"] for b in batches])[:, 0], np.arange(N))


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "float": (
        DTypeError,
        {"input_ids": [[0.5]]},
        "input_ids have dtype float64, expected integers. Encode text with a tokenizer, and number the classes.",
    ),
    "one row": (
        ShapeError,
        {"input_ids": [1, 2]},
        "input_ids have shape (2,), expected (rows, length). Pad all to one length.",
    ),
    "no rows": (
        DataError,
        {"input_ids": np.zeros((0, 3), int)},
        "input_ids hold no tokens, shape (0, 3). Give at least one row.",
    ),
    "no tokens": (
        DataError,
        {"input_ids": np.zeros((3, 0), int)},
        "input_ids hold no tokens, shape (3, 0). Give at least one row.",
    ),
    "labels": (
        ShapeError,
        {"input_ids": [[1], [2]], "labels": [1]},
        "labels have shape (1,), expected 2 rows as input_ids have. Give one entry for each row.",
    ),
    "no axis": (
        ShapeError,
        {"input_ids": [[1], [2]], "labels": 1},
        "labels have shape (), expected 2 rows as input_ids have. Give one entry for each row.",
    ),
    "source": (DTypeError, {"input_ids": [[1]], "source": "text"}, "source is 'text', expected a dict. Leave it out."),
}


@pytest.mark.parametrize(("kind", "call", "message"), REFUSED.values(), ids=REFUSED)
def test_arrays_that_cannot_serve_are_refused(kind: type[Exception], call: dict[str, Any], message: str) -> None:
    with pytest.raises(kind) as error:
        RowDataset(**call)
    assert str(error.value) == f"RowDataset: {message}"


def test_numbers_of_rows_steps_and_seeds_that_make_no_sense_are_refused() -> None:
    data = numbered(3)
    for call in (lambda: data.batch(-1, 0, 1), lambda: data.batch(0, -1, 1), lambda: data.batch(0, 0, 0)):
        with pytest.raises(ConfigError, match=r"^batch: (seed|step|batch_size) must be a whole number from [01]"):
            call()
    with pytest.raises(ConfigError, match=r"^sequential: batch_size must be"):
        next(data.sequential(0))
