"""Batches: windows of a long row of tokens, drawn at random to train, in order to evaluate."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import numpy as np
import numpy.typing as npt

from minitransformer.autograd import as_array
from minitransformer.checks import allocate, is_integer, is_number, path_of, shown
from minitransformer.data.corpora import Corpus
from minitransformer.data.tokenizers import Tokenizer, tokenizer_class
from minitransformer.errors import ConfigError, DataError, DTypeError, ShapeError

RAM_BYTES = 16 << 20
IGNORED = -100
Batch = dict[str, npt.NDArray[np.int64]]


class TokenDataset:
    """A row of tokens that gives windows of `block_size` inputs with their targets, the next tokens.

    `tokens` (N,) is any integer array or memmap, N > block_size; it is kept, not copied. `source` says in
    JSON where they come from: a run keeps it, and refuses to resume on other data. Raises `ShapeError`,
    `DTypeError` or `DataError` (too short) for tokens that cannot serve.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        block_size: int,
        *,
        tokenizer: Tokenizer | None = None,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.block_size = whole("TokenDataset", "block_size", block_size, 1)
        array = as_array("TokenDataset", tokens)
        if not isinstance(array, np.ndarray):
            raise DTypeError("TokenDataset", f"tokens are {shown(array)}, expected an array", "Encode the text first.")
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise DTypeError("TokenDataset", f"tokenizer is {shown(tokenizer)}, expected a Tokenizer", "Leave it out.")
        if source is not None and not isinstance(source, dict):
            raise DTypeError("TokenDataset", f"source is {shown(source)}, expected a dict", "Leave it out.")
        self.tokens = tokens if isinstance(tokens, np.memmap) else array  # to be seen that it is one
        self.tokenizer = tokenizer
        self.source = source
        if self.tokens.ndim != 1:
            raise ShapeError(
                "TokenDataset",
                f"tokens must have one dimension, got shape {self.tokens.shape}",
                "Join the documents into one row.",
            )
        if self.tokens.size and self.tokens.dtype.kind not in "iu":
            raise DTypeError(
                "TokenDataset", f"tokens must be integers, got {self.tokens.dtype}", "Encode the text first."
            )
        if self.tokens.size <= self.block_size:
            raise DataError(
                "TokenDataset",
                f"corpus too short: {self.tokens.size} tokens, and block_size {self.block_size} needs at "
                f"least {self.block_size + 1}",
                "Use a smaller --block-size or more text.",
            )

    def batch(self, seed: int, step: int, batch_size: int) -> Batch:
        """`batch_size` windows drawn uniformly: `input_ids` and `targets` (B, T), int64.

        A pure function of its arguments: a resumed run asks for its next step and replays nothing.
        """
        random = step_generator(seed, step)
        B = whole("batch", "batch_size", batch_size, 1)

        def draw() -> Batch:
            return self._windows(random.integers(self.tokens.size - self.block_size, size=B))

        return allocate("batch", "a batch", (4, B, self.block_size), np.int64, draw)  # positions, ids, targets

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        """All windows in order, for evaluation; the last batch may have fewer rows.

        Every token but the first is a target exactly once. Where the windows do not come out even, the
        last one begins earlier, so that all its inputs are real tokens, and the targets that the
        window before has had are -100 (ignored by the loss).
        """
        B, T = whole("sequential", "batch_size", batch_size, 1), self.block_size
        n_targets = self.tokens.size - 1
        for first in range(0, n_targets, B * T):
            starts = np.arange(first, min(first + B * T, n_targets), T, dtype=np.int64)  # (B,) or fewer
            repeated = max(int(starts[-1]) + T - n_targets, 0)
            starts[-1] -= repeated
            batch = self._windows(starts)
            batch["targets"][-1, :repeated] = IGNORED
            yield batch

    def _windows(self, starts: npt.NDArray[np.int64]) -> Batch:
        inputs = starts[:, None] + np.arange(self.block_size)  # (B, T) positions
        return {
            "input_ids": np.asarray(self.tokens[inputs], dtype=np.int64),
            "targets": np.asarray(self.tokens[inputs + 1], dtype=np.int64),
        }


def prepare(
    corpus: Corpus,
    tokenizer: str | Tokenizer,
    block_size: int,
    *,
    validation_fraction: float = 0.1,
    cache_folder: str | os.PathLike[str] | None = None,
) -> tuple[TokenDataset, TokenDataset]:
    """Tokens of a corpus as (training, validation): its last `validation_fraction` validates.

    `tokenizer` is a kind ("char", "byte"), trained here on the whole corpus so that validation holds no
    unknown character, or a tokenizer. The corpus is read piece by piece. Tokens have the smallest
    unsigned dtype that holds the vocabulary; above `RAM_BYTES` they lie in a memory-mapped file without
    a name in `cache_folder` (default: the system's temporary folder), gone when they are. Raises
    `ConfigError` for settings, `DataError` for a corpus that cannot be read, encoded or split.
    """
    if not isinstance(corpus, Corpus):
        raise DTypeError("prepare", f"expected a Corpus, got {type(corpus).__name__}", "Use corpus(...).")
    block_size = whole("prepare", "block_size", block_size, 1)
    if not is_number(validation_fraction, 0, 1) or validation_fraction == 0:
        raise ConfigError(
            "prepare",
            f"validation_fraction must lie between 0 and 1 (both excluded), got {shown(validation_fraction)}",
            "0.1 keeps a tenth of the text for validation.",
        )
    if not isinstance(tokenizer, (str, Tokenizer)):
        raise DTypeError("prepare", f"tokenizer is {shown(tokenizer)}, expected a kind or a Tokenizer", 'Use "char".')
    if cache_folder is not None:
        cache_folder = path_of("prepare", "cache_folder", cache_folder)
    if isinstance(tokenizer, str):
        tokenizer = tokenizer_class(tokenizer).train(corpus.chunks())
    tokens, checksum = _encode(corpus, tokenizer, cache_folder)
    n_validation = int(tokens.size * validation_fraction)
    n_train = tokens.size - n_validation
    if min(n_train, n_validation) <= block_size:
        raise DataError(
            f"corpus {corpus.name!r}",
            f"too short: {n_train} tokens for training and {n_validation} for validation, and block_size "
            f"{block_size} needs at least {block_size + 1} in each",
            "Use a smaller --block-size or more text.",
        )
    source = {
        "corpus": corpus.name,
        "tokenizer": tokenizer.kind,
        "block_size": block_size,
        "validation_fraction": float(validation_fraction),
        "tokens": tokens.size,
        "crc32": checksum,
    }
    train, validation = tokens[:n_train], tokens[n_train:]
    return (
        TokenDataset(train, block_size, tokenizer=tokenizer, source=source),
        TokenDataset(validation, block_size, tokenizer=tokenizer, source=source),
    )


def _encode(
    corpus: Corpus, tokenizer: Tokenizer, cache_folder: str | os.PathLike[str] | None
) -> tuple[npt.NDArray[Any], int]:
    """The tokens of the whole corpus, and the CRC-32 of their bytes."""
    folder = None if cache_folder is None else os.fspath(cache_folder)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    characters = checksum = 0
    with tempfile.SpooledTemporaryFile(max_size=RAM_BYTES, dir=folder) as file:
        for text in corpus.chunks():
            try:
                ids = tokenizer.encode(text)
            except DataError as error:
                problem = f"{error.problem} (of the piece that begins at character {characters})"
                raise DataError(f"corpus {corpus.name!r}", problem, error.fix) from error
            characters += len(text)
            data = ids.astype(dtype).tobytes()
            checksum = crc32(data, checksum)
            with _writing_to(folder):
                file.write(data)  # moves to disk above RAM_BYTES
        if file.tell() <= RAM_BYTES:
            file.seek(0)
            return np.frombuffer(file.read(), dtype), checksum
        with _writing_to(folder):
            file.flush()
            return np.memmap(file, dtype, mode="r"), checksum  # the mapping outlives the open file


@contextmanager
def _writing_to(folder: str | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            "prepare",
            f"cannot keep tokens in {'the temporary folder' if folder is None else repr(folder)}: {error.strerror}",
            "Give cache_folder, an existing folder on a disk with room.",
        ) from error


def step_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one step; each `stream` has its own."""
    key = [whole("batch", "seed", seed, 0), whole("batch", "step", step, 0)]
    philox = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=[0, 0, 0, stream])
    return np.random.Generator(philox)


def whole(op: str, name: str, value: int, least: int) -> int:
    """`value` as an int from `least` to 2**64 - 1, which a half of Philox's key can hold."""
    if not is_integer(value) or not least <= value < 2**64:
        raise ConfigError(
            op, f"{name} must be a whole number from {least} to 2**64 - 1, got {shown(value)}", f"Change {name}."
        )
    return int(value)
