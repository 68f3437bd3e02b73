"""The gradient table: every op against complex-step differentiation, at the shapes where ops go wrong.

An op that is added needs its line here; `checker.check` says what is checked.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from checker import Case, case, check
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minitransformer.autograd import OPS, register
from minitransformer.ops.attention import make_problem
from minitransformer.random import DrawKey

RNG = np.random.default_rng(1)
KEY = DrawKey(seed=5, step=3, site=17, first_row=2)
INF = np.inf


def normal(*shape: int) -> np.ndarray:
    return np.asarray(RNG.standard_normal(shape))


def positive(*shape: int) -> np.ndarray:
    return np.asarray(0.5 + RNG.random(shape))


def apart(*shape: int) -> np.ndarray:
    """Numbers of both signs, no two closer than 0.1 and none near 0: no step crosses a kink."""
    size = int(np.prod(shape))
    return np.asarray(RNG.permutation(np.arange(size) - size // 2 + 0.5).reshape(shape) / 5)


def ints(*shape: int, high: int) -> np.ndarray:
    return RNG.integers(0, high, shape)


PAIRS = [((3, 4), (3, 4)), ((5,), (3, 5)), ((2, 1, 3), (4, 1)), ((), (2, 3)), ((), ()), ((1, 1), (1,)), ((0, 3), (1, 3))]


def pairs(make: Any, second: Any = None) -> list[Case]:
    """Broadcast either way, 0-d, and a Python number on each side."""
    second = second or make
    return [
        *(case(make(*a), second(*b)) for a, b in PAIRS),
        *(case(make(*b), second(*a)) for a, b in PAIRS[1:4]),
        case(make(3), 2.5),
        case(2.5, second(3)),
        case(make(0, 2), second(0, 2), empty=True),
    ]


def unary(make: Any) -> list[Case]:
    return [case(make(3, 5)), case(make(1)), case(make()), case(make(2, 1, 7)), case(make(0, 3), empty=True)]


def far(*extra: float) -> Case:
    """The tails and the middle of an activation."""
    return case(np.array([-30.0, -6.5, -3.0, -0.7, -1e-3, 1e-3, 0.4, 2.0, 5.5, 30.0, *extra]))


def reductions(make: Any) -> list[Case]:
    return [
        case(make(3, 4)),
        case(make(2, 3, 4), dim=1),
        case(make(2, 3, 4), dim=-1, keepdim=True),
        case(make(2, 3, 4), dim=(0, 2)),
        case(make(2, 3), dim=(), keepdim=True),
        case(make()),
        case(make(1, 1), dim=0),
        case(make(0, 3), dim=1, empty=True),
    ]


def softmaxes() -> list[Case]:
    return [
        case(normal(3, 5)),
        case(normal(2, 3, 4), dim=1),
        case(normal(4, 2), dim=0),
        case(normal(1)),
        case(normal(2, 1), dim=-1),
        case(100 * normal(3, 4)),
        case(np.array([[1.0, -INF, 2.0], [-INF, 0.5, -INF]])),
        case(normal(0, 3), empty=True),
        case(normal(3, 0), empty=True),
    ]


def attention(
    B: int = 2,
    H: int = 2,
    T: int = 4,
    S: int | None = None,
    D: int = 3,
    Dv: int | None = None,
    K: int | None = None,
    *,
    bias: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    weights: bool = False,
    empty: bool = False,
    **options: Any,
) -> Case:
    """A case of `attention`, or of `attention_weights` with the log-sum-exp as an input of its own."""
    S, K = T if S is None else S, H if K is None else K
    q, k, v = normal(B, H, T, D), normal(B, K, S, D), normal(B, K, S, D if Dv is None else Dv)
    problem = make_problem("attention", q, k, v, mask, enable_gqa=K != H, **options)
    if problem.dropout_p:
        problem = problem._replace(dropout_key=KEY)
    if not weights:
        return case(q, k, v, bias, problem=problem, empty=empty)
    (_, lse), _ = OPS["attention"].forward(q, k, v, bias, problem=problem)
    return case(q, k, lse, bias, problem=problem, empty=empty)


def some_mask(*shape: int) -> np.ndarray:
    """Half of all cells, and nothing for the first query."""
    mask = RNG.random(shape) < 0.5
    mask[..., -1] = True
    mask[..., 0, :] = False
    return mask


def some_bias(*shape: int) -> np.ndarray:
    """Finite numbers, a few -inf, and for the last query nothing else."""
    bias = np.where(RNG.random(shape) < 0.3, -INF, RNG.standard_normal(shape))
    bias[..., 0] = 0.25
    bias[..., -1, :] = -INF
    return bias


def squash(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score * np.cos(score) + 0.1 * (q - k) + 0.3 * h


def squash_grad(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return np.cos(score) - score * np.sin(score)


def relative(score: Any, b: Any, h: Any, q: Any, k: Any, table: np.ndarray) -> Any:
    return 0.5 * score + table[q - k + 3]


ATTENTION: list[dict[str, Any]] = [
    {},
    {"T": 3, "S": 5, "Dv": 2, "D": 4},
    {"T": 1, "S": 1, "B": 1, "H": 1, "D": 1},
    {"H": 4, "K": 2, "T": 3},
    {"H": 3, "K": 1, "T": 3, "S": 4},
    {"is_causal": True},
    {"is_causal": True, "T": 3, "S": 5, "causal_align": "lower_right"},
    {"is_causal": True, "T": 5, "S": 3, "causal_align": "lower_right"},  # the first two queries see nothing
    {"is_causal": True, "T": 3, "S": 5, "causal_align": "upper_left"},
    {"window_size": (1, 0)},
    {"window_size": (1, 2), "T": 5},
    {"window_size": (None, 0), "T": 3, "S": 4, "causal_align": "lower_right"},
    {"window_size": (0, None), "T": 4, "S": 2, "causal_align": "upper_left"},
    {"key_lengths": [0, 3]},
    {"key_lengths": [1, 4], "is_causal": True, "causal_align": "lower_right"},
    {"key_lengths": [2, 4], "is_causal": True, "causal_align": "upper_left", "T": 5},
    {"cu_seqlens": [0, 2, 2, 5], "B": 1, "T": 5},
    {"cu_seqlens": [0, 1, 4], "B": 1, "is_causal": True},
    {"mask": some_mask(4, 4)},
    {"mask": some_mask(2, 1, 4, 4)},
    {"mask": some_mask(2, 2, 4, 4), "is_causal": True},
    {"mask": np.zeros((4, 4), bool)},
    {"mask": np.array([True, False, True, True])},
    {"bias": normal(4, 4)},
    {"bias": normal(4)},
    {"bias": normal(2, 1, 1, 4)},
    {"bias": normal(1, 2, 4, 1)},
    {"bias": some_bias(2, 2, 4, 4)},
    {"bias": some_bias(4, 4), "is_causal": True, "H": 4, "K": 2},
    {"softcap": 1.5},
    {"softcap": 0.7, "bias": some_bias(4, 4), "window_size": (2, 1)},
    {"alibi_slopes": [0.5, 0.25]},
    {"alibi_slopes": [0.5, 0.25], "is_causal": True, "T": 3, "S": 5, "causal_align": "lower_right"},
    {"alibi_slopes": [0.5, 0.25], "key_lengths": [2, 4], "causal_align": "lower_right", "softcap": 2.0},
    {"scale": 0.3},
    {"scale": -1.5},
    {"score_mod": squash},
    {"score_mod": squash, "score_mod_grad": squash_grad},
    {"score_mod": squash, "softcap": 2.0, "is_causal": True, "bias": some_bias(4, 4)},
    {"score_mod": relative, "buffers": (np.arange(7.0) / 5,)},
    {"T": 0, "S": 3},
    {"T": 3, "S": 0},
    {"B": 0, "empty": True},
]


def table() -> dict[str, list[Case]]:
    """Op -> its cases."""
    lines: dict[str, list[Case]] = {}
    for name in ("add", "subtract", "multiply"):
        lines[name] = pairs(normal)
    lines["divide"] = pairs(normal, positive)
    lines["power"] = [
        *pairs(positive, normal),
        *(case(normal(2, 3), b) for b in (2, 3.0, -1, -2.0, 1, 0)),
        case(np.array([0.0, 1.5]), 2.0),
        case(normal(4), np.array([0, 1, 2, 3], np.int8)),
        case(3, normal(2)),
    ]
    lines["maximum"] = [case(apart(2, 3), apart(2, 3) + 0.05), case(apart(4), 0.0), case(0.0, apart(2, 2))]
    lines["maximum"] += [case(apart(3, 1), apart(4) + 0.05), case(apart(), 5.0)]
    lines["minimum"] = lines["maximum"]
    lines["absolute"] = unary(apart)
    for name in ("exp", "sin", "cos"):
        lines[name] = unary(normal)
    lines["log"] = lines["sqrt"] = unary(positive)
    lines["cast"] = [
        case(normal(2, 3), dtype=np.dtype(t), on_complex={"dtype": np.dtype(np.complex128)})
        for t in (np.float64, np.float32)
    ]

    for name in ("sigmoid", "tanh", "silu"):
        lines[name] = [*unary(normal), far()]
    lines["relu"] = [*unary(apart), far()]
    lines["gelu"] = [
        c._replace(static={"approximate": form})
        for form in ("none", "tanh")
        for c in (*unary(normal), far(0.6628, 0.6629, -0.6629, 5.6568, 5.6569, 8.4852, 8.4854))
    ]
    lines["swiglu"] = [case(normal(2, 3), normal(2, 3)), case(normal(), normal()), case(9 * normal(5), normal(5))]
    lines["softmax"], lines["log_softmax"] = softmaxes(), [c for c in softmaxes() if not _has_inf(c)]
    lines["dropout"] = [
        case(normal(3, 5), p=0.4, key=KEY),
        case(normal(3, 2, 3), p=0.0, key=KEY),
        case(normal(), p=0.5, key=KEY),
        case(normal(2, 0), p=0.5, key=KEY, empty=True),
    ]

    lines["sum"], lines["mean"] = reductions(normal), reductions(normal)
    lines["max"], lines["min"] = reductions(apart), reductions(apart)
    lines["max"][-1] = lines["min"][-1] = case(apart(0, 3), dim=1, empty=True)

    lines["reshape"] = [case(normal(2, 6), shape=(3, -1)), case(normal(1), shape=()), case(normal(), shape=(1, 1))]
    lines["reshape"] += [case(normal(0, 3), shape=(3, 0, 2), empty=True)]
    lines["transpose"] = [case(normal(2, 3, 4), dim0=0, dim1=-1), case(normal(2, 3), dim0=1, dim1=1)]
    lines["permute"] = [case(normal(2, 3, 4), dims=(2, 0, 1)), case(normal(2, 3, 1, 4), dims=(-1, 1, 0, 2))]
    lines["permute"] += [case(normal(), dims=())]
    lines["expand"] = [case(normal(3, 1), shape=(2, 3, 4)), case(normal(), shape=(2, 2)), case(normal(2), shape=(2,))]
    lines["expand"] += [case(normal(1, 3), shape=(0, 3))]
    lines["getitem"] = [
        case(normal(4, 5), index=index)
        for index in (
            1,
            -1,
            (2, 3),
            slice(None),
            slice(3, 0, -2),
            (slice(None), slice(1, None, 2)),
            (..., 0),
            (None, slice(1, 3), None),
            slice(2, 2),
            np.array([0, 0, 3, 0]),
            [1, 1],
            np.array(2),
            np.array([[0, 3], [3, -1]]),
            (np.array([1, 1, 2]), np.array([0, 0, 4])),
            (np.array([[1], [1]]), np.array([0, 2, 0])),
            (slice(1, 3), np.array([4, 4])),
            (np.array([1, 1]), slice(None), None),
            np.array([True, False, True, False]),
            np.arange(20).reshape(4, 5) % 3 == 0,
            (slice(None), np.zeros(5, bool)),
            np.zeros(0, np.int64),
            True,
            (),
        )
    ]
    lines["concat"] = [
        case(normal(2, 3), normal(1, 3), normal(2, 3), dim=0),
        case(normal(2, 1), normal(2, 0), normal(2, 2), dim=-1),
        case(normal(3), dim=0),
    ]
    lines["stack"] = [case(normal(2, 3), normal(2, 3), dim=d) for d in (0, 1, -1)] + [case(normal(), normal(), dim=0)]
    lines["split"] = [
        case(normal(5, 2), sizes=2, dim=0),
        case(normal(2, 6), sizes=[1, 0, 5], dim=-1),
        case(normal(3), sizes=7, dim=0),
        case(normal(2, 0), sizes=2, dim=1, empty=True),
    ]
    lines["where"] = [
        case(normal(*a), normal(*b), RNG.random(c) < 0.5)
        for a, b, c in (((3, 4), (3, 4), (3, 4)), ((4,), (3, 1), (3, 4)), ((), (2,), (3, 2)), ((2, 3), (), (1,)))
    ] + [case(normal(4), 0.5, RNG.random(4) < 0.5), case(0.5, normal(2, 2), np.array(False))]

    lines["matmul"] = [
        case(normal(*a), normal(*b))
        for a, b in (
            ((3, 4), (4, 2)),
            ((4,), (4,)),
            ((4,), (4, 2)),
            ((3, 4), (4,)),
            ((2, 1, 3, 4), (5, 4, 2)),
            ((3,), (2, 3, 4)),
            ((2, 4, 3), (3,)),
            ((1, 1), (1, 1)),
        )
    ] + [case(normal(0, 3), normal(3, 2)), case(normal(2, 0), normal(0, 3), empty=True)]
    lines["linear"] = [
        case(normal(2, 3, 4), normal(5, 4), normal(5)),
        case(normal(4), normal(2, 4), normal(2)),
        case(normal(7, 4), normal(1, 4)),
        case(normal(0, 4), normal(2, 4), normal(2)),
        case(normal(3, 0), normal(2, 0), normal(2)),
        case(normal(3, 2), normal(0, 2), normal(0)),
    ]
    lines["einsum"] = [
        case(normal(2, 3, 4), normal(2, 5, 4), equation="btd,bsd->bts"),
        case(normal(3, 4), normal(4, 2), equation="ij,jk"),
        case(normal(3, 4), equation="ij->j"),
        case(normal(3, 4), equation="ij->"),
        case(normal(2, 3), normal(4), equation="ij,k->ki"),
        case(normal(2, 3), normal(3, 4), normal(4, 2), equation="ab,bc,ca->"),
        case(normal(2), normal(3), normal(2), equation="a, b, a -> b"),
        case(normal(), normal(3), equation=",a->a"),
        case(normal(0, 2), normal(2), equation="ab,b->a"),
    ]

    lines["embedding"] = [
        case(normal(5, 3), np.array([[1, 1, 4], [0, 1, 1]])),
        case(normal(3, 2), np.array(2)),
        case(normal(1, 1), np.zeros(4, np.int32)),
        case(normal(6, 2), np.array([5, 0, 5], np.uint8)),
        case(normal(3, 2), np.zeros((2, 0), np.int64)),
        case(normal(3, 0), np.array([0, 1]), empty=True),
    ]
    lines["layer_norm"] = [
        case(normal(2, 3, 5), normal(5), normal(5), normalized_shape=(5,)),
        case(normal(3, 2, 2), normal(2, 2), None, normalized_shape=(2, 2), eps=1e-3),
        case(normal(3, 4), None, normal(4), normalized_shape=(4,)),
        case(normal(4), normalized_shape=(4,)),
        case(normal(3, 1), normal(1), normal(1), normalized_shape=(1,)),
        case(normal(0, 4), normal(4), normal(4), normalized_shape=(4,)),
        case(np.full((2, 3), 1.5), normal(3), normal(3), normalized_shape=(3,), eps=0.5),
        case(normal(3, 0), normal(0), normal(0), normalized_shape=(0,), empty=True),
    ]
    lines["rms_norm"] = [
        case(normal(2, 3, 5), normal(5), normalized_shape=(5,)),
        case(normal(3, 2, 2), None, normalized_shape=(2, 2), eps=1e-3),
        case(normal(3, 1), normal(1), normalized_shape=(1,)),
        case(np.zeros((2, 3)), normal(3), normalized_shape=(3,), eps=0.5),
        case(normal(0, 3), normal(3), normalized_shape=(3,)),
    ]
    lines["rope"] = [
        case(normal(2, 3, 4, 6), positions, base=base, layout=layout)
        for layout in ("half", "interleaved")
        for base, positions in (
            (10000.0, np.arange(4)),
            (100.0, np.array([[0, 5, 1000000, 3], [7, 7, 0, 2]])),
            (10.0, np.array([-3, 0, 9, 9], np.int32)),
        )
    ]
    lines["rope"] += [case(normal(1, 1, 1, 2), np.array([5])), case(normal(2, 1, 0, 4), np.arange(0), empty=True)]

    targets = np.array([[1, 4, 1], [0, -100, 2]])
    lines["cross_entropy"] = [
        case(normal(2, 3, 5), targets, reduction=reduction, label_smoothing=smoothing)
        for reduction in ("mean", "sum", "none")
        for smoothing in (0.0, 0.1, 1.0)
    ] + [
        case(normal(3, 4), np.full(3, -100)),
        case(normal(3, 4), np.full(3, -100), label_smoothing=0.3, reduction="none"),
        case(normal(3, 4), np.array([0, 2, 0]), ignore_index=0),
        case(normal(4), np.array(3)),
        case(normal(2, 1), np.array([0, 0])),
        case(np.array([[3.0, -INF, 1.0]]), np.array([2], np.uint8)),
        case(normal(0, 3), np.zeros(0, np.int64), empty=True),
    ]
    lines["mse_loss"] = [
        case(normal(*shape), normal(*shape), reduction=reduction)
        for reduction in ("mean", "sum", "none")
        for shape in ((3, 4), ())
    ] + [case(normal(0), normal(0), empty=True)]
    lines["kl_div"] = [
        case(normal(3, 4), normal(3, 4) if log else positive(3, 4), reduction=reduction, log_target=log)
        for reduction in ("mean", "batchmean", "sum", "none")
        for log in (False, True)
    ]
    lines["attention"] = [attention(**options) for options in ATTENTION]
    lines["attention"] += [attention(dropout_p=0.4, **options) for options in ATTENTION[::3] if "empty" not in options]
    lines["attention_weights"] = [attention(weights=True, **options) for options in ATTENTION]
    return lines


def _has_inf(c: Case) -> bool:
    return any(isinstance(x, np.ndarray) and np.isinf(x).any() for x in c.inputs)


TABLE = table()


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
    check(name, case(a, b + 5 * np.sign(b), empty=is_empty(a.shape, b.shape)))


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


# ---- the checker itself -----------------------------------------------------------------------------


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Registers an op x -> 2x in a changed form, for one test."""

    def make(forward: Any = None, backward: Any = None) -> None:
        register(
            "double",
            forward or (lambda x: (2 * x, Saved(x))),
            backward or (lambda dout, saved: (2 * dout,)),
        )

    monkeypatch.setattr("minitransformer.autograd.OPS", OPS)
    yield make
    OPS.pop("double", None)


class Saved(tuple):
    _fields = ("x",)

    def __new__(cls, x: Any) -> Saved:
        return super().__new__(cls, (x,))


def _write(dout: np.ndarray, saved: Any) -> tuple[np.ndarray]:
    dout *= 2
    return (dout.copy(),)


def _write_saved(dout: np.ndarray, saved: Any) -> tuple[np.ndarray]:
    saved[0][...] = 0
    return (2 * dout,)


def _count(dout: np.ndarray, saved: Any) -> tuple[np.ndarray]:
    _count.calls += 1
    return (2 * dout * (1 + 1e-15 * (_count.calls % 2)),)


_count.calls = 0

BUGS = {
    "a wrong factor": ({"backward": lambda dout, saved: (2.000001 * dout,)}, "expected"),
    "a wrong sign of one element": ({"backward": lambda d, s: (np.where(s[0] > 1, -2 * d, 2 * d),)}, "expected"),
    "no gradient": ({"backward": lambda dout, saved: (None,)}, "no gradient for input 0"),
    "a wrong shape": ({"backward": lambda dout, saved: (2 * dout[None],)}, "input (2, 3)"),
    "a wide gradient": ({"backward": lambda d, s: (2 * d.astype(np.float64),)}, "input float32"),
    "a coarse gradient": ({"backward": lambda d, s: ((2 * d).astype(np.float16).astype(d.dtype),)}, "expected"),
    "a view of dout": (
        {"forward": lambda x: (x + 0, Saved(x)), "backward": lambda d, s: (d,)},
        "a gradient is a view",
    ),
    "a write to dout": ({"backward": _write}, "read-only"),
    "a write to what was saved": ({"backward": _write_saved}, "read-only"),
    "different bits each time": ({"backward": _count}, "differ"),
    "a lost imaginary part": ({"forward": lambda x: (2 * x.real, Saved(x)), "backward": lambda d, s: (0 * d,)}, "differences"),
    "saved without names": ({"forward": lambda x: (2 * x, (x,))}, "named tuple"),
    "memory order": ({"forward": lambda x: (2 * x.ravel("K").reshape(x.shape), Saved(x))}, "double"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_checker_finds(bug: str, broken: Any) -> None:
    functions, complaint = BUGS[bug]
    broken(**functions)
    with pytest.raises((AssertionError, ValueError), match=re.escape(complaint)):
        check("double", case(np.arange(6.0).reshape(2, 3)))


def test_checker_passes_the_right_op(broken: Any) -> None:
    broken()
    check("double", case(normal(2, 3)))


def test_a_check_that_compares_nothing_fails(broken: Any) -> None:
    broken()
    with pytest.raises(AssertionError, match="0 derivatives compared"):
        check("double", case(normal(0, 3)))
    with pytest.raises(AssertionError, match="0 derivatives compared"):
        check("double", case(np.arange(3)))
