"""What the strategies draw, what it shrinks to, and that Hypothesis finds them quick enough."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from children import python
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

import minitransformer as mt
from minitransformer import errors
from minitransformer import functional as F
from minitransformer.models.gpt_config import _CHOICES
from minitransformer.testing import strategies
from minitransformer.testing.layouts import array_text, lay_out, layout_of


def smallest(strategy: st.SearchStrategy[Any], condition: Callable[[Any], Any]) -> Any:
    """What `condition` shrinks to, the same in every run."""
    quick = settings(max_examples=300, database=None, phases=(Phase.generate, Phase.shrink))  # nothing is explained
    return find(strategy, lambda x: bool(condition(x)), settings=quick, random=random.Random(0))


def shrinks_to(expected: Any, strategy: st.SearchStrategy[Any], condition: Callable[[Any], Any]) -> None:
    found = smallest(strategy, condition)
    expected = np.asarray(expected)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(found, expected)


def never(strategy: st.SearchStrategy[Any], condition: Callable[[Any], Any]) -> None:
    with pytest.raises(NoSuchExample):
        find(strategy, lambda x: bool(condition(x)), settings=settings(max_examples=50, database=None))


# --- shapes -----------------------------------------------------------------------------------------------


def test_shapes() -> None:
    assert smallest(strategies.shapes(), lambda s: True) == (1,)
    assert smallest(strategies.shapes(), lambda s: len(s) == 3) == (1, 1, 1)
    assert smallest(strategies.shapes(min_side=0), lambda s: 0 in s) == (0,)
    assert smallest(strategies.shapes(max_side=9), lambda s: max(s) > 5) == (6,)
    never(strategies.shapes(min_dims=2, max_dims=3, max_side=4), lambda s: not 2 <= len(s) <= 3 or max(s) > 4)


@given(strategies.broadcastable_shapes(3, min_side=0))
def test_broadcastable_shapes_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    assert len(shapes) == 3
    np.broadcast_shapes(*shapes)


def test_broadcastable_shapes_shrink() -> None:
    assert smallest(strategies.broadcastable_shapes(), lambda s: True) == ((), ())
    assert smallest(strategies.broadcastable_shapes(), lambda s: s[0] != s[1] and len(s[0]) == len(s[1])) in (
        ((2,), (1,)),
        ((1,), (2,)),
    )


# --- arrays -----------------------------------------------------------------------------------------------


def test_arrays_shrink_to_few_simple_numbers() -> None:
    shrinks_to([-1.0], strategies.arrays(), lambda a: (a < 0).any())
    shrinks_to([2.0], strategies.arrays(min_value=2, max_value=5), lambda a: True)
    shrinks_to([4], strategies.arrays(dtype=int, min_value=0, max_value=9), lambda a: a.max() > 3)
    shrinks_to([True], strategies.arrays(dtype=bool), lambda a: a.any())
    shrinks_to(np.zeros(0), strategies.arrays(strategies.shapes(min_side=0)), lambda a: not a.size)
    shrinks_to(0.0, strategies.arrays(()), lambda a: True)


def test_arrays_shrink_to_plain_memory() -> None:
    found = smallest(strategies.arrays((2, 3)), lambda a: True)
    assert found.flags.c_contiguous and found.flags.writeable


@pytest.mark.parametrize(
    "condition",
    [
        lambda a: a.flags.f_contiguous and not a.flags.c_contiguous,
        lambda a: min(a.strides) < 0,
        lambda a: 0 in a.strides,
        lambda a: not a.flags.c_contiguous and not a.flags.f_contiguous and min(a.strides) > 0,
        lambda a: not a.flags.writeable,
        lambda a: len(np.unique(a)) == a.size,
    ],
)
def test_arrays_come_in_every_layout(condition: Callable[[np.ndarray], Any]) -> None:
    assert smallest(strategies.arrays((2, 3)), condition).shape == (2, 3)
    if not condition(np.arange(6).reshape(2, 3)):
        never(strategies.arrays((2, 3), layouts=False), condition)


def test_arrays_have_extremes_only_if_asked() -> None:
    for number in (1e308, -1e308):
        found = smallest(strategies.arrays(dtype="float64", extremes=True), lambda a, n=number: (a / n > 1).any())
        assert found.shape == (1,)
    assert smallest(strategies.arrays(dtype="float32", extremes=True), lambda a: (abs(a) == 2**-126).any()).size == 1
    never(strategies.arrays(), lambda a: (abs(a) > 8).any())


@given(strategies.arrays(strategies.shapes(min_dims=0, min_side=0), extremes=True))
def test_arrays_are_finite_and_normal(a: np.ndarray) -> None:
    assert np.isfinite(a).all()
    assert not ((a != 0) & (abs(a) < np.finfo(a.dtype).tiny)).any()


@given(st.data(), st.sampled_from([(0.1, 0.3), (-3, -0.5), (-0.1, 0.7), (2, 2), (-8, 8)]))
def test_arrays_keep_their_bounds(data: st.DataObject, bounds: tuple[float, float]) -> None:
    low, high = bounds
    a = data.draw(strategies.arrays(dtype="float64", min_value=low, max_value=high))
    assert ((a >= low) & (a <= high)).all()
    if math.ceil(low) <= high:
        a = data.draw(strategies.arrays(dtype="int32", min_value=low, max_value=high))
        assert a.dtype == np.int32 and ((a >= low) & (a <= high)).all()


def test_large_arrays_are_quick_to_draw_and_not_all_alike() -> None:
    """Under all health checks, of which that for large data fails if every element is drawn."""
    distinct = []

    @settings(max_examples=100, suppress_health_check=[], database=None, derandomize=True, deadline=None)
    @given(*[strategies.arrays((2, 4, 9, 8))] * 3)
    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
        distinct.append(len(np.unique(a)) / a.size)

    run()
    assert np.mean(np.array(distinct) > 0.25) > 0.4  # the others are zeros, few numbers, repeated ones


def test_arrays_refuse_what_cannot_be_drawn() -> None:
    with pytest.raises(errors.ConfigError, match=r"the bounds are 2 and 1, expected finite and ascending ones"):
        strategies.arrays(min_value=2, max_value=1)
    with pytest.raises(errors.ConfigError, match=r"the bounds are 0 and inf"):
        strategies.arrays(min_value=0, max_value=math.inf)
    with pytest.raises(errors.ConfigError, match=r"there is no integer from 0\.2 to 0\.8"):
        strategies.arrays(dtype=int, min_value=0.2, max_value=0.8)
    with pytest.raises(errors.DTypeError, match="dtype is complex128, expected floats, integers or bool"):
        strategies.arrays(dtype=complex)


@given(strategies.tensors((2, 3), "float32", layouts=True), strategies.tensors(requires_grad=False))
def test_tensors(x: mt.Tensor, y: mt.Tensor) -> None:
    assert (x.shape, x.dtype, x.requires_grad, y.requires_grad) == ((2, 3), np.float32, True, False)
    (gradient,) = mt.grad((x * 2).sum(), [x])
    assert (gradient == 2).all()


# --- layouts ----------------------------------------------------------------------------------------------


@given(
    strategies.arrays(strategies.shapes(min_dims=0, min_side=0), st.sampled_from(["float32", "int64", "bool"])),
    st.data(),
)
def test_a_layout_changes_no_number_and_can_be_read_off(a: np.ndarray, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(a.ndim)))
    steps = data.draw(st.tuples(*[st.sampled_from([1, 2, -1, -3])] * a.ndim))
    laid = lay_out(a, order, steps)
    np.testing.assert_array_equal(laid, a)
    again = lay_out(a, *layout_of(laid))
    np.testing.assert_array_equal(again, a)
    assert [s for s, n in zip(again.strides, a.shape, strict=True) if n > 1 and a.size] == [
        s for s, n in zip(laid.strides, a.shape, strict=True) if n > 1 and a.size
    ]


def test_gaps_show_when_they_are_read() -> None:
    laid = lay_out(np.ones((2, 2)), (0, 1), (1, 2))
    memory = np.lib.stride_tricks.as_strided(laid, (2, 3), (laid.strides[0], 8))
    np.testing.assert_array_equal(np.isnan(memory), [[False, True, False]] * 2)


def test_a_stride_of_zero_repeats_the_first_entry() -> None:
    np.testing.assert_array_equal(lay_out(np.arange(6).reshape(2, 3), (0, 1), (1, 0)), [[0, 0, 0], [3, 3, 3]])


@given(
    strategies.arrays(
        strategies.shapes(min_dims=0, min_side=0), st.sampled_from(["float32", "float64", "int64", "int32", "bool"])
    ),
    st.booleans(),
)
def test_the_text_of_an_array_is_exact(a: np.ndarray, infinite: bool) -> None:
    if infinite and a.dtype.kind == "f":
        a = np.where(a > 0, -np.inf, a / a.dtype.type(3)).astype(a.dtype)
    text = array_text(a)
    again = eval(text)
    assert (again.dtype, again.shape) == (a.dtype, a.shape)
    np.testing.assert_array_equal(again, a)
    assert max(map(len, text.splitlines())) <= 120


# --- masks ------------------------------------------------------------------------------------------------


def test_masks_shrink_to_the_smallest() -> None:
    masks = strategies.attention_masks()
    shrinks_to([[True]], masks, lambda m: True)
    shrinks_to([[False]], masks, lambda m: m.dtype == bool and not m.any(axis=-1).all())
    shrinks_to([[-np.inf]], masks, lambda m: m.dtype != bool and np.isneginf(m).all(axis=-1).any())
    assert smallest(masks, lambda m: m.ndim == 4 and m.dtype == bool and m.any() and not m.all()).size == 2


@given(
    st.tuples(*[st.integers(1, 4)] * 4).flatmap(
        lambda s: st.tuples(st.just(s), strategies.attention_masks(s, empty_rows=False))
    )
)
def test_masks_broadcast_and_are_taken_by_attention(drawn: tuple[tuple[int, ...], np.ndarray]) -> None:
    (B, H, T, S), mask = drawn
    may = mask if mask.dtype == bool else ~np.isneginf(mask)
    assert np.broadcast_to(may, (B, H, T, S)).any(axis=-1).all()
    q, k = np.ones((B, H, T, 2)), np.ones((B, H, S, 2))
    out = F.scaled_dot_product_attention(q, k, k, mask)
    np.testing.assert_allclose(out.numpy(), 1)


def test_kinds_of_masks() -> None:
    never(strategies.attention_masks(kinds=["bool"]), lambda m: m.dtype != bool)
    never(strategies.attention_masks(kinds=["float"]), lambda m: m.dtype != np.float64)
    with pytest.raises(errors.ConfigError, match="kinds is 'int', expected one of"):
        strategies.attention_masks(kinds=["int"])
    with pytest.raises(errors.ConfigError, match="kinds is empty"):
        strategies.attention_masks(kinds=[])


# --- batches and configs ----------------------------------------------------------------------------------


@given(strategies.padded_batches(7, min_len=0), strategies.padded_batches(side="left"))
def test_padded_batches(batch: Any, left: Any) -> None:
    assert left.side == "left"
    for ids, real, side in (batch, left):
        assert ids.shape == real.shape and ids.shape[1] >= 1
        assert np.isin(real, (0, 1)).all()
        ordered = np.sort(real, axis=1) if side == "left" else -np.sort(-real, axis=1)
        np.testing.assert_array_equal(real, ordered)
        assert len(np.unique(ids[real == 0])) <= 1
    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < 7


def test_batches_shrink() -> None:
    shrinks_to([[0]], strategies.token_batches(), lambda b: True)
    assert smallest(strategies.token_batches(), lambda b: b.max() > b.min()).size == 2
    ragged = smallest(strategies.ragged_batches(), lambda rows: len({len(row) for row in rows}) > 1)
    assert sorted(map(len, ragged)) == [1, 2]
    padded = smallest(strategies.padded_batches(min_len=0), lambda b: not b.attention_mask.all())
    assert (padded.input_ids.tolist(), padded.attention_mask.tolist()) == ([[0]], [[0]])
    never(strategies.padded_batches(), lambda b: not b.attention_mask.any(axis=1).all())
    assert smallest(strategies.padded_batches(), lambda b: b.side == "left").input_ids.tolist() == [[0]]


def test_batches_refuse_lengths_that_exclude_each_other() -> None:
    with pytest.raises(errors.ConfigError, match="ragged_batches: min_len is 9, expected at most max_len, 8"):
        strategies.padded_batches(min_len=9)
    with pytest.raises(errors.ConfigError, match="token_batches: vocab_size is 0"):
        strategies.token_batches(0)


def test_model_configs_shrink() -> None:
    config = smallest(strategies.model_configs(), lambda c: True)
    assert (config.n_layer, config.n_head, config.n_embd, config.positions) == (1, 1, 1, "learned")


def test_every_option_of_a_model_is_drawn() -> None:
    drawn: dict[str, set[Any]] = {field.name: set() for field in dataclasses.fields(mt.GPTConfig)}

    @settings(max_examples=200, database=None, derandomize=True)
    @given(strategies.model_configs())
    def run(config: mt.GPTConfig) -> None:
        for name, values in drawn.items():
            values.add(getattr(config, name))

    run()
    assert {name: values for name, values in drawn.items() if name in _CHOICES} == {
        name: set(choices) for name, choices in _CHOICES.items()
    }
    assert [name for name, values in drawn.items() if len(values) < 2] == []
    assert all(None in drawn[name] for name in ("n_kv_head", "n_inner", "window", "positions"))


@given(strategies.model_configs(vocab_size=9, n_head=2, dropout=0.0), strategies.token_batches(9, max_len=3))
def test_models_of_drawn_configs_run(config: mt.GPTConfig, ids: np.ndarray) -> None:
    assert (config.vocab_size, config.n_head, config.dropout) == (9, 2, 0.0)
    logits = mt.GPT(config)(ids[:, : config.block_size]).logits
    assert logits is not None and np.isfinite(logits.numpy()).all()


@given(strategies.model_configs(n_embd=6, positions="rope", attention="window"))
def test_fixed_fields_leave_the_rest_possible(config: mt.GPTConfig) -> None:
    assert (config.n_embd, config.positions) == (6, "rope") and config.window is not None


def test_the_health_checks_pass() -> None:
    """All of them, on everything here at its default size."""

    @settings(max_examples=20, suppress_health_check=[], database=None, deadline=None)
    @given(
        st.tuples(
            strategies.arrays(),
            strategies.tensors(),
            strategies.attention_masks(),
            strategies.attention_problems(),
            strategies.padded_batches(),
            strategies.model_configs(),
        )
    )
    def run(drawn: tuple[Any, ...]) -> None:
        assert len(drawn) == 6

    run()


def test_without_hypothesis_the_extra_is_named() -> None:
    """And what needs no Hypothesis works without."""
    program = """
import sys
sys.modules["hypothesis"] = None
import minitransformer.testing as testing
assert callable(testing.gradcheck) and callable(testing.check_backends)
for name in ("strategies", "attention_problems"):
    try:
        getattr(testing, name)
    except ImportError as error:
        print(error)
"""
    lines = python(program).splitlines()
    assert lines == [
        f"testing.{name}: needs the package 'hypothesis', which is not installed. "
        'Run: pip install "minitransformer[test]"'
        for name in ("strategies", "attention_problems")
    ]
