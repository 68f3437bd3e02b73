"""Sampling: what may be drawn and how often, on a model whose next logits are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import Given, gpt, token_ids

import minitransformer as mt
from minitransformer.generate import generate

SEEDS = st.integers(0, 2**32)


def drawn(logits: Any, rows: int = 4000, **settings: Any) -> np.ndarray:
    """One token sampled in each of many rows that share `logits`."""
    model = Given(lambda length: [logits])
    ids = generate(model, np.zeros((rows, 1), int), max_new_tokens=1, do_sample=True, **{"seed": 0, **settings})
    return ids[:, 1]


def distribution(
    logits: list[float],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> dict[int, float]:
    """The law, token by token: what may be sampled, and its probability."""
    weights = {i: float(np.exp(x / temperature)) for i, x in enumerate(logits)}
    best_first = sorted(weights, key=lambda i: (-weights[i], i))
    kept = best_first[:top_k]
    if top_p is not None:
        total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
        for i in kept:
            nucleus.append(i)
            mass += weights[i] / total
            assume(abs(mass - top_p) > 1e-9)
            if mass > top_p:
                break
        kept = nucleus
    if min_p is not None:
        assume(all(abs(weights[i] - min_p * weights[best_first[0]]) > 1e-9 for i in kept[1:]))
        kept = [i for i in kept if weights[i] >= min_p * weights[best_first[0]]]
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@given(
    # in steps, so that no two logits differ and have one exponential
    logits=st.lists(st.integers(-150, 150).map(lambda n: n / 100), min_size=1, max_size=6),
    temperature=st.floats(0.8, 3),
    top_k=st.none() | st.integers(1, 8),
    top_p=st.none() | st.floats(0.01, 0.99),
    min_p=st.none() | st.floats(0, 1),
    seed=SEEDS,
)
def test_what_is_sampled_and_how_often_is_the_distribution_token_by_token(
    logits: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
) -> None:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    law = distribution(logits, **settings)
    counts = np.bincount(drawn(logits, seed=seed, **settings), minlength=len(logits))
    assert set(np.flatnonzero(counts)) == set(law)
    for token, p in law.items():  # seven standard deviations
        assert abs(counts[token] - 4000 * p) <= 7 * np.sqrt(4000 * p * (1 - p)) + 1e-6


def test_top_p_counts_within_top_k() -> None:
    logits = np.log([0.3, 0.25, 0.2, 0.15, 0.1])
    assert set(drawn(logits, top_p=0.5)) == {0, 1}
    assert set(drawn(logits, top_p=0.5, top_k=2)) == {0}  # 0.3 / 0.55 is enough


def test_the_probabilities_are_those_of_softmax_at_the_temperature() -> None:
    logits = np.array([0.0, 1.0, 2.0])
    for temperature in (0.5, 1.0, 2.0):
        p = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        got = np.bincount(drawn(logits, 40_000, temperature=temperature), minlength=3) / 40_000
        np.testing.assert_allclose(got, p, atol=6 * 0.5 / 200)


@given(logits=st.lists(st.integers(-1000, 1000), min_size=1, max_size=6), seed=SEEDS)
def test_one_candidate_is_the_greedy_choice(logits: list[int], seed: int) -> None:
    greedy = generate(Given(lambda length: [logits]), [[0]], max_new_tokens=1)[0, 1]
    assert greedy == np.argmax(logits)
    assert set(drawn(logits, 50, seed=seed, top_k=1)) == {greedy}
    assert set(drawn(logits, 50, seed=seed, top_p=1e-9)) == {greedy}
    best = {i for i, x in enumerate(logits) if x == max(logits)}
    assert set(drawn(logits, 50, seed=seed, min_p=1.0)) <= best
    assert set(drawn(logits, 50, seed=seed, temperature=1e-320)) <= best


def test_huge_logits_do_not_overflow() -> None:
    assert set(drawn([1e300, 0.0, -1e300], 10)) == {0}
    assert set(drawn([-1e300, -1e300, -np.inf], 50)) == {0, 1}


@given(
    logits=st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    prompt=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    penalty=st.floats(0.5, 3),
)
def test_the_repetition_penalty_counts_real_tokens_only(logits: list[float], prompt: list[int], penalty: float) -> None:
    padded = [0] * 3 + prompt
    mask = [0] * 3 + [1] * len(prompt)
    expected = np.array(logits)
    for token in set(prompt):
        expected[token] = expected[token] / penalty if expected[token] > 0 else expected[token] * penalty
    model = Given(lambda length: [logits])
    got = generate(model, [padded], attention_mask=[mask], max_new_tokens=1, repetition_penalty=penalty)
    assert got[0, -1] == expected.argmax()


def test_the_repetition_penalty_counts_new_tokens() -> None:
    model = Given(lambda length: [[4.0, 3.0, 1.0]])
    assert generate(model, [[2]], max_new_tokens=3, repetition_penalty=2.0).tolist() == [[2, 0, 1, 0]]


@pytest.mark.parametrize("do_sample", [False, True])
def test_the_seed_decides_the_tokens_and_rows_do_not_see_each_other(do_sample: bool) -> None:
    model, ids = gpt(), token_ids(3, 4)
    kwargs = {"max_new_tokens": 4, "do_sample": do_sample}
    both = model.generate(ids, seed=5, **kwargs)
    np.testing.assert_array_equal(model.generate(ids, seed=5, **kwargs), both)
    np.testing.assert_array_equal(model.generate(ids[:1], seed=5, **kwargs), both[:1])
    np.testing.assert_array_equal(model.generate(ids[[0, 2]], seed=5, **kwargs)[0], both[0])
    assert np.array_equal(model.generate(ids, seed=6, **kwargs), both) != do_sample


def test_rows_and_steps_draw_numbers_of_their_own() -> None:
    ids = generate(
        Given(lambda length: [[0.0] * 50]), np.zeros((20, 1), int), max_new_tokens=20, do_sample=True, seed=0
    )
    new = ids[:, 1:]
    assert len({tuple(row) for row in new}) == len({tuple(column) for column in new.T}) == 20


def test_without_a_seed_the_process_stream_decides() -> None:
    model = Given(lambda length: [[0.0] * 50])

    def tokens() -> list[int]:
        return generate(model, [[0]], max_new_tokens=9, do_sample=True)[0].tolist()

    mt.manual_seed(3)
    first, second = tokens(), tokens()
    mt.manual_seed(3)
    assert tokens() == first != second
