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
from minitransformer.kernels.decode.step import Blocks, BlockWeights, Step

CALLS = range(len(KERNEL_CALLS["decode"]["step_blocks"](np.random.default_rng(0), np.float64)))


def double(value: Any) -> Any:
    """The same in float64, in named tuples and blocks too."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float64) if value.dtype.kind == "f" else value
    if isinstance(value, tuple):
        parts = [double(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, Blocks):
        return remade(value, [double(weights) for weights in value.weights], np.dtype(np.float64))
    return value


def remade(blocks: Blocks, weights: Any, dtype: Any, **changes: Any) -> Blocks:
    """Other weights, settings or dtype."""
    settings = {"num_heads": blocks.H, "num_kv_heads": blocks.K, "norm": blocks.norm, "activation": blocks.activation}
    return Blocks(weights, dtype, **{**settings, **changes})


@pytest.mark.parametrize("number", CALLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_as_the_reference(dtype: Any, number: int) -> None:
    call = KERNEL_CALLS["decode"]["step_blocks"](np.random.default_rng(5), dtype)[number][0]
    ours, plain, exact = deepcopy(call), deepcopy(call), double(deepcopy(call))
    cpu.step_blocks(*ours)
    reference.step_blocks(*plain)
    reference.step_blocks(*exact)
    for a, b, c in zip((ours[0], *ours[2:4]), (plain[0], *plain[2:4]), (exact[0], *exact[2:4]), strict=True):
        scale = abs(c).max(initial=0.0)
        assert abs(a - c).max(initial=0.0) <= 2 * abs(b - c).max(initial=0.0) + 16 * np.finfo(dtype).eps * scale


@pytest.mark.parametrize("module", [cpu, reference])
def test_nan_stays_nan_in_its_row(module: Any) -> None:
    x, *rest = KERNEL_CALLS["decode"]["step_blocks"](np.random.default_rng(5), np.float32)[0][0]
    x[1, 3] = np.nan
    module.step_blocks(x, *rest)
    assert np.isnan(x[1]).all() and np.isfinite(x[0]).all()


def test_a_row_that_sees_nothing_attends_to_nothing() -> None:
    x, weights, keys, values, step = KERNEL_CALLS["decode"]["step_blocks"](np.random.default_rng(5), np.float64)[0][0]
    blind = step._replace(visible=np.zeros((2, step.stored + 1), bool))
    values[:] = 1e30  # would show
    for module in (cpu, reference):
        row = x.copy()
        module.step_blocks(row, weights, keys, values.copy(), blind)
        assert abs(row).max() < 1e3


def _wrong(**changes: Any) -> tuple[Any, ...]:
    """A right call of which some things are replaced: parts of Step, Blocks or BlockWeights, or whole arguments."""
    x, blocks, keys, values, step = KERNEL_CALLS["decode"]["step_blocks"](np.random.default_rng(5), np.float64)[0][0]
    call = {"x": x, "keys": keys, "values": values}
    call.update({name: value for name, value in changes.items() if name in call})
    weights = [blocks.weights[0]._replace(**{n: v for n, v in changes.items() if n in BlockWeights._fields})]
    settings = {n: v for n, v in changes.items() if n in ("num_heads", "num_kv_heads", "norm", "activation")}
    blocks = remade(blocks, weights * changes.get("layers", 1), blocks.dtype, **settings)
    step = step._replace(**{n: v for n, v in changes.items() if n in Step._fields})
    return call["x"], blocks, call["keys"], call["values"], step


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
        {"visible": np.ones((2, 5), bool)},
        {"slopes": np.ones(3)},
        {"rotation": (np.ones((2, 3)), np.ones((2, 4)))},
        {"norm": "batch"},
        {"activation": "elu"},
    ],
    ids=str,
)
def test_refused(changes: dict[str, Any], module: Any) -> None:
    with pytest.raises(MiniTransformerError, match=r"^step_blocks: "):
        module.step_blocks(*_wrong(**changes))


@pytest.mark.parametrize("name", ["x", "keys", "values"])
def test_what_is_written_must_be_writable_and_contiguous(name: str) -> None:
    right = dict(zip(("x", "blocks", "keys", "values"), _wrong(), strict=False))
    for array in (np.asfortranarray(right[name]), right[name].astype(np.float16), right[name].copy()):
        if array.flags.carray and array.dtype == np.float64:
            array.flags.writeable = False
        with pytest.raises(MiniTransformerError, match=f"step_blocks: {name} is float"):
            cpu.step_blocks(*_wrong(**{name: array}))


def test_a_copy_reads_its_own_weights() -> None:
    """Blocks know where their arrays are; those of a copy are elsewhere."""
    x, blocks, keys, values, step = KERNEL_CALLS["decode"]["step_blocks"](np.random.default_rng(5), np.float64)[0][0]
    right = x.copy()
    cpu.step_blocks(right, blocks, keys.copy(), values.copy(), step)
    for copy in (deepcopy(blocks), pickle.loads(pickle.dumps(blocks))):
        for array in copy.weights[0]:
            assert not any(np.shares_memory(array, other) for other in blocks.weights[0])
        row = x.copy()
        cpu.step_blocks(row, copy, keys.copy(), values.copy(), step)
        assert row.tobytes() == right.tobytes()
        copy.weights[0].norm1[:] = 0
        cpu.step_blocks(row, copy, keys.copy(), values.copy(), step)
        assert row.tobytes() != right.tobytes()


def test_blocks_hold_the_very_arrays_they_read() -> None:
    _, blocks, *_ = KERNEL_CALLS["decode"]["step_blocks"](np.random.default_rng(5), np.float64)[0][0]
    own = list(blocks.weights[0])
    assert blocks.hold(own)
    assert not blocks.hold([own[0].copy(), *own[1:]]) and not blocks.hold(own[:-1])
    gaps = blocks.weights[0]._replace(qkv=np.asfortranarray(blocks.weights[0].qkv))
    assert not remade(blocks, [gaps], blocks.dtype).hold(list(gaps))  # it has read a copy
