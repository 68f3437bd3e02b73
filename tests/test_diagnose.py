"""The first bad op: found among decoys, in its layer, forward and backward; looking changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import nn
from minitransformer.autograd import Op, Parameter
from minitransformer.diagnose import BadOp, first_bad_op, report, shrunk
from minitransformer.errors import DTypeError
from tests.tiny import fresh_gpt, gpt, token_ids


def poison(direction: str, value: float) -> Op:
    """The identity, but for one element of its output or of its gradient."""

    def spoilt(x: np.ndarray, where: str) -> np.ndarray:
        out = x.copy()
        if where == direction:
            out.flat[-1] = value
        return out

    return Op("poison", lambda x: (spoilt(x, "forward"), None), lambda dout, saved: (spoilt(dout, "backward"),))


# Shape-preserving steps (3, 4) -> (3, 4) without poles. The last four pass through infinities that do no harm.
STEPS: dict[str, Any] = {
    "tanh": lambda x: x.tanh(),
    "sum of two": lambda x: x + x.sigmoid(),
    "product": lambda x: x * 0.5 + 1,
    "norm": lambda x: F.layer_norm(x, 4, np.ones(4), np.zeros(4)),
    "matmul": lambda x: x @ (np.eye(4) * 0.5),
    "masked softmax": lambda x: F.softmax(mt.where(np.eye(3, 4) > 0, x, -np.inf), -1),
    "softmax of log 0": lambda x: F.softmax(x + mt.tensor(np.eye(3, 4) + np.eye(3, 4, 1)).log(), -1),
    "empty attention": lambda x: (
        F.scaled_dot_product_attention(*[x.reshape(1, 1, 3, 4)] * 3, np.zeros((3, 3), bool)).reshape(3, 4) + x
    ),
    "inverse of infinity": lambda x: x + 1 / mt.tensor(np.full((3, 4), 800.0)).exp(),
}


class Chain(nn.Module):
    """Some steps, each a module of its own."""

    def __init__(self, steps: list[Any]) -> None:
        self.weight = Parameter(np.linspace(-1, 1, 12).reshape(3, 4))
        self.steps = [Step(step) for step in steps]

    def forward(self) -> mt.Tensor:
        x = self.weight
        for step in self.steps:
            x = step(x)
        return (x * x).sum()


class Step(nn.Module):
    def __init__(self, function: Any) -> None:
        self.function = function

    def forward(self, x: mt.Tensor) -> mt.Tensor:
        return self.function(x)


CHAINS = st.lists(st.sampled_from(sorted(STEPS)), max_size=6)


@given(before=CHAINS, after=CHAINS, value=st.sampled_from([math.nan, math.inf, -math.inf]))
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_poisoned_op_is_found_among_decoys(
    before: list[str], after: list[str], value: float, direction: str
) -> None:
    op = poison(direction, value)
    chain = Chain([*(STEPS[name] for name in before), op, *(STEPS[name] for name in after)])
    bad = first_bad_op(chain, chain.parameters())
    with np.errstate(all="ignore"):
        loss = chain()
        reaches = not math.isfinite(loss.item()) or not np.isfinite(mt.grad(loss, [chain.weight])[0]).all()
    if not reaches:  # tanh of infinity is 1 and its gradient 0: no harm was done
        assert bad is None
        return
    assert bad is not None
    assert bad.op is op
    assert bad.layer == f"steps.{len(before)}"
    assert bool(bad.douts) == (direction == "backward")


@given(steps=CHAINS)
def test_where_all_is_well_there_is_none_and_looking_changes_no_bit(steps: list[str]) -> None:
    chain = Chain([STEPS[name] for name in steps])
    expected = mt.grad(chain(), [chain.weight])[0]
    seen: list[mt.Tensor] = []

    def compute() -> mt.Tensor:
        seen.append(chain())
        return seen[0]

    bad = first_bad_op(compute, chain.parameters())
    assert bad is None
    assert seen[0].data.tobytes() == chain().data.tobytes()
    assert mt.grad(chain(), [chain.weight])[0].tobytes() == expected.tobytes()
    assert chain.weight.grad is None


@pytest.mark.parametrize("bits", [32, 64])
def test_the_layer_and_the_parameter_of_a_model_are_named(bits: int) -> None:
    model = gpt(f"float{bits}", n_layer=2, dropout=0.1)
    weight = model.blocks[1].ffn.down.weight
    weight.data = np.where(np.arange(weight.data.size).reshape(weight.shape) == 5, np.nan, weight.data)
    ids = token_ids(2, 6)
    bad = first_bad_op(lambda: model(ids, targets=ids).loss, model.parameters())
    assert str(bad).startswith(
        "linear in blocks.1.ffn.down is given nan that no op made, in weight, parameter blocks.1.ffn.down.weight "
        f"(x: float{bits} (2, 6, 64) from "
    )


def test_a_model_that_is_well_has_no_bad_op_and_its_dropout_is_its_own() -> None:
    ids = token_ids(2, 6)
    losses = []
    for watched in (False, True):
        model = fresh_gpt(dropout=0.5)
        mt.manual_seed(7)

        def compute(model: mt.GPT = model) -> mt.Tensor:
            loss = model(ids, targets=ids).loss
            losses.append(loss.item())
            return loss

        assert (first_bad_op(compute, model.parameters()) if watched else compute().detach() and None) is None
    assert losses[0] == losses[1]


def found(compute: Any, *parameters: mt.Tensor) -> BadOp:
    bad = first_bad_op(compute, parameters)
    assert bad is not None
    return bad


def leaf(*values: float, dtype: Any = np.float32) -> mt.Tensor:
    return mt.tensor(np.array(values, dtype), requires_grad=True)


def test_stories() -> None:
    x, zero, huge = leaf(1, 200), leaf(0, 2), leaf(3e38, 3e38)
    high = np.array([True, False])
    for compute, wanted, story in (
        (lambda: x.exp().sum(), x, "exp makes infinity from finite numbers (x: float32 (2,) from 1 to 200)"),
        (lambda: (1 / x.exp()).sum(), x, "exp makes infinity from finite numbers (x: float32 (2,) from 1 to 200)"),
        (
            lambda: zero.sqrt().sum(),
            zero,
            "the backward of sqrt makes infinity from finite numbers (dout: float32 (2,) from 1 to 1; x: float32 (2,) "
            "from 0 to 2)",
        ),
        (
            lambda: F.softmax(mt.where(high & ~high, x, -math.inf), -1).sum(),
            x,
            "softmax makes nan of infinities (x: float32 (2,), 2 -inf)",
        ),
        (
            lambda: mt.where(high, x, -math.inf).sum(),
            x,
            "where is given infinity that no op made, in b (a: float32 (2,) from 1 to 200; b: -inf; condition: bool "
            "(2,))",
        ),
        (lambda: huge.sum(), huge, "sum makes infinity from finite numbers (x: float32 (2,) from 3e+38 to 3e+38)"),
        (
            lambda: (x * np.array([1, math.nan], np.float32)).sum(),
            x,
            "multiply is given nan that no op made, in b (a: float32 (2,) from 1 to 200; b: float32 (2,) from 1 to 1, "
            "1 nan)",
        ),
    ):
        assert str(found(compute, wanted)) == story


def test_gradients_that_overflow_where_they_meet() -> None:
    x = leaf(1e-20)
    bad = found(lambda: (lambda y: (y * 3e38 + y * 3e38).sum())(x * 1), x)
    assert str(bad) == (
        "the backward of multiply is given infinity that no op made, in dout (dout: float32 (1,), 1 inf; a: float32 "
        "(1,) from 1e-20 to 1e-20; b: 1)"
    )
    # In the leaf itself there is no op to blame.
    assert first_bad_op(lambda: (x * 3e38 + x * 3e38).sum(), [x]) is None


def test_what_is_no_loss_is_refused_and_the_watch_ends() -> None:
    with pytest.raises(DTypeError, match=r"^first_bad_op: compute returned a float, expected a Tensor\. Return"):
        first_bad_op(lambda: 1.0)  # type: ignore[arg-type, return-value]
    assert first_bad_op(lambda: leaf(1).sum()) is None
    assert str(found(lambda: leaf(math.nan).sum())).startswith("sum is given nan that no op made, in x (")


# --- shrinking -------------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 9)), C=st.integers(1, 9), seed=st.integers(0)
)
def test_one_element_that_overflows_is_cut_out(shape: tuple[int, int, int], C: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.uniform(1, 2, shape), rng.uniform(1, 2, (C, shape[2]))
    rows = x.reshape(-1, shape[2])
    row, column, inner = rng.integers(len(rows)), rng.integers(C), rng.integers(shape[2])
    rows[row, inner] = weight[column, inner] = 1e30
    tensors = [mt.tensor(a.astype(np.float32), requires_grad=True) for a in (x, weight)]
    small = shrunk(found(lambda: F.linear(*tensors).sum(), *tensors))
    assert not np.isfinite(small.results[0]).all()  # type: ignore[arg-type]
    assert [a.size for a in small.inputs[:2]] == [1, 1] or len({*shape, C}) < 4  # axes of one length are cut together
    assert sum(a.size for a in small.inputs[:2]) <= x.size + weight.size
    assert small.run().results[0].tobytes() == small.results[0].tobytes()  # type: ignore[union-attr]


def test_a_sum_that_overflows_keeps_what_it_takes() -> None:
    x = leaf(*[1e38] * 64)
    small = shrunk(found(lambda: x.sum(), x))
    assert small.inputs[0].shape == (4,)
    y = mt.tensor(np.full((3, 64), 1e38, np.float32), requires_grad=True)
    assert shrunk(found(lambda: y.sum(1).tanh().sum() + y.sum(1).max(), y)).inputs[0].shape == (1, 4)


def test_the_backward_shrinks_too() -> None:
    x = mt.tensor(np.linspace(0, 1, 40, dtype=np.float32).reshape(5, 8), requires_grad=True)
    small = shrunk(found(lambda: x.sqrt().sum(), x))
    assert [a.shape for a in (*small.inputs, *small.douts)] == [(1, 1), (1, 1)]
    assert "dx[0, 0] is inf, in float64 too: it has no finite value at these inputs" in report(small, {})


def test_attention_shrinks_with_its_settings() -> None:
    rng = np.random.default_rng(0)
    draws = (rng.standard_normal((2, 3, 6, 4)) * 1e20 for _ in range(3))
    q, k, v = (mt.tensor(draw.astype(np.float32), requires_grad=True) for draw in draws)
    mask = rng.random((2, 1, 6, 6)) < 0.9
    options: dict[str, Any] = {"is_causal": True, "key_lengths": [6, 5], "causal_align": "upper_left"}
    small = shrunk(found(lambda: F.scaled_dot_product_attention(q, k, v, mask, **options).sum(), q, k, v))
    assert np.isnan(small.results[0]).any()  # type: ignore[arg-type]
    (q_small, k_small, v_small), problem = small.inputs[:3], small.static["problem"]
    B, H, T, _ = q_small.shape
    assert B == H == 1
    assert problem.mask.shape[2:] == (T, k_small.shape[2])
    assert problem.key_lengths.shape == (B,)
    assert k_small.shape == v_small.shape


# --- too large -------------------------------------------------------------------------------------------


def test_an_op_that_cannot_get_its_memory_says_how_much_it_asked_for() -> None:
    x = mt.tensor(np.zeros((1 << 24, 1), np.float32))
    with pytest.raises(MemoryError) as error:
        x @ np.zeros((1, 1 << 24), np.float32)
    assert str(error.value) == (
        "matmul: there is too little memory: Unable to allocate 1.00 PiB for an array with shape (16777216, 16777216) "
        "and data type float32; shapes given: (16777216, 1), (1, 16777216). Make the batch, the sequence or the model "
        "smaller."
    )


def test_so_does_its_backward() -> None:
    op = Op("expands", lambda x: (x.sum(), None), lambda dout, saved: (np.zeros(1 << 60, np.float32),))
    with pytest.raises(MemoryError, match=r"^backward of expands: there is too little memory: .*; shapes given: \(\)"):
        op(leaf(1, 2)).backward()
