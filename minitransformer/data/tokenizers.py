"""Tokenizers: text to token ids and back, and the `tokenizer.json` that keeps them with a model.

A tokenizer is a subclass of `Tokenizer` that says how text becomes ids, which UTF-8 bytes ids stand
for, and which fields describe it in JSON. Decoding, streaming, files and error messages are common.
"""

from __future__ import annotations

import codecs
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from minitransformer.autograd import as_host
from minitransformer.checks import path_of, shown
from minitransformer.errors import CheckpointError, ConfigError, DataError, DTypeError, RangeError, ShapeError, nearest
from minitransformer.files import (
    make_folders,
    parse_json,
    read_bytes,
    refusals_of_the_system,
    sealed,
    unseal,
    write_bytes,
)

FILE_NAME = "tokenizer.json"
FILE_VERSION = 1
KINDS: dict[str, type[Tokenizer]] = {}
T = TypeVar("T", bound="Tokenizer")


def tokenizer_class(kind: str) -> type[Tokenizer]:
    """The class for a kind such as "char" or "byte"; `ConfigError` with the nearest name otherwise."""
    if kind not in KINDS:
        raise ConfigError("tokenizer", f"there is no tokenizer of kind {shown(kind)}", nearest(kind, KINDS))
    return KINDS[kind]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer kept in `path`, a `tokenizer.json` or its folder; its `type` field picks the class.

    Raises `DataError` for a file that is missing, unreadable, corrupt, foreign or of a newer version.
    """
    return Tokenizer.load(path)


class StreamDecoder:
    """Decodes ids that arrive in portions and holds back a character until its last byte is there.

    The portions joined, with `finish()`, are exactly `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: npt.ArrayLike) -> str:
        """Text that `ids` (n,) complete; "" while a character is still open."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left: U+FFFD for a character cut off, else "". The decoder can then be used anew."""
        return self._utf8.decode(b"", final=True)


class Tokenizer(ABC):
    """Base of all tokenizers; a subclass names its kind: `class CharTokenizer(Tokenizer, kind="char")`."""

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        KINDS[kind] = cls

    @classmethod
    @abstractmethod
    def train(cls, text: str | Iterable[str]) -> Tokenizer:
        """A tokenizer fitted to `text`; pieces are read once, one at a time."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids: `encode` gives, and `decode` takes, 0 to `vocab_size - 1`."""

    @abstractmethod
    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Ids (n,) of `text`. Raises `DataError` for text that has none."""

    @abstractmethod
    def _bytes(self, ids: npt.NDArray[np.int64]) -> bytes:
        """UTF-8 bytes of `ids`, which are known to be in range."""

    @abstractmethod
    def _fields(self) -> dict[str, Any]:
        """What `to_json` adds to version and type."""

    @classmethod
    @abstractmethod
    def _from_fields(cls, data: Mapping[str, Any], source: str) -> Tokenizer:
        """The inverse of `_fields`; `DataError` in the name of `source` for a field that is wrong."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"

    def decode(self, ids: npt.ArrayLike) -> str:
        """Text of integer `ids` (n,); bytes that are not UTF-8 become U+FFFD.

        Raises `RangeError` for an id that is not in the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: npt.ArrayLike) -> bytes:
        """The bytes that integer `ids` (n,) stand for: text in UTF-8, perhaps cut within a character."""
        array = as_host("decode", ids)
        if array.ndim != 1:
            raise ShapeError("decode", f"ids must have one dimension, got shape {array.shape}", "Decode row by row.")
        if array.size and array.dtype.kind not in "iu":
            raise DTypeError("decode", f"ids must be integers, got {array.dtype}", "Pass token ids.")
        outside = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if outside.size:
            raise RangeError(
                "decode",
                f"id {array[outside[0]]} at position {outside[0]} is outside the vocabulary of "
                f"{self.vocab_size} (ids 0 to {self.vocab_size - 1})",
                "Use the tokenizer the ids were made with.",
            )
        return self._bytes(array.astype(np.int64))

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that arrive in portions, as in streamed generation."""
        return StreamDecoder(self)

    def to_json(self) -> dict[str, Any]:
        """Everything about the tokenizer as plain JSON values; `from_json` takes them back."""
        return {"version": FILE_VERSION, "type": self.kind, **self._fields()}

    @classmethod
    def from_json(cls: type[T], data: object, *, source: str = "tokenizer") -> T:
        """The tokenizer that `to_json` described; on `Tokenizer` itself, of any kind.

        Raises `DataError`, in the name of `source`, for anything else.
        """

        def refuse(problem: str, fix: str = "Restore it, or train the tokenizer again.") -> DataError:
            return DataError(source, problem, fix)

        if not isinstance(data, dict):
            raise refuse(f"expected a JSON object, got {type(data).__name__}")
        version, kind = data.get("version"), data.get("type")
        if not isinstance(kind, str):
            known = ", ".join(sorted(KINDS))
            raise refuse(f"no tokenizer of this package: field 'type' must be one of {known}, got {kind!r}")
        if type(version) is not int or version < 1:
            raise refuse(f"field 'version' must be a whole number from 1, got {version!r}")
        if version > FILE_VERSION:
            raise refuse(
                f"has version {version}, this minitransformer reads up to {FILE_VERSION}",
                "Upgrade minitransformer.",
            )
        if kind not in KINDS:
            raise refuse(f"field 'type' names an unknown tokenizer {kind!r}", nearest(kind, KINDS))
        tokenizer = KINDS[kind]._from_fields(data, source)
        if not isinstance(tokenizer, cls):
            raise refuse(f"holds a {type(tokenizer).__name__}, not a {cls.__name__}", "Use load_tokenizer.")
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `path` if it ends in .json, else `tokenizer.json` in folder `path`, made if missing.

        It holds `to_json()` and a checksum. Readers see the old file or the new one, never a part.
        `CheckpointError` if it cannot be written.
        """
        file = Path(path_of("tokenizer", "path", path))
        if file.suffix != ".json" or file.is_dir():
            file /= FILE_NAME
        with refusals_of_the_system(file):
            make_folders(file.parent)
        write_bytes(file, sealed(str(file), self.to_json()))

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """As `load_tokenizer`, but `DataError` for a tokenizer of another class."""
        file = Path(path_of("tokenizer", "path", path))
        if file.is_dir():
            file /= FILE_NAME
        what = "the tokenizer"
        try:
            data = read_bytes(file, what)
            fields = parse_json(data, file, what)
        except CheckpointError as error:
            raise DataError("tokenizer", error.problem, error.fix) from error
        tokenizer = cls.from_json(fields, source=str(file))  # tells other programs' files and newer ones by name
        try:
            unseal(data, file, what)
        except CheckpointError as error:
            fix = "Restore it from a copy; what you changed on purpose: Tokenizer.from_json(...).save(path)"
            raise DataError("tokenizer", error.problem, fix) from error
        return tokenizer


class CharTokenizer(Tokenizer, kind="char"):
    """One id for each distinct character (code point), in code point order.

    `characters` is the vocabulary, in any order and with repeats: `CharTokenizer("hello")` knows "ehlo".
    """

    def __init__(self, characters: str) -> None:
        self._codes = np.unique(_code_points(characters, "CharTokenizer"))
        if not self._codes.size:
            raise DataError("CharTokenizer", "there is no text to take characters from", "Train it on text.")
        # A table from code point to id; -1 is unknown, and so is its last entry, for all beyond.
        self._ids = np.full(int(self._codes[-1]) + 2, -1, dtype=np.int64)
        self._ids[self._codes] = np.arange(len(self._codes))

    @classmethod
    def train(cls, text: str | Iterable[str]) -> CharTokenizer:
        seen = np.zeros(0x110000, dtype=bool)
        if not isinstance(text, Iterable):
            raise DTypeError("CharTokenizer.train", f"text is {shown(text)}, expected strings", "Pass a str or pieces")
        for piece in [text] if isinstance(text, str) else text:
            seen[_code_points(piece, "CharTokenizer.train")] = True
        return cls(_from_code_points(np.flatnonzero(seen)))

    @property
    def vocab_size(self) -> int:
        return len(self._codes)

    @property
    def characters(self) -> str:
        """The vocabulary: the character at index i has id i."""
        return _from_code_points(self._codes)

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        codes = _code_points(text, "encode")  # (n,)
        ids = self._ids[np.minimum(codes, len(self._ids) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if unknown.size:
            position = int(unknown[0])
            raise DataError(
                "encode",
                f"character {text[position]!r} (U+{ord(text[position]):04X}) at position {position} is not "
                f"among the {self.vocab_size} characters this tokenizer was trained on",
                "Use the byte tokenizer, which takes any text, or train on text with this character.",
            )
        return ids

    def _bytes(self, ids: npt.NDArray[np.int64]) -> bytes:
        return _from_code_points(self._codes[ids]).encode("utf-8")

    def _fields(self) -> dict[str, Any]:
        return {"characters": self.characters}

    @classmethod
    def _from_fields(cls, data: Mapping[str, Any], source: str) -> CharTokenizer:
        characters = data.get("characters")
        if not isinstance(characters, str) or not characters:
            problem = "must be a string of at least one character"
        elif any("\ud800" <= character <= "\udfff" for character in characters):
            problem = "holds a lone surrogate, which is no character"
        elif characters != "".join(sorted(set(characters))):
            problem = "must rise by code point without repeats"
        else:
            return cls(characters)
        raise DataError(source, f"field 'characters' {problem}", "Restore it, or train the tokenizer again.")


class ByteTokenizer(Tokenizer, kind="byte"):
    """256 ids, the bytes of UTF-8: takes any text in any language and needs no training."""

    @classmethod
    def train(cls, text: str | Iterable[str]) -> ByteTokenizer:
        """A byte tokenizer; `text` is not read, since there is nothing to learn."""
        return cls()

    @property
    def vocab_size(self) -> int:
        return 256

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        return np.frombuffer(_to_bytes(text, "utf-8", "encode"), dtype=np.uint8).astype(np.int64)

    def _bytes(self, ids: npt.NDArray[np.int64]) -> bytes:
        return ids.astype(np.uint8).tobytes()

    def _fields(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _from_fields(cls, data: Mapping[str, Any], source: str) -> ByteTokenizer:
        return cls()


def _to_bytes(text: str, encoding: str, op: str) -> bytes:
    if not isinstance(text, str):
        raise DTypeError(op, f"text must be a str, got {type(text).__name__}", "Decode bytes first.")
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        # A terminal or file name that is not UTF-8 reaches Python as lone surrogates.
        raise DataError(
            op,
            f"U+{ord(text[error.start]):04X} at position {error.start} is a lone surrogate, no character",
            "Pass text that was decoded from valid UTF-8.",
        ) from error


def _code_points(text: str, op: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(_to_bytes(text, "utf-32-le", op), dtype="<u4")  # (n,)


def _from_code_points(codes: npt.NDArray[Any]) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")
