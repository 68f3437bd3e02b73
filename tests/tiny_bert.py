"""Tiny BERTs and what they are called with."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer.models.bert import EncoderModel

V, LONGEST = 13, 9
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": LONGEST,
    "type_vocab_size": 2,
    "num_labels": 3,
}
HEADS = {
    "masked": mt.BERTForMaskedLM,
    "classes": mt.BERTForSequenceClassification,
    "answers": mt.BERTForQuestionAnswering,
}
KINDS: dict[str, type[EncoderModel]] = {"plain": mt.BERT, **HEADS}


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of BERTConfig beside those of SHAPE, in any combination."""
    return {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": draw(st.sampled_from([1, 2, 4])),
        "intermediate_size": draw(st.sampled_from([1, 5, 12])),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu"])),
        "type_vocab_size": draw(st.integers(1, 3)),
        "num_labels": draw(st.integers(2, 4)),
        "layer_norm_eps": draw(st.sampled_from([1e-12, 1e-3])),
        "pad_token_id": draw(st.integers(0, V - 1)),
    }


def bert(kind: str = "plain", dtype: str = "float64", seed: int = 0, **changes: Any) -> Any:
    """A model in eval mode whose weights are large enough for every part to matter, norms and biases too."""
    model = KINDS[kind](mt.BERTConfig(**{**SHAPE, **changes}))
    model.to(dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = rng.normal(0 if parameter.ndim == 2 else 0.7, 0.4, parameter.shape)
    model.eval()
    return model


def tokens(B: int, T: int, seed: int = 0, types: int = 2) -> dict[str, np.ndarray]:
    """Ids and token types (B, T)."""
    rng = np.random.default_rng(seed)
    return {"input_ids": rng.integers(0, V, (B, T)), "token_type_ids": rng.integers(0, types, (B, T))}


def targets(kind: str, B: int, T: int, seed: int = 0, classes: int = 3) -> dict[str, np.ndarray]:
    """Targets of a head, the last of each to be ignored."""
    rng = np.random.default_rng(seed)
    if kind == "masked":
        made = {"labels": rng.integers(0, V, (B, T))}
    elif kind == "classes":
        made = {"labels": rng.integers(0, classes, B)}
    else:
        made = {name: rng.integers(0, T, B) for name in ("start_positions", "end_positions")}
    for array in made.values():
        array.reshape(-1)[1:][-1:] = -100
    return made


def outputs(out: mt.ModelOutput) -> list[np.ndarray]:
    """What there is, but for the loss: logits or pooled rows, and all states."""
    own = [t for t in (out.logits, out.pooler_output) if t is not None]
    return [t.numpy() for t in (*own, *out.hidden_states)]
