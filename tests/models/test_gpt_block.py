"""The block by hand and the block composed of layers: two programs without common code above the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BLOCK, OPTIONS, SHAPE, V, fresh_gpt, options

import minitransformer as mt
from minitransformer import random
from minitransformer.autograd import OPS, grad
from minitransformer.errors import DTypeError, MiniTransformerError, ShapeError
from minitransformer.models.gpt_block import GPTBlock
from minitransformer.nn import Linear
from minitransformer.ops.gpt_block import BlockOptions


class Result(NamedTuple):
    loss: float
    logits: np.ndarray
    gradients: list[np.ndarray]


@contextmanager
def composed() -> Iterator[None]:
    right = GPTBlock.runs_by_hand
    GPTBlock.runs_by_hand = lambda self: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        GPTBlock.runs_by_hand = right  # type: ignore[method-assign]


def run(model: mt.GPT, ids: np.ndarray, **more: Any) -> Result:
    with random.scope(3, 5, 7):
        out = model(ids, labels=ids, **more)
    return Result(out.loss.item(), out.logits.numpy().copy(), grad(out.loss, model.parameters()))


def moved(model: mt.GPT, seed: int = 0) -> mt.GPT:
    """With every parameter away from where it starts: biases at 0 and weights at 1 would hide mistakes."""
    rng = np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.3 * rng.standard_normal(parameter.shape).astype(np.float32)
    return model


def agree(model: mt.GPT, ids: np.ndarray, **more: Any) -> None:
    model.to("float64")
    ours = run(model, ids, **more)
    with composed():
        theirs = run(model, ids, **more)
    np.testing.assert_allclose(ours.logits, theirs.logits, rtol=1e-10, atol=1e-10)
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    model.to("float32")
    single = run(model, ids, **more)
    with composed():
        other = run(model, ids, **more)
    pairs = [(single.logits, other.logits, theirs.logits)]
    pairs += zip(single.gradients, other.gradients, theirs.gradients, strict=True)
    for a, b, exact in pairs:
        scale = float(abs(exact).max(initial=0.0))
        assert abs(a - exact).max(initial=0.0) <= 2 * abs(b - exact).max(initial=0.0) + 2e-6 * scale + 1e-7


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_every_option_once(changes: dict[str, Any]) -> None:
    ids = np.random.default_rng(1).integers(0, V, (3, BLOCK))
    for model in (moved(fresh_gpt(**changes)), moved(fresh_gpt(**changes)).eval()):
        agree(model, ids)


@given(
    changes=options(), dropout=st.sampled_from([0.0, 0.4]), T=st.integers(2, BLOCK), B=st.integers(1, 3), data=st.data()
)
def test_drawn_configs(changes: dict[str, Any], dropout: float, T: int, B: int, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 1000))
    model = moved(fresh_gpt(**changes, dropout=dropout), seed)
    rng = np.random.default_rng(seed)
    padding = data.draw(st.none() | st.lists(st.integers(0, T - 1), min_size=B, max_size=B))
    mask = None if padding is None else (np.arange(T) >= np.array(padding)[:, None]).astype(int)
    agree(model, rng.integers(0, V, (B, T)), attention_mask=mask)


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


def test_a_layer_is_one_node() -> None:
    model = fresh_gpt(n_layer=3)
    ids = np.zeros((1, 4), int)
    names = nodes(model(ids, labels=ids).loss)
    assert names.count("gpt_block") == 3
    assert "attention" not in names


def test_a_replaced_part_is_called() -> None:
    class Doubled(Linear):
        def forward(self, x: mt.Tensor) -> mt.Tensor:
            return super().forward(x) * 2

    model = moved(fresh_gpt())
    ids = np.arange(4)[None]
    before = model(ids).logits.numpy().copy()
    old = model.blocks[0].ffn.down
    model.blocks[0].ffn.down = Doubled(old.weight.shape[1], old.weight.shape[0])
    model.blocks[0].ffn.down.load_state_dict(old.state_dict())
    assert not np.allclose(model(ids).logits.numpy(), before)
    assert "attention" in nodes(model(ids, labels=ids).loss)


def test_frozen_parameters_get_no_gradient() -> None:
    model = moved(fresh_gpt())
    model.blocks[0].attn.qkv.weight.requires_grad = False
    ids = np.arange(6)[None]
    model(ids, labels=ids).loss.backward()
    assert model.blocks[0].attn.qkv.weight.grad is None
    assert model.blocks[0].attn.qkv.bias.grad is not None


def test_a_write_between_forward_and_backward_is_noticed() -> None:
    model = moved(fresh_gpt())
    ids = np.arange(6)[None]
    loss = model(ids, labels=ids).loss
    model.blocks[0].ffn.down.weight.data = np.zeros_like(model.blocks[0].ffn.down.weight.numpy())
    with pytest.raises(MiniTransformerError, match="written to after the forward pass"):
        loss.backward()


WIDTH = SHAPE["n_embd"]


def wrong(position: int, array: np.ndarray | None) -> list[Any]:
    """The inputs of a block of width 4 with one head, of which one is replaced."""
    shapes = [(1, 2, 4), (4,), (4,), (12, 4), (12,), (4, 4), (4,), (4,), (4,), (3, 4), (3,), (4, 3), (4,)]
    inputs: list[Any] = [np.ones(shape) for shape in shapes]
    inputs[position] = array
    return inputs


@pytest.mark.parametrize(
    ("position", "array", "error", "message"),
    [
        (0, np.ones((2, 4)), ShapeError, r"gpt_block: x has shape \(2, 4\), expected \(B, T, C\)"),
        (0, np.ones((1, 2, 3)), ShapeError, r"norm1 has shape \(4,\), expected \(3,\) for x \(1, 2, 3\)"),
        (0, np.ones((1, 2, 4), int), DTypeError, "x has dtype int64"),
        (3, np.ones((4, 4)), ShapeError, r"qkv has shape \(4, 4\), expected \(12, 4\) for x \(1, 2, 4\)"),
        (4, np.ones(4), ShapeError, r"qkv_bias has shape \(4,\), expected \(12,\)"),
        (1, None, DTypeError, "norm1 has dtype NoneType"),
        (11, np.ones(4), ShapeError, r"up has shape \(3, 4\), expected \(0, 4\)"),
    ],
)
def test_refusals(position: int, array: Any, error: Any, message: str) -> None:
    block = BlockOptions(1, 1, _problem())
    with pytest.raises(error, match=message):
        OPS["gpt_block"](*wrong(position, array), options=block)


def _problem() -> Any:
    from minitransformer.kernels.attention.problem import Problem

    return Problem(0.5, np.zeros(1, np.int64), causal=True)


@pytest.mark.parametrize(
    ("options_", "message"),
    [
        (BlockOptions(3, 3, _problem()), r"x has shape \(1, 2, 4\), expected \(B, T, C\) with C divisible by 3 heads"),
        (BlockOptions(1, 1, _problem(), norm="batch"), "norm is 'batch'"),
        (BlockOptions(1, 1, _problem(), activation="elu"), "activation is 'elu'"),
        (BlockOptions(1, 1, _problem(), norm="rms"), "an RMS norm has a bias"),
        (None, "options is a NoneType, expected BlockOptions"),
    ],
)
def test_refused_options(options_: Any, message: str) -> None:
    with pytest.raises(MiniTransformerError, match=message):
        OPS["gpt_block"](*wrong(0, np.ones((1, 2, 4))), options=options_)
