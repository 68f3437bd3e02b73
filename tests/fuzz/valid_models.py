"""Valid calls of the models."""

from __future__ import annotations

from typing import Any

import numpy as np
from material import Lines, call, gpt, ids, leaf

import minitransformer as mt
from minitransformer.models.bert import EncoderModel


def transformer() -> mt.Transformer:
    mt.manual_seed(0)
    return mt.Transformer(5, 4, 2, 6, 6, 6, 0.0, num_encoder_layers=1, num_decoder_layers=1)


def vision_config(**changes: Any) -> mt.VisionConfig:
    sizes = {"image_size": 4, "patch_size": 2, "num_channels": 1, "hidden_size": 4, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "intermediate_size": 6, "num_labels": 5}
    return mt.VisionConfig(**{**sizes, **heads, **changes})


def vision() -> mt.VisionTransformer:
    mt.manual_seed(0)
    return mt.VisionTransformer(vision_config())


def captioner() -> mt.ImageCaptioner:
    mt.manual_seed(0)
    sizes = {"image_size": 4, "patch_size": 2, "d_model": 4, "num_heads": 2, "dff": 6}
    return mt.ImageCaptioner(mt.CaptionerConfig(5, 4, num_encoder_layers=1, num_decoder_layers=1, **sizes))


def bert(kind: type[EncoderModel]) -> Any:
    """In eval mode: two calls are to give one result."""
    mt.manual_seed(0)
    return kind(mt.BERTConfig(5, 4, 1, 2, 6, max_position_embeddings=6, num_labels=3)).eval()


def segments() -> dict[str, np.ndarray]:
    return {"attention_mask": np.ones((2, 4), int), "token_type_ids": ids(2, 4, below=2)}


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
    "VisionConfig": lambda: call(
        mt.VisionConfig,
        image_size=4,
        patch_size=2,
        num_channels=1,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        hidden_act="relu",
        dropout=0.1,
        num_labels=5,
    ),
    "VisionTransformer": lambda: call(mt.VisionTransformer, vision_config()),
    "VisionTransformer.forward": lambda: call(vision(), leaf(2, 1, 4, 4), ids(2), label_smoothing=0.1),
    "VisionTransformer.encode": lambda: call(vision().encode, leaf(2, 1, 4, 4)),
    "VisionTransformer.num_targets": lambda: call(vision().num_targets, labels=ids(2)),
    "CaptionerConfig": lambda: call(
        mt.CaptionerConfig,
        vocab_size=5,
        output_seq_len=4,
        image_size=4,
        patch_size=2,
        num_channels=1,
        d_model=4,
        num_heads=2,
        dff=6,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dropout_rate=0.1,
        pad_id=1,
        tie_embeddings=False,
    ),
    "ImageCaptioner": lambda: call(mt.ImageCaptioner, captioner().config),
    "ImageCaptioner.forward": lambda: call(
        captioner(), leaf(2, 1, 4, 4), ids(2, 3), decoder_attention_mask=np.ones((2, 3), int)
    ),
    "ImageCaptioner.forward labels": lambda: call(captioner(), leaf(2, 1, 4, 4), labels=ids(2, 3), label_smoothing=0.1),
    "ImageCaptioner.encode": lambda: call(captioner().encode, leaf(2, 1, 4, 4)),
    "ImageCaptioner.generate": lambda: call(captioner().generate, leaf(2, 1, 4, 4), max_new_tokens=2),
    "BERT": lambda: call(mt.BERT, mt.BERTConfig(5, 4, 1, 2, 6, max_position_embeddings=6)),
    "BERT.forward": lambda: call(bert(mt.BERT), ids(2, 4), **segments()),
    "BERTConfig": lambda: call(
        mt.BERTConfig,
        vocab_size=5,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        hidden_act="silu",
        hidden_dropout_prob=0.1,
        max_position_embeddings=6,
        type_vocab_size=2,
        initializer_range=0.1,
        layer_norm_eps=1e-5,
        pad_token_id=4,
        num_labels=3,
    ),
    "BERTForMaskedLM": lambda: call(mt.BERTForMaskedLM, mt.BERTConfig(5, 4, 1, 2, 6)),
    "BERTForMaskedLM.forward": lambda: call(
        bert(mt.BERTForMaskedLM), ids(2, 4), **segments(), labels=ids(2, 4), label_smoothing=0.1
    ),
    "BERTForMaskedLM.from_encoder": lambda: call(mt.BERTForMaskedLM.from_encoder, bert(mt.BERT)),
    "BERTForMaskedLM.num_targets": lambda: call(bert(mt.BERTForMaskedLM).num_targets, labels=ids(2, 4)),
    "BERTForQuestionAnswering": lambda: call(mt.BERTForQuestionAnswering, mt.BERTConfig(5, 4, 1, 2, 6)),
    "BERTForQuestionAnswering.forward": lambda: call(
        bert(mt.BERTForQuestionAnswering), ids(2, 4), **segments(), start_positions=ids(2), end_positions=ids(2) + 2
    ),
    "BERTForQuestionAnswering.num_targets": lambda: call(
        bert(mt.BERTForQuestionAnswering).num_targets, start_positions=ids(2), end_positions=ids(2)
    ),
    "BERTForSequenceClassification": lambda: call(mt.BERTForSequenceClassification, mt.BERTConfig(5, 4, 1, 2, 6)),
    "BERTForSequenceClassification.forward": lambda: call(
        bert(mt.BERTForSequenceClassification), ids(2, 4), **segments(), labels=ids(2), label_smoothing=0.1
    ),
    "BERTForSequenceClassification.from_encoder": lambda: call(
        mt.BERTForSequenceClassification.from_encoder, bert(mt.BERT), num_labels=2, hidden_dropout_prob=0.2
    ),
}
