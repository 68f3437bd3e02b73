from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.data import ByteTokenizer, CharTokenizer, load_tokenizer
from minitransformer.data.tokenizers import FILE_VERSION, Tokenizer, tokenizer_class
from minitransformer.errors import CheckpointError, ConfigError, DataError, DTypeError, RangeError, ShapeError

CHINESE = "道可道,非常道。名可名,非常名。\n😀"
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
tokenizers = st.one_of(st.just(ByteTokenizer()), texts.filter(bool).map(CharTokenizer))


def cut(items: list[int], cuts: list[int]) -> list[list[int]]:
    edges = [0, *sorted(c % (len(items) + 1) for c in cuts), len(items)]
    return [items[a:b] for a, b in pairwise(edges)]


# laws


@given(texts)
def test_decode_undoes_encode(text: str) -> None:
    for tokenizer in (ByteTokenizer(), CharTokenizer(text + "x")):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert ids.ndim == 1
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.decode_bytes(ids) == text.encode("utf-8")


@given(texts)
def test_byte_ids_are_the_bytes_of_utf8(text: str) -> None:
    assert ByteTokenizer().encode(text).tolist() == list(text.encode("utf-8"))


@given(texts.filter(bool))
def test_char_ids_are_ranks_by_code_point(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    vocabulary = sorted(set(text))
    assert tokenizer.characters == "".join(vocabulary)
    assert tokenizer.vocab_size == len(vocabulary)
    assert tokenizer.encode(text).tolist() == [vocabulary.index(character) for character in text]


@given(st.lists(texts).filter(any))
def test_training_on_pieces_is_training_on_the_whole(pieces: list[str]) -> None:
    whole = CharTokenizer.train("".join(pieces))
    assert CharTokenizer.train(piece for piece in pieces).to_json() == whole.to_json()


@given(st.binary(max_size=40), st.lists(st.integers(min_value=0), max_size=6))
def test_streamed_bytes_in_any_portions_are_the_whole(data: bytes, cuts: list[int]) -> None:
    tokenizer = ByteTokenizer()
    decoder = tokenizer.stream_decoder()
    for _ in range(2):  # finish() leaves a fresh decoder
        streamed = "".join(decoder.feed(part) for part in cut(list(data), cuts)) + decoder.finish()
        assert streamed == tokenizer.decode(list(data)) == data.decode("utf-8", "replace")


@given(tokenizers, st.data())
def test_streamed_ids_in_any_portions_are_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    decoder = tokenizer.stream_decoder()
    parts = cut(ids, data.draw(st.lists(st.integers(min_value=0), max_size=6)))
    assert "".join(decoder.feed(part) for part in parts) + decoder.finish() == tokenizer.decode(ids)


@given(tokenizers)
def test_json_round_trip(tokenizer: Tokenizer) -> None:
    data = json.loads(json.dumps(tokenizer.to_json()))
    again = Tokenizer.from_json(data)
    assert type(again) is type(tokenizer)
    assert again.to_json() == tokenizer.to_json()
    assert again.vocab_size == tokenizer.vocab_size


# streaming


def test_a_stream_never_prints_part_of_a_character() -> None:
    tokenizer = ByteTokenizer()
    decoder = tokenizer.stream_decoder()
    portions = [decoder.feed([byte]) for byte in tokenizer.encode(CHINESE)]
    assert [portion for portion in portions if portion] == list(CHINESE)
    assert decoder.finish() == ""


def test_a_stream_that_stops_within_a_character_says_so_at_the_end() -> None:
    decoder = ByteTokenizer().stream_decoder()
    assert decoder.feed(list("道".encode()[:2])) == ""
    assert decoder.finish() == "\ufffd"


def test_a_refused_portion_leaves_the_stream_as_it_was() -> None:
    decoder = ByteTokenizer().stream_decoder()
    first, *rest = "é".encode()
    decoder.feed([first])
    with pytest.raises(RangeError):
        decoder.feed([256])
    assert decoder.feed(rest) == "é"


# what is refused


@pytest.mark.parametrize(
    ("character", "shown"), [("z", "'z' (U+007A)"), ("A", "'A' (U+0041)"), ("😀", "'😀' (U+1F600)")]
)
def test_an_unknown_character_is_named_with_its_place(character: str, shown: str) -> None:
    with pytest.raises(DataError) as caught:
        CharTokenizer("hello").encode(f"hell{character}{character}")
    assert str(caught.value) == (
        f"encode: character {shown} at position 4 is not among the 4 characters this tokenizer was trained "
        "on. Use the byte tokenizer, which takes any text, or train on text with this character."
    )


@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(bad: int) -> None:
    with pytest.raises(RangeError) as caught:
        CharTokenizer("hello").decode([0, 3, bad])
    assert str(caught.value) == (
        f"decode: id {bad} at position 2 is outside the vocabulary of 4 (ids 0 to 3). Use the tokenizer "
        "the ids were made with."
    )


def test_ids_must_be_a_row_of_integers() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([]) == ""
    with pytest.raises(ShapeError, match=r"got shape \(1, 2\)\. Decode row by row"):
        tokenizer.decode([[65, 66]])
    with pytest.raises(DTypeError, match="got float64"):
        tokenizer.decode([65.0])
    with pytest.raises(DTypeError, match="got bool"):
        tokenizer.decode([True])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("ab")])
def test_lone_surrogates_and_bytes_are_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"encode: U\+DCE9 at position 1 is a lone surrogate"):
        tokenizer.encode("a\udce9")
    with pytest.raises(DTypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


@pytest.mark.parametrize("nothing", ["", [], ["", ""]])
def test_a_char_tokenizer_needs_text(nothing: str | list[str]) -> None:
    with pytest.raises(DataError, match="no text to take characters from"):
        CharTokenizer.train(nothing)


def test_an_unknown_kind_gets_the_nearest() -> None:
    assert tokenizer_class("byte") is ByteTokenizer
    with pytest.raises(ConfigError, match=r"no tokenizer of kind 'bytes'\. Did you mean 'byte'\?"):
        tokenizer_class("bytes")


# files


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer(CHINESE + '\ufeff\u2028\x00"\\')])
@pytest.mark.parametrize("target", ["run/deep", "run.v2", "run/tokenizer.json", "other.json"])
def test_save_and_load(tokenizer: Tokenizer, target: str, tmp_path: Path) -> None:
    path = tmp_path / target
    tokenizer.save(path)
    tokenizer.save(str(path))  # over the old one
    again = load_tokenizer(path)
    assert repr(again) == repr(tokenizer)
    assert again.to_json() == tokenizer.to_json() == type(tokenizer).load(path).to_json()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files == [path if path.suffix == ".json" else path / "tokenizer.json"]
    assert files[0].read_bytes().isascii()


def test_a_folder_may_end_in_json(tmp_path: Path) -> None:
    folder = tmp_path / "run.json"
    folder.mkdir()
    ByteTokenizer().save(folder)
    assert (folder / "tokenizer.json").is_file()
    assert isinstance(load_tokenizer(folder), ByteTokenizer)


def test_load_of_another_class_is_refused(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    with pytest.raises(DataError, match=r"holds a ByteTokenizer, not a CharTokenizer\. Use load_tokenizer"):
        CharTokenizer.load(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_failed_save_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = CharTokenizer("old")
    old.save(tmp_path)

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync", fail) if step == "fsync" else (Path, "replace", fail)))
        with pytest.raises(CheckpointError, match=r"tokenizer\.json could not be written \(No space left"):
            CharTokenizer("new").save(tmp_path)
    assert load_tokenizer(tmp_path).to_json() == old.to_json()
    assert list(tmp_path.iterdir()) == [tmp_path / "tokenizer.json"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json could not be written"):
        ByteTokenizer().save(tmp_path / "file" / "run")


HEAD = f'"version": {FILE_VERSION}, "type": "char"'


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is damaged or was not written by minitransformer"),
        (b'{"version": 1, "type": "cha', "is damaged or was not written by minitransformer"),
        (b"\xff\xfe\x00", "is damaged or was not written by minitransformer"),
        (b"[" * 100_000, "is damaged or was not written by minitransformer"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"version": 1, "type": "byte"}', "is damaged: expected SHA-256"),
        (b"{}", "field 'type' must be one of byte, char, got None"),
        (b'{"version": "1.0", "model": {"type": "BPE"}}', "no tokenizer of this package"),
        (b'{"type": "char", "characters": "ab"}', "field 'version' must be a whole number from 1, got None"),
        (b'{"version": true, "type": "byte"}', "must be a whole number from 1, got True"),
        (b'{"version": 0, "type": "byte"}', "must be a whole number from 1, got 0"),
        (b'{"version": 99, "type": "later"}', "has version 99, this minitransformer reads up to 1. Upgrade"),
        (b'{"version": 1, "type": "chars"}', "unknown tokenizer 'chars'. Did you mean 'char'?"),
        (f"{{{HEAD}}}".encode(), "field 'characters' must be a string of at least one character"),
        (f'{{{HEAD}, "characters": ""}}'.encode(), "must be a string of at least one character"),
        (f'{{{HEAD}, "characters": ["a"]}}'.encode(), "must be a string of at least one character"),
        (f'{{{HEAD}, "characters": "ba"}}'.encode(), "must rise by code point without repeats"),
        (f'{{{HEAD}, "characters": "aab"}}'.encode(), "must rise by code point without repeats"),
        (f'{{{HEAD}, "characters": "a\\ud800"}}'.encode(), "holds a lone surrogate"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(content: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert str(file) in str(caught.value)
    assert problem in str(caught.value)


def test_a_tokenizer_edited_by_hand_is_told_how_to_save(tmp_path: Path) -> None:
    CharTokenizer("abc").save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("abc", "abd"))
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"tokenizer: {file} is damaged: expected SHA-256 ")
    assert caught.value.fix == (
        "Restore it from a copy; what you changed on purpose: Tokenizer.from_json(...).save(path)"
    )
    Tokenizer.from_json(json.loads(file.read_text())).save(tmp_path)
    assert load_tokenizer(tmp_path).decode([2]) == "d"


@given(st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda x: st.lists(x), max_leaves=5))
def test_any_value_in_any_field_loads_or_is_refused(value: object) -> None:
    for field in ("version", "type", "characters"):
        data = {**CharTokenizer("ab").to_json(), field: value}
        try:
            assert Tokenizer.from_json(data).to_json() == data
        except DataError as error:
            assert error.op == "tokenizer"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^tokenizer: the tokenizer is missing, expected at .*nowhere\. Check that path\."
    ):
        load_tokenizer(tmp_path / "nowhere")
