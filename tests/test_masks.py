"""Masks: every kind against its rule written as a loop, the algebra, explanations, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import masks
from minitransformer.autograd import Tensor
from minitransformer.errors import DTypeError, MaskError, RangeError, ShapeError
from minitransformer.masks import Mask

Sizes = tuple[int, int, int, int]
Rule = Callable[[int, int, int, int], bool]

KINDS = ["causal", "window", "padding", "documents", "prefix", "global", "strided", "dense", "function"]


def scalar_style(b: int, h: int, q: int, k: int) -> bool:
    if h == 1:
        return True
    return q > k and b == 0


@st.composite
def rules(draw: st.DrawFn, sizes: Sizes) -> tuple[Mask, Rule]:
    """A mask of one kind, and the same rule in plain Python, for these sizes."""
    B, _, T, S = sizes
    align = draw(st.sampled_from(["lower_right", "upper_left"] + [None] * (T == S)))
    shift = S - T if align == "lower_right" else 0
    small = st.integers(0, 4)
    kind = draw(st.sampled_from(KINDS))
    if kind == "causal":
        return masks.causal(align), lambda b, h, q, k: k <= q + shift
    if kind == "window":
        left, right = draw(st.none() | small), draw(st.none() | small)
        return (
            masks.window(left, right, align=align),
            lambda b, h, q, k: (left is None or q + shift - k <= left) and (right is None or k - q - shift <= right),
        )
    if kind == "padding":
        real = np.array(draw(st.lists(st.integers(0, 1), min_size=B * S, max_size=B * S)), int).reshape(B, S)
        return masks.padding(real), lambda b, h, q, k: real[b, k] == 1
    if kind == "documents":
        shape = draw(st.sampled_from([(S,), (B, S)]))
        n = int(np.prod(shape))
        ids = np.array(draw(st.lists(st.integers(-2, 1), min_size=n, max_size=n)), int).reshape(shape)
        rows = np.broadcast_to(ids, (B, S))
        return masks.documents(
            ids, align=align
        ), lambda b, h, q, k: 0 <= q + shift < S and rows[b, q + shift] == rows[b, k]
    if kind == "prefix":
        n = draw(small)
        return masks.prefix(n), lambda b, h, q, k: k < n
    if kind == "global":
        listed = draw(st.lists(st.integers(0, 6), max_size=3))
        return masks.global_tokens(
            listed, align=align
        ), lambda b, h, q, k: k in listed or (q + shift in listed and 0 <= q + shift < S)
    if kind == "strided":
        block, stride = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        return masks.strided(
            block, stride, align=align
        ), lambda b, h, q, k: (q + shift) // block == k // block or (k + 1) % stride == 0
    if kind == "dense":
        shape = draw(st.sampled_from([(T, S), (B, 1, 1, S), sizes, (T, 1), ()]))
        n = int(np.prod(shape))
        array = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool).reshape(shape)
        full = np.broadcast_to(array, sizes)
        return masks.dense(array), lambda b, h, q, k: full[b, h, q, k]
    return masks.from_function(scalar_style), scalar_style


SIZES = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 6), st.integers(0, 6))


@st.composite
def problems(draw: st.DrawFn, count: int) -> tuple[Sizes, list[tuple[Mask, Rule]]]:
    sizes = draw(SIZES)
    return sizes, [draw(rules(sizes)) for _ in range(count)]


def loop(rule: Rule, sizes: Sizes) -> np.ndarray:
    allowed = np.zeros(sizes, bool)
    for cell in np.ndindex(*sizes):
        allowed[cell] = rule(*cell)
    return allowed


def combined(masks_: list[Mask]) -> list[Mask]:
    a, b, c = masks_
    return [a & b, a | b, ~a, a & b & c, (a | b) & ~c, ~(a & ~b) | c, ~~a, ~(a | b)]


@given(problems(1))
def test_dense_is_the_rule_in_a_loop(problem: tuple[Sizes, list[tuple[Mask, Rule]]]) -> None:
    sizes, [(mask, rule)] = problem
    allowed = mask.dense(*sizes)
    assert (allowed.shape, allowed.dtype, allowed.flags.writeable) == (sizes, bool, False)
    np.testing.assert_array_equal(allowed, loop(rule, sizes))


@given(problems(3))
def test_operators_are_those_of_sets(problem: tuple[Sizes, list[tuple[Mask, Rule]]]) -> None:
    sizes, pairs = problem
    a, b, c = (loop(rule, sizes) for _, rule in pairs)
    expected = [a & b, a | b, ~a, a & b & c, (a | b) & ~c, ~(a & ~b) | c, a, ~(a | b)]
    for mask, cells in zip(combined([mask for mask, _ in pairs]), expected, strict=True):
        np.testing.assert_array_equal(mask.dense(*sizes), cells)


@given(problems(2))
def test_de_morgan(problem: tuple[Sizes, list[tuple[Mask, Rule]]]) -> None:
    sizes, [(a, _), (b, _)] = problem
    np.testing.assert_array_equal((~(a & b)).dense(*sizes), (~a | ~b).dense(*sizes))
    np.testing.assert_array_equal((~(a | b)).dense(*sizes), (~a & ~b).dense(*sizes))


@given(problems(3), st.integers(0, 7))
def test_why_and_show_agree_with_dense(problem: tuple[Sizes, list[tuple[Mask, Rule]]], form: int) -> None:
    (B, H, T, S), pairs = problem
    mask = masks.create_block_mask(combined([mask for mask, _ in pairs])[form], B, H, T, S)
    allowed = mask.dense(B, H, T, S)
    names = {name for part, _ in pairs for name in (repr(part), f"~{part!r}")}
    for b, h in np.ndindex(B, H):
        rows = mask.show(b=b, h=h).split("\n")[2:]
        assert [row.split()[1:] for row in rows] == np.where(allowed[b, h], "x", ".").tolist()
        for q, k in np.ndindex(T, S):
            reason = mask.why(q, k, b, h)
            assert (reason == "allowed") == allowed[b, h, q, k]
            if reason != "allowed":
                assert set(reason.removeprefix("blocked by ").split(" and ")) <= names


@given(problems(1))
def test_mask_mod_is_the_function_that_dense_evaluates(
    problem: tuple[Sizes, list[tuple[Mask, Rule]]],
) -> None:
    sizes, [(mask, rule)] = problem
    mod = mask.mask_mod(*sizes)
    for cell in np.ndindex(*sizes):  # plain Python integers too
        assert bool(mod(*cell)) == rule(*cell)


def test_why_names_the_innermost_rules_that_decide() -> None:
    near, past = masks.window(1, 0), masks.causal()
    assert near.why(3, 1) == "blocked by window(left=1, right=0)"
    assert near.why(3, 2) == "allowed"
    assert (past & near).why(3, 1) == "blocked by window(left=1, right=0)"
    assert (past & near).why(1, 3) == "blocked by causal() and window(left=1, right=0)"
    assert (near | masks.prefix(1)).why(3, 1) == "blocked by window(left=1, right=0) and prefix(1)"
    assert (~past).why(3, 1) == "blocked by ~causal()"
    assert (~(past | near)).why(3, 1) == "blocked by ~causal()"
    assert (~(past & near)).why(3, 3) == "blocked by ~causal() and ~window(left=1, right=0)"
    assert (~~past).why(1, 3) == "blocked by causal()"
    bound = masks.create_block_mask(past & near, None, None, 4, 4)
    assert bound.why(3, 1) == "blocked by window(left=1, right=0)"


def test_why_works_out_sizes_that_the_mask_does_not_know() -> None:
    assert masks.causal("lower_right").why(2, 5) == "blocked by causal(align='lower_right')"
    assert masks.padding([[1, 1, 0]]).why(7, 1) == "allowed"
    assert masks.create_block_mask(masks.causal("lower_right"), None, None, 2, 5).why(1, 4) == "allowed"


def test_repr_is_the_expression() -> None:
    mask = masks.causal() & masks.window(2, None, align="upper_left") | ~masks.prefix(1)
    assert repr(mask) == "(causal() & window(left=2, right=None, align='upper_left')) | ~prefix(1)"
    assert repr(~(masks.prefix(1) | masks.strided(2, 4))) == "~(prefix(1) | strided(block=2, stride=4))"
    assert repr(masks.padding([[True, False]])) == "padding([[1, 0]])"
    assert repr(masks.documents([0, 0, 1])) == "documents([0, 0, 1])"
    assert repr(masks.documents(np.zeros((2, 50), int))) == "documents(<int64 array (2, 50)>)"
    assert repr(masks.from_function(scalar_style)) == "from_function(scalar_style)"
    bound = masks.create_block_mask(masks.causal(), None, 2, 3, 3)
    assert repr(bound) == "create_block_mask(causal(), B=None, H=2, T=3, S=3)"


def test_repr_can_be_read_back() -> None:
    mask = ~(masks.causal("lower_right") | masks.documents([0, 1, 1])) & masks.dense([[True, False, True]])
    again = eval(repr(mask), vars(masks))
    np.testing.assert_array_equal(again.dense(1, 1, 3, 3), mask.dense(1, 1, 3, 3))


def test_show_draws_the_grid() -> None:
    assert masks.causal().show(3) == "causal(), T=3, S=3\nq\\k 0 1 2\n  0 x . .\n  1 x x .\n  2 x x x"
    assert len(masks.prefix(1).show().split("\n")) == 2 + 8
    assert masks.padding([[1, 0]]).show().split("\n")[2] == "  0 x ."
    wide = masks.causal().show(11).split("\n")
    assert wide[1] == "q\\k  0  1  2  3  4  5  6  7  8  9 10"
    assert wide[-1] == " 10" + "  x" * 11
    long = masks.causal().show(100).split("\n")
    assert (long[0], len(long)) == ("causal(), T=100, S=100, first 64 x 64 cells", 66)


def test_alignment_must_be_named_when_lengths_differ() -> None:
    for mask in (
        masks.causal(),
        masks.window(1, 1),
        masks.documents([0] * 5),
        masks.global_tokens([0]),
        masks.strided(2, 2),
    ):
        with pytest.raises(MaskError, match=r'T=3 and S=5 differ.*Pass align="lower_right"'):
            mask.dense(1, 1, 3, 5)
        with pytest.raises(MaskError, match="differ"):
            masks.create_block_mask(~mask & masks.prefix(1), None, None, 3, 5)
    with pytest.raises(MaskError, match="causal: got align='left'"):
        masks.causal("left")
    np.testing.assert_array_equal(masks.causal("lower_right").dense(1, 1, 2, 4)[0, 0], np.tri(2, 4, 2, bool))
    np.testing.assert_array_equal(masks.causal("upper_left").dense(1, 1, 2, 4)[0, 0], np.tri(2, 4, dtype=bool))


def test_a_bound_mask_has_its_sizes_only() -> None:
    bound = masks.create_block_mask(lambda b, h, q, k: q >= k, None, 2, 4, 4)
    assert bound.dense(7, 2, 4, 4).shape == (7, 2, 4, 4)
    for sizes in ((1, 3, 4, 4), (1, 2, 5, 4), (1, 2, 4, 3)):
        with pytest.raises(ShapeError, match="is made for"):
            (bound & masks.prefix(1)).dense(*sizes)
    with pytest.raises(ShapeError, match=r"create_block_mask: got B=2 on one side, B=3 on the other"):
        masks.create_block_mask(masks.padding([[1], [1]]), 3, 1, 1, 1)
    with pytest.raises(DTypeError, match="T is a NoneType"):
        masks.create_block_mask(masks.causal(), 1, 1, None, 4)  # type: ignore[arg-type]


def test_masks_of_different_sizes_do_not_combine() -> None:
    with pytest.raises(ShapeError, match=r"mask & mask: got S=2 on one side, S=3 on the other"):
        masks.padding([[1, 1]]) & masks.documents([0, 0, 0])


def test_masks_own_their_arrays_and_do_not_change() -> None:
    real, ids, cells, listed = np.ones((1, 3), int), np.zeros(3, int), np.ones((3, 3), bool), np.array([1])
    made = [
        masks.padding(real),
        masks.documents(ids),
        masks.dense(cells),
        masks.global_tokens(listed),
    ]
    before = [mask.dense(1, 1, 3, 3).copy() for mask in made]
    real[...], ids[:], cells[...], listed[...] = 0, [5, 6, 7], False, 0
    for mask, then in zip(made, before, strict=True):
        np.testing.assert_array_equal(mask.dense(1, 1, 3, 3), then)
        with pytest.raises(FrozenInstanceError):
            mask.text = "other"  # type: ignore[misc]


def test_memory_follows_the_axes_that_matter() -> None:
    lengths = (64, 16, 500, 500)
    for mask in (masks.causal(), masks.strided(8, 8) & masks.prefix(3), ~masks.window(4, 0)):
        assert mask.dense(*lengths).strides[:2] == (0, 0)
    assert masks.padding(np.ones((64, 500), int)).dense(*lengths).strides[1:3] == (0, 0)


def test_tensors_are_arrays() -> None:
    assert masks.dense(Tensor(np.eye(2, dtype=bool))).dense(1, 1, 2, 2).sum() == 2


@pytest.mark.parametrize("other", [np.ones((2, 2), bool), True, None, scalar_style])
def test_only_masks_combine(other: Any) -> None:
    for combine in (lambda m: m & other, lambda m: other & m, lambda m: m | other, lambda m: other | m):
        with pytest.raises(DTypeError, match=r"expected a mask\. Wrap arrays with masks\.dense"):
            combine(masks.causal())


def test_and_or_not_are_refused() -> None:
    with pytest.raises(DTypeError, match=r"causal\(\): a mask has no truth value\. Combine masks with & \| ~"):
        masks.causal() and masks.prefix(1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: masks.dense([[1, 0]]), DTypeError, "dense: got int64, expected bool.*mask == 1 if 1 means"),
        (
            lambda: masks.dense(np.ones((2, 2))),
            DTypeError,
            "dense: got float64, .*mask == 0 if it is additive",
        ),
        (lambda: masks.dense(np.ones((1,) * 5, bool)), ShapeError, r"dense: got shape \(1, 1, 1, 1, 1\)"),
        (
            lambda: masks.padding([[1.0, 0.0]]),
            DTypeError,
            "padding: got float64, .*1 = real token.*mask == 1",
        ),
        (lambda: masks.padding([1, 0]), ShapeError, r"attention_mask has shape \(2,\), expected \(B, S\)"),
        (lambda: masks.padding([[1, 2]]), MaskError, "values beside 0 and 1"),
        (lambda: masks.documents([0.0, 1.0]), DTypeError, "documents: ids have dtype float64"),
        (lambda: masks.documents(3), ShapeError, r"ids have shape \(\), expected \(S,\) or \(B, S\)"),
        (lambda: masks.prefix(-1), RangeError, "prefix: n is -1, expected 0 or more"),
        (lambda: masks.prefix(1.5), DTypeError, "prefix: n is a float, expected an integer"),
        (lambda: masks.prefix(True), DTypeError, "prefix: n is a bool"),
        (lambda: masks.window(-1, 0), RangeError, "window: left is -1"),
        (lambda: masks.window(0, "1"), DTypeError, "window: right is a str"),
        (lambda: masks.strided(0, 1), RangeError, "strided: block is 0, expected 1 or more"),
        (lambda: masks.strided(1, 0), RangeError, "strided: stride is 0, expected 1 or more"),
        (lambda: masks.global_tokens([0, -2]), RangeError, "global_tokens: got -2, expected 0 or more"),
        (lambda: masks.global_tokens([[0]]), ShapeError, r"global_tokens: ids have shape \(1, 1\)"),
        (lambda: masks.from_function(3), DTypeError, "from_function: got a int, expected a function"),
        (lambda: masks.causal().dense(1, 1, -1, 1), RangeError, r"causal\(\): T is -1"),
        (lambda: masks.causal().why(-1, 0), RangeError, "q is -1, expected 0 or more"),
        (lambda: masks.padding([[1, 1]]).why(0, 2), RangeError, "k is 2, expected less than 2"),
        (lambda: masks.padding([[1, 1]]).why(0, 0, b=1), RangeError, "b is 1, expected less than 1"),
        (lambda: masks.padding([[1, 1]]).show(b=1), RangeError, "b is 1, expected less than 1"),
        (lambda: masks.from_function(lambda b, h, q, k: q).dense(1, 1, 2, 2), DTypeError, "expected bool"),
    ],
)
def test_what_is_refused(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
