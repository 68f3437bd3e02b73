"""Valid calls of the models."""

from __future__ import annotations

import numpy as np
from material import Lines, call, gpt, ids

import minitransformer as mt


def transformer() -> mt.Transformer:
    mt.manual_seed(0)
    return mt.Transformer(5, 4, 2, 6, 6, 6, 0.0, num_encoder_layers=1, num_decoder_layers=1)


MODELS: Lines = {
    "GPT": lambda: call(mt.GPT, mt.GPTConfig(vocab_size=5, block_size=6, n_layer=1, n_head=2, n_embd=4)),
    "GPT.forward": lambda: call(gpt(), ids(2, 4), attention_mask=np.ones((2, 4), bool), targets=ids(2, 4)),
    "GPT.forward labels": lambda: call(gpt(positions="rope"), ids(2, 4), labels=ids(2, 4), label_smoothing=0.1),
    "GPT.forward cache": lambda: call(gpt(), ids(2, 4), cache=gpt().make_cache(2)),
    "GPT.make_cache": lambda: call(gpt().make_cache, 2, length=4),
    "GPT.num_targets": lambda: call(gpt().num_targets, targets=ids(2, 4)),
    "GPT.generate": lambda: call(gpt().generate, ids(2, 3), max_new_tokens=2, seed=1),
    "GPT.generate sampling": lambda: call(
        gpt(positions="alibi").generate,
        ids(2, 3),
        max_new_tokens=2,
        do_sample=True,
        temperature=0.7,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        eos_token_id=1,
        attention_mask=np.ones((2, 3), int),
        use_cache=False,
        seed=1,
    ),
    "GPTConfig": lambda: call(
        mt.GPTConfig,
        vocab_size=5,
        block_size=6,
        n_layer=1,
        n_head=2,
        n_embd=4,
        n_kv_head=1,
        n_inner=8,
        dropout=0.1,
        bias=True,
        positions="rope",
        norm="rms",
        ffn="swiglu",
        attention="window",
        window=3,
        tie_weights=False,
        n_global=None,
        stride=None,
    ),
    "GPT.generate beams": lambda: call(
        gpt().generate, ids(2, 3), max_new_tokens=2, num_beams=2, length_penalty=0.5, eos_token_id=1
    ),
    "Transformer": lambda: call(
        mt.Transformer,
        5,
        4,
        2,
        6,
        6,
        6,
        0.1,
        num_encoder_layers=1,
        num_decoder_layers=1,
        pad_id=0,
        tie_embeddings=False,
    ),
    "Transformer.forward": lambda: call(
        transformer(),
        ids(2, 4) % 4 + 1,
        ids(2, 3),
        attention_mask=np.ones((2, 4), int),
        decoder_attention_mask=np.ones((2, 3), int),
    ),
    "Transformer.forward labels": lambda: call(transformer(), ids(2, 4) % 4 + 1, labels=ids(2, 3), label_smoothing=0.1),
    "Transformer.encode": lambda: call(transformer().encode, ids(2, 4) % 4 + 1, attention_mask=np.ones((2, 4), int)),
    "Transformer.num_targets": lambda: call(transformer().num_targets, labels=ids(2, 4)),
    "Transformer.make_cache": lambda: call(transformer().make_cache, 2, length=4),
    "Transformer.generate": lambda: call(
        transformer().generate,
        ids(2, 4) % 4 + 1,
        max_new_tokens=2,
        decoder_input_ids=ids(2, 2),
        decoder_attention_mask=np.ones((2, 2), int),
    ),
}
