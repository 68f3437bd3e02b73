"""Every op against complex-step differentiation, at the calls of the gradient table and at drawn shapes.

`checker.check` says what is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from checker import Case, case, check
from gradient_attention import attention, squash
from gradient_table import TABLE, normal
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minitransformer.autograd import OPS

INF = np.inf


def missing(lines: dict[str, list[Case]]) -> list[str]:
    """Ops without a line that compares something, and lines without an op."""
    covered = {name for name, cases in lines.items() if any(not c.empty for c in cases)}
    return sorted(set(OPS) ^ covered)


@pytest.mark.parametrize(
    ("name", "given"),
    [pytest.param(n, c, id=f"{n}-{i}") for n, cases in TABLE.items() for i, c in enumerate(cases)],
)
def test_op(name: str, given: Case) -> None:
    check(name, given)


def test_every_op_has_a_line_and_every_line_an_op() -> None:
    assert missing(TABLE) == []
    assert missing({**TABLE, "no_such_op": TABLE["exp"]}) == ["no_such_op"]
    assert missing({n: c for n, c in TABLE.items() if n != "exp"}) == ["exp"]
    assert missing({**TABLE, "exp": [case(normal(0), empty=True)]}) == ["exp"]


# ---- drawn shapes -----------------------------------------------------------------------------------

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape)) for shape in shapes]


def is_empty(*shapes: tuple[int, ...]) -> bool:
    return all(0 in shape for shape in shapes)


@given(
    st.sampled_from(["add", "subtract", "multiply", "divide"]),
    hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=3),
    st.integers(0, 99),
)
def test_arithmetic_at_drawn_shapes(name: str, drawn_shapes: Any, seed: int) -> None:
    a, b = drawn(seed, *drawn_shapes.input_shapes)
    check(name, case(a, np.asarray(b + 5 * np.sign(b)), empty=is_empty(a.shape, b.shape)))


@given(st.sampled_from(["sum", "mean", "max", "min"]), SHAPES, st.booleans(), st.data())
def test_reductions_at_drawn_axes(name: str, shape: tuple[int, ...], keepdim: bool, data: st.DataObject) -> None:
    dim = data.draw(st.none() | st.lists(st.integers(0, len(shape) - 1), unique=True).map(tuple)) if shape else None
    axes = range(len(shape)) if dim is None else dim
    if any(shape[axis] == 0 for axis in axes) and name != "sum":
        shape = tuple(size or 1 for size in shape)
    x = np.random.default_rng(3).permutation(int(np.prod(shape))).reshape(shape) / 4
    check(name, case(np.asarray(x), dim=dim, keepdim=keepdim, empty=is_empty(shape)))


@given(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4), st.data())
def test_getitem_at_drawn_indices(shape: tuple[int, ...], data: st.DataObject) -> None:
    index = data.draw(
        hnp.basic_indices(shape, allow_newaxis=True)
        | hnp.integer_array_indices(shape)
        | hnp.arrays(bool, shape[0], elements=st.booleans())
    )
    check("getitem", case(*drawn(0, shape), index=index))


@given(st.data(), st.integers(0, 99))
def test_products_at_drawn_shapes(data: st.DataObject, seed: int) -> None:
    core = data.draw(
        hnp.mutually_broadcastable_shapes(signature="(n?,k),(k,m?)->(n?,m?)", max_dims=2, min_side=0, max_side=3)
    )
    a, b = drawn(seed, *core.input_shapes)
    check("matmul", case(a, b, empty=is_empty(a.shape, b.shape)))


@given(st.permutations("abcd"), st.integers(0, 4), st.integers(0, 4), st.sets(st.sampled_from("abcd")), st.data())
def test_einsum_at_drawn_equations(
    letters: list[str], first: int, second: int, kept: set[str], data: st.DataObject
) -> None:
    terms = ["".join(letters[:first]), "".join(sorted(letters[second:]))]
    result = "".join(sorted(kept & set("".join(terms)), reverse=True))
    sizes = {c: data.draw(st.integers(1, 3)) for c in "abcd"}
    operands = drawn(first, *(tuple(sizes[c] for c in term) for term in terms))
    check("einsum", case(*operands, equation=f"{','.join(terms)}->{result}"))


@given(st.sampled_from(["softmax", "log_softmax"]), SHAPES.filter(len), st.data())
def test_softmax_at_drawn_axes(name: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    check(name, case(*drawn(1, shape), dim=dim, empty=is_empty(shape)))


@given(st.data())
def test_embedding_at_drawn_ids(data: st.DataObject) -> None:
    V, C = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 3)))
    ids = data.draw(hnp.arrays(np.int64, SHAPES, elements=st.integers(0, V - 1)))
    check("embedding", case(*drawn(V, (V, C)), ids))


@given(st.data())
def test_cross_entropy_at_drawn_targets(data: st.DataObject) -> None:
    V = data.draw(st.integers(1, 5))
    targets = data.draw(hnp.arrays(np.int64, SHAPES, elements=st.sampled_from([-100, *range(V)])))
    static = {
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.2])),
    }
    check("cross_entropy", case(*drawn(V, (*targets.shape, V)), targets, **static, empty=0 in targets.shape))


@given(st.data(), st.booleans())
def test_attention_at_drawn_problems(data: st.DataObject, weights: bool) -> None:
    """Every mixture of the options that combine by "and"."""
    small = st.integers(1, 4)
    B, T, S, D, Dv, K = (data.draw(small) for _ in range(6))
    K = min(K, 2)
    H = K * data.draw(st.integers(1, 2))
    reach = st.none() | st.integers(0, 4)
    cells = st.tuples(*(st.sampled_from([1, n]) for n in (B, H, T, S)))
    options: dict[str, Any] = {
        "is_causal": data.draw(st.booleans()),
        "causal_align": data.draw(st.sampled_from(["lower_right", "upper_left"])),
        "window_size": (data.draw(reach), data.draw(reach)),
        "key_lengths": data.draw(st.none() | st.lists(st.integers(0, S), min_size=B, max_size=B)),
        "softcap": data.draw(st.sampled_from([0.0, 2.0])),
        "alibi_slopes": data.draw(st.none() | st.just([0.5] * H)),
        "mask": data.draw(st.none() | hnp.arrays(bool, cells, elements=st.booleans())),
        "bias": data.draw(st.none() | hnp.arrays(np.float64, cells, elements=st.sampled_from([0.5, -1.0, -INF]))),
        "score_mod": data.draw(st.none() | st.just(squash)),
        "dropout_p": 0.0 if weights else data.draw(st.sampled_from([0.0, 0.5])),
    }
    name = "attention_weights" if weights else "attention"
    check(name, attention(B, H, T, S, D, Dv, K, weights=weights, **options))
