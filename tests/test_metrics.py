"""Scores of predictions: what they count, their bounds, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer.errors import DataError, DTypeError, ShapeError
from minitransformer.metrics import accuracy, exact_match

pairs = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 1, 2, -100])), min_size=1, max_size=12)
texts = st.text("ab ", max_size=3)


@given(pairs.filter(lambda drawn: any(target != -100 for _, target in drawn)))
def test_accuracy_is_the_share_of_hits_among_what_counts(drawn: list[tuple[int, int]]) -> None:
    found, wanted = np.array(drawn).T
    hits = [p == t for p, t in drawn if t != -100]
    assert accuracy(found, wanted) == pytest.approx(sum(hits) / len(hits), abs=1e-15)
    assert accuracy(found[:, None], wanted[:, None]) == accuracy(found, wanted)
    assert accuracy(found.tolist(), mt.tensor(wanted)) == accuracy(found, wanted)
    assert accuracy(wanted, wanted) == 1
    assert accuracy(wanted + 1, wanted) == 0


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_exact_match_is_the_share_of_equal_texts(drawn: list[tuple[str, str]]) -> None:
    found, wanted = map(list, zip(*drawn, strict=True))
    score = exact_match(found, wanted)
    assert score * len(drawn) == pytest.approx(sum(a == b for a, b in drawn))
    assert exact_match(wanted, found) == score
    assert exact_match(found, found) == 1
    assert exact_match([text + "." for text in found], found) == 0
    assert exact_match(tuple(found[::-1]), wanted[::-1]) == score


REFUSED: list[tuple[Callable[..., float], Any, Any, type[Exception], str]] = [
    (
        accuracy,
        np.zeros(2),
        [0, 1],
        DTypeError,
        "predictions have dtype float64, expected integers. Take the likeliest classes: logits.argmax(-1).",
    ),
    (accuracy, [0, 1], [True, False], DTypeError, "targets have dtype bool, expected integers. Take the likeliest"),
    (
        accuracy,
        [[0, 1]],
        [0, 1],
        ShapeError,
        "predictions have shape (1, 2), targets (2,). Give one prediction for each target.",
    ),
    (accuracy, [0], [-100], DataError, "there is no target that counts. Give at least one that is not -100."),
    (accuracy, np.zeros(0, int), np.zeros(0, int), DataError, "there is no target that counts. Give at least one"),
    (
        exact_match,
        "a",
        ["a"],
        DTypeError,
        "predictions are 'a', expected a list of strings. Decode them, and put a single one in a list.",
    ),
    (exact_match, ["a"], [3], DTypeError, "references are [3], expected a list of strings. Decode them, and put a"),
    (
        exact_match,
        ["a"],
        [],
        ShapeError,
        "there are 1 predictions and 0 references. Give one prediction for each reference.",
    ),
    (exact_match, [], [], DataError, "there is nothing to compare. Give at least one pair."),
]


@pytest.mark.parametrize(("score", "found", "wanted", "kind", "message"), REFUSED, ids=[row[-1] for row in REFUSED])
def test_refuses(score: Callable[..., float], found: Any, wanted: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        score(found, wanted)
    assert str(error.value).startswith(f"{score.__name__}: {message}")
