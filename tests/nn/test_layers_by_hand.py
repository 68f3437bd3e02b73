"""The layers of encoder and decoder by hand and composed: two programs without common code above the kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
from minitransformer import masks, nn, random
from minitransformer.autograd import grad, watching

RNG = np.random.default_rng(3)
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "swiglu")


class Given(NamedTuple):
    """A layer, the arrays that it is given, and how it is called."""

    layer: Any
    arrays: tuple[np.ndarray, ...]  # x, and memory for a decoder
    settings: dict[str, Any]


def layer_of(
    B: int = 2,
    T: int = 5,
    S: int = 3,
    H: int = 2,
    D: int = 4,
    dff: int = 7,
    p: float = 0.0,
    *,
    decodes: bool = False,
    norm_first: bool = False,
    activation: str = "relu",
    bias: bool = True,
    seed: int = 0,
    **settings: Any,
) -> Given:
    """With every parameter away from where it starts: biases at 0 and weights at 1 would hide mistakes."""
    C, rng = H * D, np.random.default_rng(seed)
    kind = nn.DecoderLayer if decodes else nn.EncoderLayer
    layer: Any = kind(C, H, dff, p, norm_first=norm_first, activation=activation)
    if not bias:
        layer.attn, layer.ffn = (
            nn.MultiHeadAttention(C, H, None, p, False),
            nn.FeedForward(C, dff, p, activation, False),
        )
        layer.norm2 = nn.LayerNorm(C, bias=False)
        if decodes:
            layer.cross_attn = nn.MultiHeadAttention(C, H, None, p, False)
    layer.name_call_sites()
    for parameter in layer.parameters():
        parameter.data = parameter.data + 0.3 * rng.standard_normal(parameter.shape).astype(np.float32)
    shapes = ((B, T, C), (B, S, C)) if decodes else ((B, T, C),)
    return Given(layer, tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes), settings)


def run(given: Given, call: Callable[..., mt.Tensor], dtype: str) -> list[np.ndarray]:
    """The output, and the gradients of all inputs and parameters."""
    given.layer.to(dtype)
    inputs = [mt.tensor(a.astype(dtype), requires_grad=True) for a in given.arrays]
    with random.scope(3, 5, 7):
        out = call(*inputs, **given.settings)
    weights = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
    return [out.numpy(), *grad((out * weights).sum(), [*inputs, *given.layer.parameters()])]


def agree(given: Given) -> None:
    layer = given.layer
    exact = run(given, layer.composed, "float64")
    for ours, theirs in zip(run(given, layer, "float64"), exact, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    singles = zip(run(given, layer, "float32"), run(given, layer.composed, "float32"), exact, strict=True)
    for ours, theirs, truth in singles:
        scale = float(abs(truth).max(initial=0.0))
        allowed = 2 * abs(theirs - truth).max(initial=0.0) + 2e-6 * scale + 1e-6
        assert ours.dtype == np.float32
        assert abs(ours - truth).max(initial=0.0) <= allowed


EMPTY_ROW = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm first": {"norm_first": True},
    "no bias": {"bias": False},
    "dropout": {"p": 0.4},
    "dropout, norm first": {"p": 0.4, "norm_first": True},
    "dropout, no bias": {"p": 0.4, "bias": False},
    **{activation: {"activation": activation, "p": 0.2} for activation in ACTIVATIONS[1:]},
    "a row may attend to nothing": {"mask": EMPTY_ROW},
    "mask object": {"mask": masks.causal() & masks.padding(np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]))},
    "tensor as mask": {"mask": mt.tensor(EMPTY_ROW)},
    "one of each": {"B": 1, "T": 1, "S": 1, "H": 1, "dff": 1},
    "no rows": {"B": 0},
    "no tokens": {"T": 0},
}
DECODER_OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "causal, masked": {"is_causal": True, "mask": EMPTY_ROW},
    "memory masked": {"memory_mask": np.array([1, 0, 1], bool)},
    "memory hidden": {"memory_mask": np.zeros((5, 3), bool)},
    "memory padded": {"memory_mask": masks.padding(np.array([[1, 1, 0], [0, 1, 1]]))},
    "no memory": {"S": 0},
    "no memory, norm first": {"S": 0, "norm_first": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("decodes", [False, True], ids=["encoder", "decoder"])
def test_every_option_once(decodes: bool, options: dict[str, Any]) -> None:
    given = layer_of(**options, decodes=decodes)
    agree(given)
    given.layer.eval()
    agree(given)


@pytest.mark.parametrize("options", DECODER_OPTIONS.values(), ids=DECODER_OPTIONS)
def test_every_option_of_a_decoder_once(options: dict[str, Any]) -> None:
    agree(layer_of(**options, decodes=True))


@st.composite
def layers(draw: st.DrawFn) -> Given:
    B, T, S, H, D, dff = (draw(st.integers(1, n)) for n in (3, 6, 6, 3, 3, 6))
    decodes, seed = draw(st.booleans()), draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {"mask": rng.random((B, 1, T, T)) < draw(st.sampled_from([0.3, 0.8]))}
    if decodes:
        settings["is_causal"] = draw(st.booleans())
        settings["memory_mask"] = rng.random((B, H, T, S)) < 0.6
    settings = {name: value for name, value in settings.items() if draw(st.booleans())}
    options = {
        "decodes": decodes,
        "norm_first": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "bias": draw(st.booleans()),
        "p": draw(st.sampled_from([0.0, 0.4])),
    }
    return layer_of(B, T, S, H, D + 3, dff, seed=seed, **options, **settings)


@given(given=layers())
def test_drawn_layers(given: Given) -> None:
    agree(given)


def nodes(x: Any) -> list[str]:
    """The names of the ops that a result came from."""
    found, waiting, seen = [], [x._node], set()
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            found.append(node.op.name)
            waiting += [parent[0] for parent in node.parents if isinstance(parent, tuple)]
    return found


def called(given: Given, **settings: Any) -> mt.Tensor:
    return given.layer(*map(mt.tensor, given.arrays), **settings)


@pytest.mark.parametrize(("decodes", "name"), [(False, "encoder_layer"), (True, "decoder_layer")])
def test_a_layer_is_one_node(decodes: bool, name: str) -> None:
    given = layer_of(decodes=decodes)
    assert nodes(called(given)) == [name]
    assert nodes(called(given, mask=masks.causal())) == [name]
    assert nodes(called(given, mask=EMPTY_ROW)) == [name]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("decodes", [False, True])
def test_layers_without_a_path_draw_the_same_dropout(decodes: bool, norm_first: bool) -> None:
    """Their masks are addressed by the order of calls, so both ways must draw in the same order."""
    layer, arrays, _ = layer_of(decodes=decodes, norm_first=norm_first, p=0.4)
    for _, module in layer.named_modules():
        module.path = None
    inputs = [mt.tensor(a) for a in arrays]
    results = []
    for call in (layer, layer.composed):
        mt.manual_seed(4)
        results.append(call(*inputs).numpy())
        with random.scope(1, 2):
            results.append(call(*inputs).numpy())
    for ours, theirs in (results[::2], results[1::2]):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert abs(results[0] - layer.eval()(*inputs).numpy()).max() > 0.01


PARTS = ["norm1", "norm2", "attn", "attn.qkv", "attn.out", "ffn", "ffn.up", "ffn.down", "ffn.dropout", "dropout1"]
PARTS += ["dropout2"]


def replaced(layer: Any, path: str, anew: bool) -> None:
    """The module at `path` doubles its result: it is of a class of its own, or its forward was overwritten."""
    *above, name = path.split(".")
    for attribute in above:
        layer = getattr(layer, attribute)
    part = getattr(layer, name)
    forward = type(part).forward
    if anew:
        kind = type("Doubled", (type(part),), {"forward": lambda self, *a, **k: forward(self, *a, **k) * 2})
        part.__class__ = kind
    else:
        part.forward = lambda *a, **k: forward(part, *a, **k) * 2


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize(
    ("decodes", "path"),
    [
        *((False, path) for path in PARTS),
        *((True, path) for path in (*PARTS, "norm3", "cross_attn", "cross_attn.qkv", "cross_attn.out", "dropout3")),
    ],
)
def test_a_replaced_part_is_called(decodes: bool, path: str, anew: bool) -> None:
    given = layer_of(decodes=decodes)
    before = called(given).numpy()
    replaced(given.layer, path, anew)
    after = called(given)
    assert "attention" in nodes(after)
    if path != "cross_attn.qkv":  # whose weight is read, and not called
        assert not np.allclose(after.numpy(), before, atol=1e-3)


@pytest.mark.parametrize("decodes", [False, True])
def test_parts_that_the_layer_by_hand_does_not_know_go_the_composed_way(decodes: bool) -> None:
    def eps(layer: Any) -> None:
        layer.norm2.eps = 0.1

    def shared_keys(layer: Any) -> None:
        layer.attn = nn.MultiHeadAttention(8, 2, 1)

    def another_norm(layer: Any) -> None:
        layer.norm1 = layer.norm2 = nn.RMSNorm(8)

    for change in (eps, shared_keys, another_norm):
        given = layer_of(decodes=decodes)
        change(given.layer)
        assert "attention" in nodes(called(given))


class Watcher:
    def __init__(self) -> None:
        self.names: list[str] = []

    def called(self, op: Any, *rest: Any) -> None:
        self.names.append(op.name)

    def differentiated(self, *given: Any) -> None:
        """Nothing to see."""

    def inside(self, module: Any) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize(("decodes", "attentions"), [(False, 1), (True, 2)])
def test_who_watches_sees_every_op(decodes: bool, attentions: int) -> None:
    watcher = Watcher()
    token = watching.set(watcher)
    try:
        called(layer_of(decodes=decodes))
    finally:
        watching.reset(token)
    assert watcher.names.count("attention") == attentions


@pytest.mark.parametrize("name", ["mask", "memory_mask"])
def test_a_mask_that_adds_gets_its_gradient(name: str) -> None:
    given = layer_of(decodes=True)
    may = RNG.random((5, 5 if name == "mask" else 3)) < 0.7
    may[:, 0] = True
    added = mt.tensor(np.where(may, 0.0, -np.inf), requires_grad=True)
    out = called(given, **{name: added})
    np.testing.assert_allclose(out.numpy(), called(given, **{name: may}).numpy(), rtol=0, atol=1e-5)
    (gradient,) = grad((out * out).sum(), [added])
    assert (gradient[may] != 0).any()
    assert not gradient[~may].any()


@pytest.mark.parametrize("decodes", [False, True])
def test_memory_order_and_flags_of_inputs_change_no_bit(decodes: bool) -> None:
    given = layer_of(decodes=decodes, B=3)
    expected = run(given, given.layer, "float32")
    turned = tuple(np.ascontiguousarray(a.transpose(2, 0, 1)).transpose(1, 2, 0) for a in given.arrays)
    for array in turned:
        array.flags.writeable = False
    for parameter in given.layer.parameters():
        parameter.data = np.asfortranarray(parameter.data)
    inputs = [mt.Tensor(a, requires_grad=True) for a in turned]
    out = given.layer(*inputs)
    weights = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    results = [out.numpy(), *grad((out * weights).sum(), [*inputs, *given.layer.parameters()])]
    for ours, theirs in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_mask_tensor_may_be_written_to_before_backward() -> None:
    given = layer_of()
    mask, x = mt.tensor(EMPTY_ROW), mt.tensor(given.arrays[0], requires_grad=True)
    expected = grad(given.layer(x, EMPTY_ROW).sum(), [x])[0]
    out = given.layer(x, mask).sum()
    mask.data[...] = False
    np.testing.assert_array_equal(grad(out, [x])[0], expected)
