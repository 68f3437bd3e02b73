"""Strategies for token ids, ragged and padded batches, and tiny model configs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from minitransformer.checks import check_choice, check_count, check_size
from minitransformer.errors import ConfigError
from minitransformer.models import GPTConfig
from minitransformer.models.gpt_config import ATTENTION, OF_ATTENTION
from minitransformer.testing.arrays import arrays


class PaddedBatch(NamedTuple):
    """Rows of one length, as models take them."""

    input_ids: np.ndarray  # (B, T)
    attention_mask: np.ndarray  # (B, T), 1 = real token, 0 = padding
    side: str  # "left" or "right", where the padding is


def token_batches(
    vocab_size: int = 20, *, max_batch: int = 3, max_len: int = 8, min_len: int = 1
) -> st.SearchStrategy[np.ndarray]:
    """Token ids (B, T) below `vocab_size`."""
    _check("token_batches", vocab_size, max_batch, max_len, min_len)
    shape = st.tuples(st.integers(1, max_batch), st.integers(min_len, max_len))
    return arrays(shape, np.int64, min_value=0, max_value=vocab_size - 1, layouts=False)


def ragged_batches(
    vocab_size: int = 20, *, max_batch: int = 3, max_len: int = 8, min_len: int = 1
) -> st.SearchStrategy[list[np.ndarray]]:
    """Lists of token ids, one array a row, each of its own length."""
    _check("ragged_batches", vocab_size, max_batch, max_len, min_len)
    row = arrays(
        st.tuples(st.integers(min_len, max_len)), np.int64, min_value=0, max_value=vocab_size - 1, layouts=False
    )
    return st.lists(row, min_size=1, max_size=max_batch)


@st.composite
def _padded(draw: st.DrawFn, rows: st.SearchStrategy[list[np.ndarray]], vocab_size: int, side: Any) -> PaddedBatch:
    ragged, where = draw(rows), draw(side)
    longest = max(1, *map(len, ragged)) + draw(st.integers(0, 2))
    # What stands in the padding must not matter: any id, the same everywhere.
    ids = np.full((len(ragged), longest), draw(st.integers(0, vocab_size - 1)))
    real = np.zeros_like(ids)
    for row, tokens in enumerate(ragged):
        place = slice(longest - len(tokens), None) if where == "left" else slice(len(tokens))
        ids[row, place], real[row, place] = tokens, 1
    return PaddedBatch(ids, real, where)


def padded_batches(
    vocab_size: int = 20, *, max_batch: int = 3, max_len: int = 8, min_len: int = 1, side: str | None = None
) -> st.SearchStrategy[PaddedBatch]:
    """`ragged_batches` padded on the left or on the right (`side`, None for either), with their attention mask.

    All rows may be longer than the longest needs; min_len=0 gives rows of nothing but padding.
    """
    check_choice("padded_batches", "side", side, ("left", "right", None))
    rows = ragged_batches(vocab_size, max_batch=max_batch, max_len=max_len, min_len=min_len)
    return _padded(rows, vocab_size, st.sampled_from(["right", "left"]) if side is None else st.just(side))


def _check(op: str, vocab_size: int, max_batch: int, max_len: int, min_len: int) -> None:
    check_size(op, vocab_size=vocab_size, max_batch=max_batch, max_len=max_len)
    if check_count(op, "min_len", min_len) > max_len:
        problem = f"min_len is {min_len}, expected at most max_len, {max_len}"
        raise ConfigError(op, problem, "Lower min_len or raise max_len")


@st.composite
def _configs(draw: st.DrawFn, max_layers: int, max_width: int, fixed: dict[str, Any]) -> GPTConfig:
    def drawn(name: str, strategy: st.SearchStrategy[Any]) -> Any:
        return fixed[name] if name in fixed else draw(strategy)

    positions = drawn("positions", st.sampled_from(["learned", "sinusoidal", "rope", "alibi", None]))
    width = fixed.get("n_embd")
    even = 2 if positions == "rope" else 1
    if width is None:
        n_head = drawn("n_head", st.sampled_from([n for n in (1, 2, 3, 4) if n * even <= max_width]))
        width = n_head * even * draw(st.integers(1, max_width // (n_head * even)))
    else:
        n_head = drawn("n_head", st.sampled_from([n for n in range(1, width + 1) if width % (n * even) == 0]))
    given = [kinds for name, kinds in OF_ATTENTION.items() if fixed.get(name) is not None]
    kinds = [kind for kind in ATTENTION if all(kind in others for others in given)]
    if positions == "alibi" and "attention" not in fixed:
        kinds.remove("linear")
    attention = drawn("attention", st.sampled_from(kinds))
    of_attention = {
        name: draw(st.integers(1, 6))
        for name, kinds in OF_ATTENTION.items()
        if attention in kinds and name not in fixed
    }
    options = {
        "vocab_size": drawn("vocab_size", st.integers(2, 12)),
        "block_size": drawn("block_size", st.integers(1, 8)),
        "n_layer": drawn("n_layer", st.integers(1, max_layers)),
        "n_head": n_head,
        "n_embd": width,
        "n_kv_head": drawn("n_kv_head", st.sampled_from([None, *(k for k in range(1, n_head + 1) if n_head % k == 0)])),
        "n_inner": drawn("n_inner", st.none() | st.integers(1, max_width)),
        "dropout": drawn("dropout", st.sampled_from([0.0, 0.3])),
        "bias": drawn("bias", st.booleans()),
        "positions": positions,
        "norm": drawn("norm", st.sampled_from(["layer", "rms"])),
        "ffn": drawn("ffn", st.sampled_from(["gelu", "relu", "swiglu"])),
        "attention": attention,
        **of_attention,
        "tie_weights": drawn("tie_weights", st.booleans()),
    }
    return GPTConfig(**(options | fixed))


def model_configs(*, max_layers: int = 2, max_width: int = 8, **fixed: Any) -> st.SearchStrategy[GPTConfig]:
    """Configs of tiny GPTs with any combination of options; `fixed` are fields of `GPTConfig` that are given.

    They shrink to one layer, one head, width 1 and learned positions.
    """
    check_size("model_configs", max_layers=max_layers, max_width=max_width)
    return _configs(max_layers, max_width, fixed)
