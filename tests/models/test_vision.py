"""The vision transformer: what every config must keep, what it saves, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer import nn, random
from minitransformer.errors import AllocationError, ConfigError, DTypeError, RangeError, ShapeError

SHAPE = {
    "image_size": 6,
    "patch_size": 3,
    "num_channels": 2,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 5,
    "num_labels": 3,
}
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
SEEDS = st.integers(0, 2**32)


@st.composite
def shapes(draw: st.DrawFn, acts: tuple[str, ...] = ("gelu", "gelu_tanh", "relu", "silu")) -> dict[str, Any]:
    """Fields of VisionConfig in any combination."""
    heads, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "image_size": patch * draw(st.integers(1, 3)),
        "patch_size": patch,
        "num_channels": draw(st.integers(1, 3)),
        "hidden_size": heads * draw(st.integers(2, 4)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(1, 9)),
        "hidden_act": draw(st.sampled_from(acts)),
        "num_labels": draw(st.integers(1, 4)),
    }


def vit(dtype: str = "float64", seed: int = 0, **changes: Any) -> mt.VisionTransformer:
    """A model in eval mode whose weights are large enough for every part to matter, norms and biases too."""
    model = mt.VisionTransformer(mt.VisionConfig(**{**SHAPE, **changes}))
    model.to(dtype)
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = rng.normal(0 if parameter.ndim == 2 else 0.7, 0.4, parameter.shape)
    model.eval()
    return model


def images(model: mt.VisionTransformer, B: int, seed: int = 0) -> np.ndarray:
    size = model.config.image_size
    return np.random.default_rng((seed, B)).standard_normal((B, model.config.num_channels, size, size))


def classes(model: mt.VisionTransformer, B: int, seed: int = 0) -> np.ndarray:
    """Labels of which one in four is ignored, the first never."""
    rng = np.random.default_rng((seed, B))
    return np.where((rng.random(B) < 0.75) | (np.arange(B) == 0), rng.integers(model.config.num_labels, size=B), -100)


# --- laws ------------------------------------------------------------------------------------------------


@given(chosen=shapes(), B=st.integers(0, 3), seed=SEEDS, smoothing=st.sampled_from([0.0, 0.2]))
def test_shapes_and_the_loss(chosen: dict[str, Any], B: int, seed: int, smoothing: float) -> None:
    model = vit(seed=seed, **chosen)
    pixels, labels = images(model, B, seed), classes(model, B, seed)
    out = model(pixels, labels, label_smoothing=smoothing)
    tokens = (B, 1 + model.config.num_patches, model.config.hidden_size)
    assert out.logits.shape == (B, model.config.num_labels)
    assert [state.shape for state in out.hidden_states] == [tokens] * (1 + model.config.num_hidden_layers)
    encoded = model.encode(pixels)
    np.testing.assert_array_equal(encoded.numpy(), model.encoder.norm(out.hidden_states[-1]).numpy())
    np.testing.assert_allclose(out.logits.numpy(), model.head(encoded[:, 0]).numpy(), **TIGHT)
    assert model(pixels).loss is None
    valid, logits = labels != -100, out.logits.numpy()
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    hit = log_p[np.arange(B), np.maximum(labels, 0)]
    losses = -(1 - smoothing) * hit - smoothing * log_p.mean(-1)
    np.testing.assert_allclose(out.loss.item(), losses[valid].mean() if B else 0, **TIGHT)
    assert model.num_targets(pixels=pixels, labels=labels) == valid.sum()


class Loss(nn.Module):
    """The loss of a model as a function of its pixels and parameters."""

    def __init__(self, model: mt.VisionTransformer) -> None:
        self.model = model

    def forward(self, pixels: Any) -> Any:
        return self.model(pixels, classes(self.model, pixels.shape[0])).loss


# relu is checked with the layers: a drawn point may lie on its kink.
@given(chosen=shapes(acts=("gelu", "gelu_tanh", "silu")), seed=SEEDS)
def test_the_gradient_of_the_loss(chosen: dict[str, Any], seed: int) -> None:
    model = vit(seed=seed, **chosen)
    mt.gradcheck(Loss(model), images(model, 2, seed), mode="directional")


@given(chosen=shapes(), order=st.permutations(range(4)), seed=SEEDS)
def test_permuted_images_have_permuted_logits(chosen: dict[str, Any], order: list[int], seed: int) -> None:
    model = vit(seed=seed, **chosen)
    pixels = images(model, 4, seed)
    np.testing.assert_allclose(model(pixels[order]).logits.numpy(), model(pixels).logits.numpy()[order], **TIGHT)


@given(chosen=shapes(), seed=SEEDS, data=st.data())
def test_a_patch_enters_as_the_token_of_its_place(chosen: dict[str, Any], seed: int, data: st.DataObject) -> None:
    """Only that token differs before the first layer; behind it, the class token does too."""
    model = vit(seed=seed, **chosen)
    P, across = model.config.patch_size, model.config.image_size // model.config.patch_size
    patch = data.draw(st.integers(0, across * across - 1), label="patch")
    row, column = divmod(patch, across)
    pixels = images(model, 2, seed)
    other = pixels.copy()
    other[0, :, row * P : (row + 1) * P, column * P : (column + 1) * P] += 1.5
    before, after = model(pixels), model(other)
    first = [out.hidden_states[0].numpy() for out in (before, after)]
    changed = (first[0] != first[1]).any(axis=-1)
    assert [tuple(place) for place in np.argwhere(changed)] == [(0, 1 + patch)]
    last = [out.hidden_states[-1].numpy() for out in (before, after)]
    assert abs(last[0] - last[1])[0, 0].max() > 1e-9
    np.testing.assert_array_equal(last[0][1], last[1][1])


@given(order=st.permutations(range(4)), seed=SEEDS)
def test_only_positions_tell_patches_apart(order: list[int], seed: int) -> None:
    model = vit(seed=seed, num_hidden_layers=2, patch_size=1, image_size=2)
    pixels = images(model, 3, seed)
    moved = pixels.reshape(3, 2, 4)[..., order].reshape(pixels.shape)
    told = abs(model(moved).logits.numpy() - model(pixels).logits.numpy()).max() > 1e-9
    assert told == (order != sorted(order))
    model.encoder.positions.data = np.zeros(model.encoder.positions.shape)
    np.testing.assert_allclose(model(moved).logits.numpy(), model(pixels).logits.numpy(), **TIGHT)


def test_pixels_that_are_not_finite_spoil_their_own_image_alone() -> None:
    model = vit()
    pixels = images(model, 3)
    expected = model(pixels).logits.numpy()
    for bad in (np.nan, np.inf, -np.inf):
        pixels[1, 0, 2, 2] = bad
        logits = model(pixels).logits.numpy()
        assert np.isnan(logits[1]).all()
        np.testing.assert_array_equal(logits[[0, 2]], expected[[0, 2]])


@given(split=st.integers(1, 3), seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1))
def test_shards_draw_the_dropout_of_the_whole_batch(split: int, seed: int, step: int) -> None:
    model = vit(dropout=0.3)
    pixels = images(model, 4)
    plain = model(pixels).logits.numpy()
    model.train()

    def logits(rows: slice, first_row: int) -> np.ndarray:
        with random.scope(seed, step, first_row):
            return model(pixels[rows]).logits.numpy()

    whole = logits(slice(None), 0)
    assert not np.allclose(whole, plain)
    parts = [logits(slice(split), 0), logits(slice(split, None), split)]
    np.testing.assert_allclose(np.concatenate(parts), whole, **TIGHT)


# --- parameters and files --------------------------------------------------------------------------------


@given(shapes())
def test_parameters_are_counted_without_making_them(chosen: dict[str, Any]) -> None:
    model = mt.VisionTransformer(mt.VisionConfig(**chosen))
    assert model.config.num_parameters == model.num_parameters() == sum(p.data.size for p in model.parameters())


def test_the_default_is_vit_b16_with_86_567_656_parameters() -> None:
    assert mt.VisionConfig().num_parameters == 86_567_656
    assert mt.VisionConfig().num_patches == 196


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AllocationError, match=r"^VisionTransformer: \d[\d,]+ parameters need \d[\d,]+\.\d GB, there"):
        mt.VisionTransformer(mt.VisionConfig(hidden_size=2**31 - 1, num_attention_heads=1))
    config = mt.VisionConfig(**SHAPE)
    monkeypatch.setattr("minitransformer.models.base.total_memory", lambda: 4 * config.num_parameters)
    mt.VisionTransformer(config)
    monkeypatch.setattr("minitransformer.models.base.total_memory", lambda: 4 * config.num_parameters - 1)
    with pytest.raises(AllocationError) as caught:
        mt.VisionTransformer(config)
    assert str(caught.value) == (
        f"VisionTransformer: {config.num_parameters} parameters need 0.0 GB, there are 0.0 GB. "
        "Make hidden_size or num_hidden_layers smaller."
    )


def test_the_seed_decides_the_weights_and_the_start_is_undecided() -> None:
    def fresh(seed: int) -> mt.VisionTransformer:
        mt.manual_seed(seed)
        return mt.VisionTransformer(mt.VisionConfig(**{**SHAPE, "hidden_size": 64, "num_labels": 10}))

    model = fresh(1)
    assert model.files() == fresh(1).files() != fresh(2).files()
    for parameter in (model.encoder.class_token, model.encoder.positions):
        assert parameter.dtype == np.float32
        assert abs(parameter.data.std() / 0.02 - 1) < 5 / np.sqrt(2 * parameter.data.size)
    pixels = images(model, 200)
    assert abs(model(pixels, np.arange(200) % 10).loss.item() - np.log(10)) < 0.3


@given(chosen=shapes(), dtype=st.sampled_from(["float32", "float64"]), seed=SEEDS)
def test_a_saved_model_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[str, Any], dtype: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    model = vit(dtype, seed, **chosen, dropout=0.25)
    model.save_pretrained(folder)
    again = mt.from_pretrained(folder)
    assert isinstance(again, mt.VisionTransformer)
    assert (again.config, again.training) == (model.config, False)
    assert again.files() == model.files()
    pixels = images(model, 2)
    assert again(pixels).logits.numpy().tobytes() == model(pixels).logits.numpy().tobytes()


def test_a_config_of_numpy_numbers_is_saved(tmp_path: Path) -> None:
    sizes = {name: np.int64(size) for name, size in SHAPE.items()}
    mt.VisionTransformer(mt.VisionConfig(**sizes, dropout=np.float64(0.1))).save_pretrained(tmp_path)
    assert mt.from_pretrained(tmp_path).config == mt.VisionConfig(**SHAPE, dropout=0.1)


# --- what is refused -------------------------------------------------------------------------------------

SIZE = "expected a positive integer. Pass such a number."
BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    **{name: ({name: 0}, f"{name} is 0, {SIZE}") for name in SHAPE},
    "float size": ({"num_hidden_layers": 2.0}, f"num_hidden_layers is 2.0, {SIZE}"),
    "bool size": ({"num_labels": True}, f"num_labels is True, {SIZE}"),
    "huge": ({"hidden_size": 2**31}, "hidden_size is 2147483648, expected at most 2147483647. Pass a smaller number."),
    "deep": ({"num_hidden_layers": 10_001}, "num_hidden_layers is 10001, expected at most 10000. Pass a smaller "),
    "dropout": ({"dropout": 1}, "the dropout rate is 1, expected a number in [0, 1). 0 turns dropout off."),
    "act": (
        {"hidden_act": "swiglu"},
        "hidden_act is 'swiglu', expected one of ('gelu', 'gelu_tanh', 'relu', 'silu'). Pass one of them.",
    ),
    "patch": (
        {"patch_size": 4},
        "image_size 6 is not divisible by patch_size 4. "
        "Choose a patch size that divides the image size, or crop or pad the images.",
    ),
    "heads": (
        {"num_attention_heads": 3},
        "hidden_size 8 is not divisible by num_attention_heads 3. Choose a number of heads that divides the width.",
    ),
    "name": ({"num_heads": 3}, "has no field 'num_heads'. Did you mean "),
}


@pytest.mark.parametrize(("bad", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_makes_no_sense_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        mt.VisionConfig(**{**SHAPE, **bad})
    assert str(error.value).startswith(f"VisionConfig: {message}")


PIXELS = np.zeros((2, 2, 6, 6))
BAD_CALLS: dict[str, tuple[type[Exception], tuple[Any, ...], str]] = {
    "bytes": (
        DTypeError,
        (PIXELS.astype(np.uint8),),
        "PatchEmbedding: pixels have dtype uint8, expected float32 or float64. Convert bytes with pixels.astype(",
    ),
    "channels last": (
        ShapeError,
        (PIXELS.transpose(0, 2, 3, 1),),
        "PatchEmbedding: pixels have shape (2, 6, 6, 2), expected (batch, 2, 6, 6). Resize",
    ),
    "float labels": (
        DTypeError,
        (PIXELS, np.zeros(2)),
        "VisionTransformer: labels have dtype float64, expected integers. Number the classes from 0.",
    ),
    "fewer labels": (
        ShapeError,
        (PIXELS, np.zeros(1, int)),
        "VisionTransformer: labels have shape (1,), expected (2,). Give one class per image.",
    ),
    "one-hot labels": (
        ShapeError,
        (PIXELS, np.eye(2, 3, dtype=int)),
        "VisionTransformer: labels have shape (2, 3), expected (2,). Give one class per image.",
    ),
    "large label": (
        RangeError,
        (PIXELS, np.array([0, 3])),
        "VisionTransformer: the label at position (1,) is 3, expected 0 to 2 or ignore_index -100. "
        "Number the classes from 0, or raise num_labels.",
    ),
    "negative label": (
        RangeError,
        (PIXELS, np.array([-1, 0])),
        "VisionTransformer: the label at position (0,) is -1, expected 0 to 2 or ignore_index -100. Number",
    ),
}


@pytest.mark.parametrize(("kind", "arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_wrong_call_is_refused(kind: type[Exception], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(kind) as error:
        vit()(*arguments)
    assert str(error.value).startswith(message)


def test_a_batch_without_labels_has_no_number_of_targets() -> None:
    with pytest.raises(ConfigError, match=r"^VisionTransformer: the batch has no labels. Give one class per image.$"):
        vit().num_targets(pixels=PIXELS)
    with pytest.raises(ShapeError, match=r"labels have shape \(1, 2\), expected \(batch,\). Give one class per image"):
        vit().num_targets(labels=[[0, 1]])
    with pytest.raises(DTypeError, match=r"^VisionTransformer: config is \{\}, expected a VisionConfig. Pass mt.Vis"):
        mt.VisionTransformer({})  # type: ignore[arg-type]
