"""Mutation scores: a strong test and a weak one, and what counts as catching a bug."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer import functional as F
from minitransformer import testing
from minitransformer.autograd import OPS
from minitransformer.errors import ConfigError, GradientError
from minitransformer.testing import bugs
from minitransformer.testing.bugs import MutationScore, mutation_score

SOFTMAX = ["softmax_jacobian_without_row_sum", "dv_from_scores", "dk_without_scale", "attention_without_scale"]

ATTENTION = OPS["attention"]
RIGHT = ATTENTION.forward, ATTENTION.backward


def buggy() -> bool:
    """Whether one of SOFTMAX is inside."""
    return (ATTENTION.forward, ATTENTION.backward) != RIGHT


def attend() -> mt.Tensor:
    q, k, v = (mt.tensor(np.random.default_rng(i).standard_normal((1, 2, 3, 4)), requires_grad=True) for i in range(3))
    return F.scaled_dot_product_attention(q, k, v)


def strong() -> None:
    q, k, v = (np.random.default_rng(i).standard_normal((1, 2, 3, 4)) for i in range(3))
    mt.gradcheck(F.scaled_dot_product_attention, [q, k, v])
    scores = q @ k.swapaxes(-1, -2) / 2
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(attend().data, weights @ v, rtol=1e-12)


def weak() -> None:
    out = attend()
    out.sum().backward()
    assert out.shape == (1, 2, 3, 4)


def test_a_strong_test_catches_and_a_weak_one_does_not() -> None:
    good = mutation_score(strong, SOFTMAX)
    assert good.caught == SOFTMAX
    assert good.survived == []
    assert good.score == 1
    assert "AssertionError" in str(good.outcomes["attention_without_scale"])
    bad = mutation_score(weak, SOFTMAX)
    assert bad.caught == []
    assert bad.survived == SOFTMAX
    assert bad.score == 0
    assert not buggy()


def test_the_whole_zoo_is_the_default() -> None:
    assert list(mutation_score(weak).outcomes) == bugs.names()
    assert testing.mutation_score is mutation_score
    assert testing.bugs is bugs


def test_the_table() -> None:
    score = MutationScore({"dk_without_scale": "GradcheckError: dk is wrong", "dv_from_scores": None})
    assert str(score).splitlines() == [
        "dk_without_scale  caught    GradcheckError: dk is wrong",
        "dv_from_scores    SURVIVED",
        "1 of 2 bugs caught (50%)",
    ]


def test_a_hypothesis_test_stops_at_its_first_failure() -> None:
    failures = []

    @given(st.integers(0, 1000), st.integers(1, 3))
    def lookups(seed: int, repeats: int) -> None:
        assume(seed % 2)
        weight = mt.tensor(np.ones((4, 2)), requires_grad=True)
        F.embedding(np.arange(4).repeat(repeats), weight).sum().backward()
        if (weight.grad != repeats).any():
            failures.append(repeats)
            raise AssertionError("the gradient is not the number of lookups")

    inner = lookups.hypothesis.inner_test
    score = mutation_score(lookups, ["embedding_gradient_overwritten", "dk_without_scale"])
    assert score.outcomes == {
        "embedding_gradient_overwritten": "AssertionError: the gradient is not the number of lookups",
        "dk_without_scale": None,
    }
    assert len(failures) == 1
    assert lookups.hypothesis.inner_test is inner


def test_what_stops_a_program_is_no_catch() -> None:
    def interrupted() -> None:
        if buggy():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mutation_score(interrupted, SOFTMAX)
    assert not buggy()


@pytest.mark.parametrize("skip", [pytest.skip, unittest.TestCase().skipTest])
def test_a_skip_catches_nothing(skip: Callable[[str], Any]) -> None:
    def skips_when_it_matters() -> None:
        if buggy():
            skip("no reason")

    assert mutation_score(skips_when_it_matters, SOFTMAX).survived == SOFTMAX

    with pytest.raises(GradientError, match="does not pass without a bug"):
        mutation_score(lambda: skip("no reason"), SOFTMAX)


def test_pytests_own_failures_are_caught() -> None:
    def fails() -> None:
        if buggy():
            pytest.fail("on purpose")

    assert mutation_score(fails, SOFTMAX).outcomes == dict.fromkeys(SOFTMAX, "Failed: on purpose")


def test_a_test_that_fails_anyway_is_refused() -> None:
    def broken() -> None:
        raise AssertionError("always")

    with pytest.raises(GradientError, match=r"does not pass without a bug\. Make it pass first"):
        mutation_score(broken)


def test_a_test_that_keeps_state_is_refused() -> None:
    seen = []

    def remembers() -> None:
        seen.append(buggy())
        assert not any(seen)

    with pytest.raises(GradientError, match="after it was run with some"):
        mutation_score(remembers, SOFTMAX)


@pytest.mark.parametrize(
    ("test", "names", "message"),
    [
        (lambda: True, None, "the test returned True, expected nothing"),
        (lambda: (x for x in ()), None, "the test returned <generator"),
        ("test", None, "test_function is 'test', expected a function without arguments"),
        (weak, [], "there are no bugs to install"),
    ],
)
def test_what_is_no_test_is_refused(test: Any, names: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mutation_score(test, names)
