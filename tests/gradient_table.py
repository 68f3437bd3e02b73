"""The gradient table: for every op its calls, at the shapes where ops go wrong.

An op that is added needs its line here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from checker import Case, case
from gradient_attention import attention_cases, attention_weights_cases, linear_attention_cases
from gradient_block import block_cases
from gradient_layers import decoder_cases, encoder_cases

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


PAIRS = [
    ((3, 4), (3, 4)),
    ((5,), (3, 5)),
    ((2, 1, 3), (4, 1)),
    ((), (2, 3)),
    ((), ()),
    ((1, 1), (1,)),
    ((0, 3), (1, 3)),
]


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
    lines["move"] = [case(normal(2, 3), device="cpu")]
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
    lines["attention"] = attention_cases()
    lines["attention_weights"] = attention_weights_cases()
    lines["linear_attention"] = linear_attention_cases()
    lines["gpt_block"] = block_cases()
    lines["encoder_layer"] = encoder_cases()
    lines["decoder_layer"] = decoder_cases()
    return lines


def _has_inf(c: Case) -> bool:
    return any(isinstance(x, np.ndarray) and np.isinf(x).any() for x in c.inputs)


TABLE = table()
