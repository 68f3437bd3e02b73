"""One token through a block: the compiled kernel against the reference, the reference against the whole block."""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from kernel_calls import CALLS as KERNEL_CALLS

from minitransformer.errors import MiniTransformerError
from minitransformer.kernels.decode import cpu, reference
from minitransformer.kernels.decode.step import BlockWeights, HeadWeights, Step, Weights

CALLS = range(len(KERNEL_CALLS["decode"]["next_logits"](np.random.default_rng(0), np.float64)))


def double(value: Any) -> Any:
    """The same in float64, in named tuples and weights too."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64) if value.dtype.kind == "f" else value
    if isinstance(value, tuple):
        parts = [double(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Weights):
        return remade(value, [double(block) for block in value.blocks], double(value.head), np.dtype(np.float64))
    return value


def remade(weights: Weights, blocks: Any, head: HeadWeights, dtype: Any, **changes: Any) -> Weights:
    """Other arrays, settings or dtype."""
    settings = {"num_heads": weights.H, "num_kv_heads": weights.K}
    settings |= {"norm": weights.norm, "activation": weights.activation}
    return Weights(blocks, head, dtype, **{**settings, **changes})


@pytest.mark.parametrize("number", CALLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_as_the_reference(dtype: Any, number: int) -> None:
    call = KERNEL_CALLS["decode"]["next_logits"](np.random.default_rng(5), dtype)[number][0]
    calls = deepcopy(call), deepcopy(call), double(deepcopy(call))  # ours, the reference, and that in float64
    results = [kernel(*it) for kernel, it in zip((cpu.next_logits, *2 * [reference.next_logits]), calls, strict=True)]
    for a, b, c in zip(*((result, it[0], *it[2:4]) for result, it in zip(results, calls, strict=True)), strict=True):
        scale = abs(c).max(initial=0.0)
        assert abs(a - c).max(initial=0.0) <= 2 * abs(b - c).max(initial=0.0) + 16 * np.finfo(dtype).eps * scale


@pytest.mark.parametrize("module", [cpu, reference])
def test_nan_stays_nan_in_its_row(module: Any) -> None:
    x, *rest = KERNEL_CALLS["decode"]["next_logits"](np.random.default_rng(5), np.float32)[0][0]
    x[1, 3] = np.nan
    logits = module.next_logits(x, *rest)
    for rows in (x, logits):
        assert np.isnan(rows[1]).all() and np.isfinite(rows[0]).all()


def test_a_row_that_sees_nothing_attends_to_nothing() -> None:
    x, weights, keys, values, step = KERNEL_CALLS["decode"]["next_logits"](np.random.default_rng(5), np.float64)[0][0]
    blind = step._replace(visible=np.zeros((2, step.stored + 1), bool))
    values[:] = 1e30  # would show
    for module in (cpu, reference):
        row = x.copy()
        module.next_logits(row, weights, keys, values.copy(), blind)
        assert abs(row).max() < 1e3


def _wrong(**changes: Any) -> tuple[Any, ...]:
    """A right call of which some things are replaced: parts of Step or of the weights, or whole arguments."""
    x, weights, keys, values, step = KERNEL_CALLS["decode"]["next_logits"](np.random.default_rng(5), np.float64)[0][0]
    call = {"x": x, "keys": keys, "values": values}
    call.update({name: value for name, value in changes.items() if name in call})
    blocks = [weights.blocks[0]._replace(**{n: v for n, v in changes.items() if n in BlockWeights._fields})]
    head = weights.head._replace(**{n: v for n, v in changes.items() if n in HeadWeights._fields})
    settings = {n: v for n, v in changes.items() if n in ("num_heads", "num_kv_heads", "activation")}
    if "kind" in changes:
        settings["norm"] = changes["kind"]
    weights = remade(weights, blocks * changes.get("layers", 1), head, weights.dtype, **settings)
    step = step._replace(**{n: v for n, v in changes.items() if n in Step._fields})
    return call["x"], weights, call["keys"], call["values"], step


@pytest.mark.parametrize("module", [cpu, reference])
@pytest.mark.parametrize(
    "changes",
    [
        {"x": np.ones((2, 17))},
        {"x": np.ones(16)},
        {"x": np.ones((3, 16))},
        {"keys": np.ones((1, 2, 2, 9, 7))},
        {"keys": np.ones((2, 2, 9, 8))},
        {"values": np.ones((1, 2, 2, 8, 8))},
        {"keys": np.ones((1, 2, 3, 9, 8)), "values": np.ones((1, 2, 3, 9, 8))},
        {"layers": 0},
        {"layers": 2},
        {"stored": 9},
        {"stored": -1},
        {"num_heads": 0},
        {"num_kv_heads": 3},
        {"qkv": np.ones((48, 15))},
        {"up_bias": np.ones(32)},
        {"norm": np.ones(17)},
        {"norm_bias": np.ones(17)},
        {"head": np.ones((5, 17))},
        {"head": np.ones(16)},
        {"visible": np.ones((2, 5), bool)},
        {"slopes": np.ones(3)},
        {"rotation": (np.ones((2, 3)), np.ones((2, 4)))},
        {"kind": "batch"},
        {"activation": "elu"},
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], module: Any) -> None:
    with pytest.raises(MiniTransformerError, match=r"^next_logits: "):
        module.next_logits(*_wrong(**changes))


@pytest.mark.parametrize("name", ["x", "keys", "values"])
def test_what_is_written_must_be_writable_and_contiguous(name: str) -> None:
    right = dict(zip(("x", "weights", "keys", "values"), _wrong(), strict=False))
    for array in (np.asfortranarray(right[name]), right[name].astype(np.float16), right[name].copy()):
        if array.flags.carray and array.dtype == np.float64:
            array.flags.writeable = False
        with pytest.raises(MiniTransformerError, match=f"next_logits: {name} is float"):
            cpu.next_logits(*_wrong(**{name: array}))


def test_a_copy_reads_its_own_weights() -> None:
    """Weights know where their arrays are; those of a copy are elsewhere."""
    x, weights, keys, values, step = KERNEL_CALLS["decode"]["next_logits"](np.random.default_rng(5), np.float64)[0][0]
    right = x.copy()
    cpu.next_logits(right, weights, keys.copy(), values.copy(), step)
    for copy in (deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        for array in (*copy.blocks[0], *copy.head):
            assert not any(np.shares_memory(array, other) for other in (*weights.blocks[0], *weights.head))
        row = x.copy()
        cpu.next_logits(row, copy, keys.copy(), values.copy(), step)
        assert row.tobytes() == right.tobytes()
        copy.blocks[0].norm1[:] = 0
        cpu.next_logits(row, copy, keys.copy(), values.copy(), step)
        assert row.tobytes() != right.tobytes()


def test_weights_of_another_layout_or_dtype_are_the_same_weights() -> None:
    x, weights, *rest = KERNEL_CALLS["decode"]["next_logits"](np.random.default_rng(5), np.float64)[0][0]
    block, head = weights.blocks[0], weights.head
    gaps = block._replace(qkv=np.asfortranarray(block.qkv), down_bias=np.repeat(block.down_bias, 2)[::2])
    other = remade(weights, [gaps], head._replace(norm=head.norm.astype(np.longdouble)), weights.dtype)
    right = cpu.next_logits(x.copy(), weights, *deepcopy(rest))
    assert cpu.next_logits(x.copy(), other, *deepcopy(rest)).tobytes() == right.tobytes()
