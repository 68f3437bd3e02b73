"""Images to captions: what the caption may depend on, generation, saving, training, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import train_config

import minitransformer as mt
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError

V, T = 9, 5


def captioner(seed: int = 0, **changes: Any) -> mt.ImageCaptioner:
    """In float64 and eval mode, with weights large enough for every part to matter."""
    sizes = {"image_size": 4, "patch_size": 2, "d_model": 8, "num_heads": 2, "dff": 6, "num_encoder_layers": 1}
    model = mt.ImageCaptioner(mt.CaptionerConfig(**{"vocab_size": V, "output_seq_len": T, **sizes, **changes}))
    model.to("float64")
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = rng.normal(0 if parameter.ndim == 2 else 0.7, 0.4, parameter.shape)
    model.eval()
    return model


def images(B: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((B, 1, 4, 4))


def ids(B: int, length: int) -> np.ndarray:
    return np.random.default_rng([B, length]).integers(1, V, (B, length))


configs = st.fixed_dictionaries({
    "num_heads": st.sampled_from([1, 2, 4]),
    "num_encoder_layers": st.integers(1, 2),
    "num_decoder_layers": st.integers(1, 2),
    "patch_size": st.sampled_from([1, 2, 4]),
    "tie_embeddings": st.booleans(),
    "seed": st.integers(0, 99),
})  # fmt: skip


@given(config=configs, at=st.integers(0, T - 1))
def test_a_token_depends_on_the_image_and_on_what_is_before_it(config: dict[str, Any], at: int) -> None:
    model, captions = captioner(**config), ids(1, T)
    changed = captions.copy()
    changed[:, at] = (changed[:, at] + 1) % V
    before, after = (model(images(1), x).logits.numpy() for x in (captions, changed))
    np.testing.assert_array_equal(before[:, :at], after[:, :at])
    assert not np.array_equal(before[:, at], after[:, at])
    other = model(images(1, seed=1), captions).logits.numpy()
    assert (abs(other - before).max(-1) > 0).all()


@given(config=configs)
def test_gradients_of_the_loss(config: dict[str, Any]) -> None:
    """Along a drawn direction of all parameters, by complex step."""
    model, labels = captioner(**config), ids(2, 3)
    labels[0, 2] = 0
    model(images(2), labels=labels).loss.backward()
    rng = np.random.default_rng(config["seed"])
    slope, stepped = 0.0, {}
    for name, parameter in model.named_parameters():
        direction = rng.standard_normal(parameter.shape)
        slope += float((parameter.grad * direction).sum())
        stepped[name] = parameter.numpy() + 1e-30j * direction
    model.to("complex128")
    model.load_state_dict(stepped)
    loss = model(images(2).astype(complex), labels=labels).loss
    assert slope == pytest.approx(loss.numpy().imag / 1e-30, rel=1e-10, abs=1e-12)


@given(config=configs, beams=st.sampled_from([1, 3]))
def test_generation_with_and_without_a_cache(config: dict[str, Any], beams: int) -> None:
    model, pixels = captioner(**config), images(3)
    options: dict[str, Any] = {"max_new_tokens": T - 1, "num_beams": beams, "eos_token_id": 1}
    found = model.generate(pixels, **options)
    np.testing.assert_array_equal(found, model.generate(pixels, use_cache=False, **options))
    for row, image in zip(found, pixels, strict=True):
        alone = model.generate(image[None], **options)[0]
        np.testing.assert_array_equal(row[: len(alone)], alone)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = captioner(dropout_rate=0.1, pad_id=2)
    model.save_pretrained(tmp_path)
    again = mt.from_pretrained(tmp_path)
    assert isinstance(again, mt.ImageCaptioner) and again.config == model.config
    logits = [m(images(2), ids(2, T)).logits.numpy() for m in (model, again)]
    np.testing.assert_array_equal(*logits)


def test_learns_to_name_digits() -> None:
    mt.manual_seed(0)
    data = mt.data.drawn_digits(40)
    named = mt.data.ArrayDataset(pixels=data.arrays["pixels"], labels=np.stack([data.arrays["labels"] + 2] * 2, axis=1))
    config = mt.CaptionerConfig(12, 3, 8, 4, d_model=16, dff=32, num_encoder_layers=1, num_decoder_layers=1)
    model = mt.ImageCaptioner(config)
    mt.Trainer(model, train_config(max_steps=150, batch_size=20), named).train()
    model.eval()
    found = model.generate(data.arrays["pixels"], max_new_tokens=2)[:, 1:]
    assert (found == named.arrays["labels"]).mean() > 0.8


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda m: m(images(1)[:, :, :3], ids(1, 2)), ShapeError, r"pixels have shape \(1, 1, 3, 4\)"),
    (lambda m: m(images(1)), DTypeError, "ImageCaptioner: got no decoder_input_ids"),
    (lambda m: m(images(2), ids(1, 2)), ShapeError, "ImageCaptioner: decoder_input_ids have 1 rows, expected 2"),
    (lambda m: m(images(1), ids(1, T + 1)), RangeError, "hold 6 tokens, expected at most output_seq_len 5"),
    (lambda m: m.generate(images(1), max_new_tokens=T), RangeError, "are too many"),
    (lambda m: mt.ImageCaptioner(3), DTypeError, "config is 3, expected a CaptionerConfig"),
    (lambda m: captioner(patch_size=3), ConfigError, "image_size 4 is not divisible by patch_size 3"),
    (lambda m: captioner(num_heads=3), ConfigError, "8 is not divisible by num_attention_heads 3"),
    (lambda m: captioner(pad_id=V), ConfigError, f"pad_id is {V}, expected less than vocab_size {V}"),
    (lambda m: captioner(vocab_size=0), ConfigError, "CaptionerConfig: vocab_size is 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", REFUSED, ids=[message[:40] for *_, message in REFUSED])
def test_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(captioner())
