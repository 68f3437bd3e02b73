"""Beam search: against all continuations, against greedy decoding, with and without a cache."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BLOCK, Given, Listener, V, gpt, token_ids

from minitransformer.errors import ConfigError, NonFiniteError
from minitransformer.generate import generate
from minitransformer.generate.beams import Beams

EOS = 1


class Grammar(Given):
    """A model of V tokens of which the first `few` are possible; their logits are drawn for each prefix."""

    def __init__(self, few: int, seed: int) -> None:
        super().__init__(lambda length: [[0.0]])
        self.few, self.seed = few, seed

    def of(self, prefix: np.ndarray) -> np.ndarray:
        logits = np.full(V, -np.inf)
        logits[: self.few] = np.random.default_rng([self.seed, *prefix]).normal(0, 1.5, self.few)
        return logits

    def __call__(self, ids: np.ndarray, attention_mask: Any = None, cache: Any = None) -> Any:
        logits = np.array([self.of(row) for row in ids])
        return SimpleNamespace(logits=SimpleNamespace(data=logits[:, None]))

    def log_p(self, prompt: list[int], tokens: tuple[int, ...]) -> float:
        total, prefix = 0.0, list(prompt)
        for token in tokens:
            logits = self.of(np.array(prefix))[: self.few]
            total += logits[token] - np.log(np.exp(logits).sum())
            prefix.append(token)
        return float(total)


def continuations(few: int, n: int, eos: int | None) -> set[tuple[int, ...]]:
    """All of at most n tokens, cut behind the end."""
    every = product(range(few), repeat=n)
    return {tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in every}


@given(
    few=st.integers(1, 3),
    n=st.integers(0, 3),
    penalty=st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]),
    eos=st.sampled_from([None, EOS]),
    seed=st.integers(0, 1000),
)
def test_exhaustive_where_no_prefix_is_left_out(few: int, n: int, penalty: float, eos: int | None, seed: int) -> None:
    model, prompts = Grammar(few, seed), [[3, 4], [5, 6]]
    options = {"num_beams": max(2, few ** max(n - 1, 1)), "length_penalty": penalty, "eos_token_id": eos}
    found = generate(model, prompts, max_new_tokens=n, **options)
    for row, prompt in zip(found.tolist(), prompts, strict=True):
        scores = {tokens: model.log_p(prompt, tokens) / max(len(tokens), 1) ** penalty for tokens in
                  continuations(few, n, eos)}  # fmt: skip
        best = max(scores.values())
        end = row.index(EOS, 2) + 1 if eos is not None and EOS in row[2:] else len(row)
        assert row[:2] == prompt and scores[tuple(row[2:end])] == pytest.approx(best, abs=1e-9)
        assert set(row[end:]) <= {EOS}


@given(beams=st.integers(2, 5), seed=st.integers(0, 100), n=st.integers(1, 5), T=st.integers(1, 3))
def test_the_cache_and_other_rows_change_nothing(beams: int, seed: int, n: int, T: int) -> None:
    model, ids = gpt(seed=seed, positions="rope"), token_ids(3, T, seed)
    options = {"max_new_tokens": n, "num_beams": beams, "eos_token_id": 2}
    together = model.generate(ids, **options)
    np.testing.assert_array_equal(together, model.generate(ids, use_cache=False, **options))
    for row, alone in zip(together, ids, strict=True):
        one = model.generate(alone[None], **options)[0]
        np.testing.assert_array_equal(row[: len(one)], one)
        assert (row[len(one) :] == 2).all()


def test_padding_on_the_left_changes_nothing() -> None:
    model, ids = gpt(positions="rope"), token_ids(1, 3)
    padded = np.concatenate([[[7, 7]], ids], axis=1)
    options = {"max_new_tokens": 4, "num_beams": 3}
    plain = model.generate(ids, **options)
    found = model.generate(padded, attention_mask=[[0, 0, 1, 1, 1]], **options)
    np.testing.assert_array_equal(found[:, 5:], plain[:, 3:])


@given(few=st.integers(1, 4), n=st.integers(1, 5), penalty=st.sampled_from([0.0, 1.0, 2.0]), seed=st.integers(0, 200))
def test_one_beam_is_greedy(few: int, n: int, penalty: float, seed: int) -> None:
    """By the search itself, which `generate` does not ask for with one beam."""
    model, search = Grammar(few, seed), Beams(1, 1, n, penalty, EOS)
    ids = np.array([[3]])
    for _ in range(n):
        _, new, done = search.step(model(ids).logits.data[:, -1], ids[:, 1:])
        ids = np.append(ids, new[:, None], axis=1)
        if done.all():
            break
    greedy = generate(model, [[3]], max_new_tokens=n, eos_token_id=EOS)
    np.testing.assert_array_equal(search.best(ids[:, 1:]), greedy[:, 1:])


@given(seed=st.integers(0, 200))
def test_the_found_is_at_least_as_likely_as_the_greedy(seed: int) -> None:
    """With as many tokens, where two beams are enough to hold the greedy one to the end."""
    model = Grammar(2, seed)
    greedy = generate(model, [[3]], max_new_tokens=2)[0, 1:]
    found = generate(model, [[3]], max_new_tokens=2, num_beams=2)[0, 1:]
    assert model.log_p([3], tuple(found)) >= model.log_p([3], tuple(greedy)) - 1e-12


def test_a_longer_answer_wins_by_the_penalty() -> None:
    """p("1") = 0.4 and p("0 1") = 0.35: by their sums the first is better, by token the second."""
    end = {1: 0.4, 2: 0.35 / 0.6}
    model = Given(lambda length: [np.log([1 - end[length], end[length]])])
    options = {"max_new_tokens": 2, "num_beams": 2, "eos_token_id": EOS}
    assert generate(model, [[0]], length_penalty=0.0, **options).tolist() == [[0, 1]]
    assert generate(model, [[0]], length_penalty=2.0, **options).tolist() == [[0, 0, 1]]


def test_a_streamer_gets_what_is_returned() -> None:
    listener = Listener()
    found = gpt().generate(token_ids(2, 3), max_new_tokens=4, num_beams=3, streamer=listener)
    assert listener.ended and np.array(listener.received).T.tolist() == found[:, 3:].tolist()


def test_no_rows_and_no_tokens() -> None:
    assert gpt().generate(np.zeros((0, 2), int), max_new_tokens=3, num_beams=2).shape[0] == 0
    assert gpt().generate(token_ids(2, 3), max_new_tokens=0, num_beams=2).tolist() == token_ids(2, 3).tolist()


@pytest.mark.parametrize("settings, message", [
    ({"num_beams": 0}, r"num_beams is 0, expected an integer of at least 1\. 1 is no beam search"),
    ({"num_beams": 2.0}, "num_beams is 2.0, expected an integer"),
    ({"num_beams": V + 1}, f"num_beams is {V + 1}, expected at most the {V} tokens of the vocabulary. Pass fewer"),
    ({"num_beams": 2, "do_sample": True}, "num_beams is 2 with do_sample=True, expected one of them"),
    ({"num_beams": 2, "length_penalty": np.nan}, "length_penalty is nan, expected a finite number"),
    ({"length_penalty": 0.5}, r"length_penalty is 0\.5 but nothing is searched\. Pass num_beams=4"),
])  # fmt: skip
def test_refused(settings: dict[str, Any], message: str) -> None:
    model = gpt()
    with pytest.raises(ConfigError, match=f"^generate: {message}"):
        model.generate(token_ids(1, 2), max_new_tokens=BLOCK - 2, **settings)


def test_nan_is_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"^generate: the logits are NaN"):
        generate(Given(lambda length: [[0.0, np.nan]]), [[0]], max_new_tokens=2, num_beams=2)
