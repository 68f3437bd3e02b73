"""Masked tokens: which are chosen, what becomes of them, and that all of it is a function of seed and step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.data import ArrayDataset, MaskedTokens, TokenDataset
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError

V, MASK, SPECIAL = 11, 10, (0, 9)


def rows(B: int, T: int, seed: int) -> ArrayDataset:
    """Rows in which everything occurs, with padding, token types and labels of another kind."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(0, T + 1, (B, 1))
    types = rng.integers(0, 2, (B, T))
    return ArrayDataset(
        input_ids=rng.integers(0, V, (B, T), "u1"), attention_mask=mask, token_type_ids=types, labels=np.arange(B)
    )


def masked(data: Any, **changes: Any) -> MaskedTokens:
    settings = {"vocab_size": V, "mask_token_id": MASK, "special_token_ids": SPECIAL, "mlm_probability": 0.5}
    return MaskedTokens(data, **{**settings, **changes})


def check(given: dict[str, np.ndarray], made: dict[str, np.ndarray]) -> None:
    """`made` says of every token either nothing and keeps it, or what it was."""
    assert list(made) == [*(name for name in given if name != "targets" and name != "labels"), "labels"]
    ids, labels = given["input_ids"], made["labels"]
    chosen = labels != -100
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(made["input_ids"][~chosen], ids[~chosen])
    assert not np.isin(ids[chosen], [*SPECIAL, MASK]).any()
    assert not np.isin(made["input_ids"][chosen], SPECIAL).any()
    for name in ("attention_mask", "token_type_ids"):
        if name in given:
            np.testing.assert_array_equal(made[name], given[name])
    assert not chosen[given.get("attention_mask", np.ones_like(ids)) == 0].any()
    assert made["input_ids"].dtype == made["labels"].dtype == np.int64


@given(
    B=st.integers(1, 9),
    T=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    size=st.integers(1, 9),
)
def test_labels_are_what_was_hidden(B: int, T: int, seed: int, step: int, size: int) -> None:
    data = rows(B, T, seed % 1000)
    made = masked(data)
    check(data.batch(seed, step, size), made.batch(seed, step, size))
    again = masked(data).batch(seed, step, size)
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in made.batch(seed, step, size).items()
    }


@given(B=st.integers(1, 9), T=st.integers(1, 9), sizes=st.tuples(st.integers(1, 10), st.integers(1, 10)))
def test_evaluation_masks_each_row_in_one_way_whatever_the_batches(B: int, T: int, sizes: tuple[int, int]) -> None:
    data = rows(B, T, 0)
    found = []
    for size in sizes:
        batches = list(masked(data).sequential(size))
        for given_batch, batch in zip(data.sequential(size), batches, strict=True):
            check(given_batch, batch)
        found.append({name: np.concatenate([b[name] for b in batches]).tobytes() for name in batches[0]})
    assert found[0] == found[1]


def test_windows_of_text_lose_their_targets() -> None:
    data = TokenDataset(np.arange(40) % V, 7)
    made = masked(data)
    check(data.batch(3, 4, 5), made.batch(3, 4, 5))
    assert "targets" not in made.batch(3, 4, 5)
    assert (made.block_size, made.tokenizer) == (7, None)


def test_rows_seeds_and_steps_are_masked_apart() -> None:
    made = masked(ArrayDataset(input_ids=np.ones((1, 200), int)))
    first, step, seed = (made.batch(*key, 2)["labels"] for key in ((0, 0), (0, 1), (1, 0)))
    for other in (first[1], step[0], seed[0]):
        assert (first[0] != other).any()


def within(count: int, n: int, p: float) -> bool:
    """Whether `count` of `n` is within 5 deviations of a binomial with chance p."""
    return abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("p", [0.15, 0.4])
def test_eighty_ten_ten(p: float) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (400, 500))
    batch = next(masked(ArrayDataset(input_ids=ids), mlm_probability=p).sequential(400))
    ordinary = ~np.isin(ids, [*SPECIAL, MASK])
    chosen = batch["labels"] != -100
    inputs = batch["input_ids"]
    n = int(chosen.sum())
    assert within(n, int(ordinary.sum()), p)
    hidden, same = chosen & (inputs == MASK), chosen & (inputs == ids)
    changed = chosen & ~hidden & ~same
    kinds = V - 3  # a token drawn may be the one that was there
    assert within(int(hidden.sum()), n, 0.8)
    assert within(int(same.sum()), n, 0.1 + 0.1 / kinds)
    assert within(int(changed.sum()), n, 0.1 - 0.1 / kinds)
    for token in range(V):
        count = int((inputs[changed] == token).sum())
        assert within(count, int(changed.sum()), 1 / kinds) if token in range(1, 9) else count == 0
    # One token does not tell of the next, nor a token of what becomes of it.
    pairs = ordinary[:, 1:] & ordinary[:, :-1]
    assert within(int((chosen[:, 1:] & chosen[:, :-1]).sum()), int(pairs.sum()), p * p)
    for token in range(1, 9):
        here = chosen & (ids == token)
        assert within(int((hidden & here).sum()), int(here.sum()), 0.8)


def test_nothing_is_chosen_with_probability_0() -> None:
    assert (
        masked(ArrayDataset(input_ids=np.ones((9, 9), int)), mlm_probability=0).batch(0, 0, 9)["labels"] == -100
    ).all()


def test_the_source_names_all_that_decides_the_batches() -> None:
    assert masked(DATA).source == {
        "data": DATA.source,
        "vocab_size": V,
        "mask_token_id": MASK,
        "special_token_ids": [0, 9],
        "mlm_probability": 0.5,
    }


DATA = ArrayDataset(input_ids=[[1, 2]])
REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "data": (
        DTypeError,
        {"data": [[1, 2]]},
        "data is [[1, 2]], expected a TokenDataset or ArrayDataset. Make one first.",
    ),
    "no tokens": (
        ShapeError,
        {"data": ArrayDataset(labels=[1])},
        "the input_ids of the data are none, expected integers (rows, length). Pass ArrayDataset(input_ids=rows).",
    ),
    "no rows of tokens": (
        ShapeError,
        {"data": ArrayDataset(input_ids=[0.5])},
        "the input_ids of the data are float64 of shape (1,), expected integers (rows, length). "
        "Pass ArrayDataset(input_ids=rows).",
    ),
    "mask": (
        RangeError,
        {"mask_token_id": V},
        f"a special token is {V}, expected ids from 0 to 10. Count all of them in vocab_size.",
    ),
    "negative": (
        ConfigError,
        {"mask_token_id": -1},
        "mask_token_id must be a whole number from 0 to 2**64 - 1, got -1. Change mask_token_id.",
    ),
    "special": (
        RangeError,
        {"special_token_ids": [-1]},
        "a special token is -1, expected ids from 0 to 10. Count all of them in vocab_size.",
    ),
    "words": (
        DTypeError,
        {"special_token_ids": [0.5]},
        "special_token_ids have dtype float64, expected integers. Pass their ids.",
    ),
    "all": (
        ConfigError,
        {"vocab_size": 2, "special_token_ids": [0], "mask_token_id": 1},
        "all 2 ids are special tokens. Raise vocab_size, which counts all ids.",
    ),
    "probability": (
        ConfigError,
        {"mlm_probability": 1},
        "mlm_probability is 1, expected a number from 0, below 1. Change mlm_probability.",
    ),
}


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_make_no_sense_are_refused(kind: type[Exception], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kind) as error:
        masked(**{"data": DATA, **settings})
    assert str(error.value) == f"MaskedTokens: {message}"
