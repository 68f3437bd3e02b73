"""Counter-based numbers: known answers, addresses, and the process-wide stream."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer import random
from minitransformer.errors import ConfigError
from minitransformer.random import DrawKey, next_key, philox, uniform_words

WORD = st.integers(0, 2**32 - 1)
KEYS = st.builds(DrawKey, st.integers(0, 2**64 - 1), WORD, WORD, st.integers(0, 1000))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: str) -> None:
    """The vectors published with Random123."""
    words = philox(tuple(np.array([c], np.uint64) for c in counter), key)
    assert " ".join(f"{int(word[0]):08x}" for word in words) == expected


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_is_the_published_round_function(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    """Ten rounds in plain Python integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, r = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (r >> 32) ^ b ^ k, r & 0xFFFFFFFF, (p >> 32) ^ d ^ m, p & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    words = philox(tuple(np.array([word], np.uint64) for word in counter), key)
    assert [int(word[0]) for word in words] == [a, b, c, d]


@given(KEYS, st.lists(st.integers(0, 5), max_size=3), st.integers(1, 6), st.integers(0, 6))
def test_a_row_does_not_depend_on_its_shard(key: DrawKey, rest: list[int], rows: int, start: int) -> None:
    whole = uniform_words((start + rows, *rest), key)
    shard = uniform_words((rows, *rest), key._replace(first_row=key.first_row + start))
    np.testing.assert_array_equal(shard, whole[start:])


@given(KEYS, st.integers(0, 9), st.integers(0, 9))
def test_an_element_depends_on_its_address_only(key: DrawKey, width: int, more: int) -> None:
    np.testing.assert_array_equal(uniform_words((2, width), key), uniform_words((2, width + more), key)[:, :width])


@given(KEYS)
def test_an_element_is_the_documented_word(key: DrawKey) -> None:
    words = uniform_words((2, 3, 3), key).reshape(2, 9)
    for b, e in ((0, 0), (1, 5), (1, 8)):
        counter = (e // 4, key.first_row + b, key.site, key.step)
        block = philox(tuple(np.array([c], np.uint64) for c in counter), (key.seed % 2**32, key.seed >> 32))
        assert words[b, e] == block[e % 4][0]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 4), (2, 3, 1)])
def test_words_at_odd_shapes(shape: tuple[int, ...]) -> None:
    words = uniform_words(shape, DrawKey(1, 2, 3, 4))
    assert words.shape == shape and words.dtype == np.uint64


@pytest.mark.parametrize("field", DrawKey._fields)
def test_every_part_of_the_key_matters(field: str) -> None:
    key = DrawKey(1, 2, 3, 400)
    other = key._replace(**{field: getattr(key, field) + 1000})
    assert (uniform_words((4, 8), key) != uniform_words((4, 8), other)).all()


def test_words_are_uniform_and_uncorrelated() -> None:
    """Means of n uniforms within 5 standard deviations of 1/2, per bit and between neighbours."""
    n = 1 << 16
    words = uniform_words((64, n // 64), DrawKey(7, 0, 0, 0)).reshape(-1)
    bits = (words[:, None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / n**0.5
    u = words / 2.0**32 - 0.5
    for lag in (1, 2, 4, n // 64):
        assert abs((u[lag:] * u[:-lag]).mean()) < 5 / 12 / n**0.5


def test_scope_addresses_by_site_step_and_row() -> None:
    with random.scope(seed=3, step=9, first_row=16):
        assert next_key(site=5) == next_key(site=5) == DrawKey(3, 9, 5, 16)
        first, second = next_key(), next_key()
        assert first.site != second.site and min(first.site, second.site) >= 2**31
        with random.scope(seed=4, step=1):
            assert next_key(7) == DrawKey(4, 1, 7, 0)
        assert next_key(5) == DrawKey(3, 9, 5, 16)
    with random.scope(seed=3, step=9, first_row=16):
        assert (next_key(), next_key()) == (first, second)


def test_scope_ends_on_errors_and_holds_in_its_thread_only() -> None:
    keys: list[Any] = []
    with pytest.raises(KeyError), random.scope(seed=3, step=9):
        thread = threading.Thread(target=lambda: keys.append(next_key(5)))
        thread.start()
        thread.join()
        raise KeyError
    assert keys[0].seed == next_key().seed == 0


def test_manual_seed_restarts_both_streams() -> None:
    mt.manual_seed(11)
    first = random.generator().random(3).tolist(), [next_key() for _ in range(3)]
    assert len(set(first[1])) == 3
    mt.manual_seed(11)
    assert (random.generator().random(3).tolist(), [next_key() for _ in range(3)]) == first
    mt.manual_seed(12)
    assert random.generator().random(3).tolist() != first[0] and next_key() not in first[1]


def test_draws_of_many_threads_are_all_different() -> None:
    keys: list[DrawKey] = []
    threads = [threading.Thread(target=lambda: keys.extend(next_key() for _ in range(200))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(keys)) == 1600


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "0", True, None])
def test_seeds_are_checked(seed: Any) -> None:
    with pytest.raises(ConfigError, match=r"manual_seed: seed is .*, expected an integer from 0 to 2\*\*64 - 1"):
        mt.manual_seed(seed)


def test_seeds_of_any_size_and_integer_type() -> None:
    for seed in (0, 2**64 - 1, np.int64(5), np.uint8(3)):
        mt.manual_seed(seed)
        assert next_key().seed == seed


def test_site_ids_are_stable() -> None:
    """Checkpoints rely on them: the CRC-32 of the path."""
    assert random.site_id("123456789") == 0xCBF43926
