from __future__ import annotations

import tempfile
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.data import ByteTokenizer, CharTokenizer, TokenDataset, batches, corpus, prepare
from minitransformer.data.corpora import Corpus
from minitransformer.data.tokenizers import Tokenizer
from minitransformer.errors import ConfigError, DataError, DTypeError, ShapeError

counters = st.integers(0, 2**64 - 1)


@st.composite
def datasets(draw: st.DrawFn) -> TokenDataset:
    """Rows of tokens whose every token is its own position."""
    T = draw(st.integers(1, 9))
    N = T + draw(st.integers(1, 60))
    return TokenDataset(np.arange(N, dtype=draw(st.sampled_from(["u1", "<u2", ">i4", "i8"]))), T)


def pieces_of(text: str, size: int) -> Iterable[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


# random batches


@given(datasets(), counters, counters, st.integers(1, 5))
def test_a_batch_holds_windows_and_the_tokens_that_follow(data: TokenDataset, seed: int, step: int, B: int) -> None:
    batch = data.batch(seed, step, B)
    assert sorted(batch) == ["input_ids", "targets"]
    for array in batch.values():
        assert array.shape == (B, data.block_size)
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
    inputs, targets = batch["input_ids"], batch["targets"]
    assert not np.shares_memory(inputs, targets)
    assert np.array_equal(targets, inputs + 1)  # tokens are positions: the next one, and one window
    assert np.array_equal(inputs, inputs[:, :1] + np.arange(data.block_size))
    assert inputs.min() >= 0
    assert targets.max() < len(data.tokens)


@given(datasets(), counters, counters)
def test_a_batch_is_a_pure_function_of_seed_and_step(data: TokenDataset, seed: int, step: int) -> None:
    first = data.batch(seed, step, 4)
    data.batch(seed, step ^ 1, 3)
    again = TokenDataset(data.tokens.copy(), data.block_size).batch(seed, step, 4)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_seeds_and_steps_draw_different_batches() -> None:
    data = TokenDataset(np.arange(10**6), 2)
    keys = [(seed, step) for seed in (0, 1, 2**63) for step in (0, 1, 2**63)]
    drawn = {data.batch(seed, step, 4)["input_ids"].tobytes() for seed, step in keys}
    assert len(drawn) == len(keys)


def test_windows_are_uniform_and_reach_both_ends() -> None:
    data = TokenDataset(np.arange(9), 3)  # starts 0 to 5
    starts = data.batch(0, 0, 6000)["input_ids"][:, 0]
    counts = np.bincount(starts, minlength=6)
    assert len(counts) == 6
    assert np.all(np.abs(counts - 1000) < 150)  # five standard deviations


# sequential batches


@given(datasets(), st.integers(1, 5))
def test_sequential_has_each_target_once_at_its_place(data: TokenDataset, B: int) -> None:
    T, N = data.block_size, len(data.tokens)
    parts = list(data.sequential(B))
    rows = [len(batch["input_ids"]) for batch in parts]
    assert all(count == B for count in rows[:-1])
    assert 0 < rows[-1] <= B
    assert sum(rows) == -(-(N - 1) // T)
    inputs = np.concatenate([batch["input_ids"] for batch in parts])
    targets = np.concatenate([batch["targets"] for batch in parts])
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.shape == targets.shape == (sum(rows), T)
    counted = targets != -100
    assert np.array_equal(targets[counted], np.arange(1, N))
    assert np.array_equal(targets[counted], inputs[counted] + 1)
    assert np.array_equal(inputs, inputs[:, :1] + np.arange(T))  # every input is a real token
    assert counted[:-1].all()


# what is refused


def test_tokens_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"got shape \(2, 8\)\. Join the documents"):
        TokenDataset(np.zeros((2, 8), int), 2)
    with pytest.raises(DTypeError, match="must be integers, got float32"):
        TokenDataset(np.zeros(8, np.float32), 2)
    with pytest.raises(DTypeError, match="must be integers, got bool"):
        TokenDataset(np.zeros(8, bool), 2)
    with pytest.raises(DataError) as caught:
        TokenDataset(np.zeros(8, int), 8)
    assert str(caught.value) == (
        "TokenDataset: corpus too short: 8 tokens, and block_size 8 needs at least 9. Use a smaller "
        "--block-size or more text."
    )
    assert len(next(TokenDataset(np.zeros(9, int), 8).sequential(4))["targets"]) == 1


@pytest.mark.parametrize("bad", [0, -1, 1.5, "4", True, None, 2**64])
def test_sizes_must_be_positive_whole_numbers(bad: Any) -> None:
    data = TokenDataset(np.arange(8), 2)
    with pytest.raises(ConfigError, match=r"block_size must be a whole number from 1 to 2\*\*64 - 1, got"):
        TokenDataset(np.arange(8), bad)
    with pytest.raises(ConfigError, match="block_size must be"):
        prepare(Corpus("mine", lambda: ["text"]), "byte", bad)
    with pytest.raises(ConfigError, match="batch_size must be"):
        data.batch(0, 0, bad)
    with pytest.raises(ConfigError, match="batch_size must be"):
        next(data.sequential(bad))


@pytest.mark.parametrize("bad", [-1, 2**64, 0.0, True])
def test_seed_and_step_must_be_whole_numbers(bad: Any) -> None:
    data = TokenDataset(np.arange(8), 2)
    with pytest.raises(ConfigError, match="batch: seed must be a whole number from 0"):
        data.batch(bad, 0, 1)
    with pytest.raises(ConfigError, match="batch: step must be a whole number from 0"):
        data.batch(0, bad, 1)
    data.batch(np.int64(3), np.uint8(4), np.int32(1))


@pytest.mark.parametrize("bad", [0, 1, -0.1, 1.5, float("nan"), "0.1", None, True])
def test_the_validation_fraction_lies_between_0_and_1(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"validation_fraction must lie between 0 and 1 .*, got"):
        prepare(Corpus("mine", lambda: ["text"]), "byte", 1, validation_fraction=bad)


def test_prepare_refuses_what_is_no_corpus_or_kind() -> None:
    with pytest.raises(DTypeError, match=r"expected a Corpus, got str\. Use corpus\(\.\.\.\)"):
        prepare("python-docs", "char", 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no tokenizer of kind 'chars'\. Did you mean 'char'\?"):
        prepare(Corpus("mine", lambda: ["text"]), "chars", 2)


def test_a_corpus_too_short_to_split_names_both_parts() -> None:
    with pytest.raises(DataError) as caught:
        prepare(Corpus("mine", lambda: ["x" * 100]), "char", 10)
    assert str(caught.value) == (
        "corpus 'mine': too short: 90 tokens for training and 10 for validation, and block_size 10 needs at "
        "least 11 in each. Use a smaller --block-size or more text."
    )
    prepare(Corpus("mine", lambda: ["x" * 100]), "char", 9)


def test_a_character_unknown_to_a_given_tokenizer_is_found_in_the_corpus() -> None:
    with pytest.raises(DataError, match=r"corpus 'mine': character 'c' \(U\+0063\) at position 1 .* 4\)"):
        prepare(Corpus("mine", lambda: ["abab", "bcb"]), CharTokenizer("ab"), 2)


# prepare


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_prepare_splits_the_whole_corpus_in_order(kind: str) -> None:
    text = "道可道,非常道。" * 20 + "the end"
    train, validation = prepare(Corpus("mine", lambda: pieces_of(text, 7)), kind, 4, validation_fraction=0.25)
    tokens = np.concatenate([train.tokens, validation.tokens])
    assert train.tokenizer is validation.tokenizer
    assert isinstance(train.tokenizer, Tokenizer)
    assert train.tokenizer.kind == kind
    assert train.tokenizer.decode(tokens) == text
    assert len(validation.tokens) == len(tokens) // 4
    assert train.block_size == validation.block_size == 4


def test_prepare_keeps_a_given_tokenizer() -> None:
    tokenizer = CharTokenizer("abcdef")
    train, _ = prepare(Corpus("mine", lambda: ["abcabc" * 10]), tokenizer, 2)
    assert train.tokenizer is tokenizer
    assert train.tokens[:3].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("characters", "dtype"), [(256, "u1"), (257, "u2"), (65537, "u4")])
def test_tokens_take_the_smallest_dtype(characters: int, dtype: str) -> None:
    text = "".join(map(chr, range(0x10000, 0x10000 + characters)))
    train, validation = prepare(Corpus("mine", lambda: [text]), "char", 4)
    assert train.tokens.dtype == np.dtype(dtype)
    assert validation.tokens[-1] == characters - 1


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_the_memory_mapped_path_equals_the_one_in_ram(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    book = Corpus("mine", lambda: pieces_of(text, 100))
    in_ram = prepare(book, kind, 5)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not to be used"))
    monkeypatch.setattr(batches, "RAM_BYTES", 1000)
    mapped = prepare(book, kind, 5, cache_folder=tmp_path)
    for a, b in zip(in_ram, mapped, strict=True):
        assert not isinstance(a.tokens, np.memmap)
        assert isinstance(b.tokens, np.memmap)
        assert not b.tokens.flags.writeable
        assert b.tokens.dtype == a.tokens.dtype
        assert np.array_equal(a.tokens, b.tokens)
        for name in ("input_ids", "targets"):
            assert np.array_equal(a.batch(1, 2, 8)[name], b.batch(1, 2, 8)[name])
            assert type(b.batch(1, 2, 8)[name]) is np.ndarray
        for x, y in zip(a.sequential(7), b.sequential(7), strict=True):
            assert np.array_equal(x["targets"], y["targets"])
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing is left behind


def test_tokens_of_exactly_the_limit_stay_in_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "RAM_BYTES", 1000)
    for extra, mapped in ((0, False), (1, True)):
        book = Corpus("mine", lambda extra=extra: ["x" * 999, "x" + "x" * extra])  # type: ignore[misc]
        train, validation = prepare(book, "byte", 5)
        assert isinstance(train.tokens, np.memmap) is mapped
        assert len(train.tokens) + len(validation.tokens) == 1000 + extra


def test_a_cache_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "RAM_BYTES", 10)
    folder = tmp_path / "nowhere"
    with pytest.raises(DataError) as caught:
        prepare(Corpus("mine", lambda: ["x" * 100]), "byte", 2, cache_folder=folder)
    assert str(caught.value) == (
        f"prepare: cannot keep tokens in {str(folder)!r}: No such file or directory. Give cache_folder, an "
        "existing folder on a disk with room."
    )


class NeverWhole(Corpus):
    def text(self) -> str:
        raise AssertionError("the corpus was read whole")


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_large_corpus_is_never_in_memory(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "RAM_BYTES", 1 << 18)
    piece = "Ein Zwerg, der läuft.\n" * 1000

    def read() -> Iterator[str]:
        return (piece for _ in range(400))

    tracemalloc.start()
    try:
        train, validation = prepare(NeverWhole("large", read), kind, 64, cache_folder=tmp_path)
        train.batch(0, 0, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(train.tokens) + len(validation.tokens) >= 400 * len(piece)
    assert peak < 4e6 < 400 * len(piece)


def test_python_docs_to_batches() -> None:
    train, validation = prepare(corpus("python-docs"), "char", 64)
    tokenizer = train.tokenizer
    assert tokenizer is not None
    assert 80 < tokenizer.vocab_size < 300
    assert len(tokenizer.decode(validation.batch(0, 0, 2)["targets"][0])) == 64


def test_a_dataset_keeps_what_it_is_given() -> None:
    tokens: npt.NDArray[np.int64] = np.arange(10)
    data = TokenDataset(tokens, 3, tokenizer=ByteTokenizer())
    assert data.tokens is tokens
    assert isinstance(data.tokenizer, ByteTokenizer)
