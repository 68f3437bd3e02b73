"""The check of the op tests finds the bugs it is there for; what `gradcheck` finds is in test_gradcheck_findings.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from checker import case, check

from minitransformer.autograd import OPS, register
from minitransformer.errors import GradientError


@pytest.fixture
def broken() -> Iterator[Any]:
    """Registers an op x -> 2x in a changed form, for one test."""

    def make(forward: Any = None, backward: Any = None) -> None:
        register(
            "double",
            forward or (lambda x: (2 * x, Saved(x))),
            backward or (lambda dout, saved: (2 * dout,)),
        )

    yield make
    OPS.pop("double", None)


class Saved(tuple):
    _fields = ("x",)

    def __new__(cls, x: Any) -> Saved:
        return super().__new__(cls, (x,))


def only_in(dtype: Any, factor: float) -> Any:
    return lambda dout, saved: (dout * np.asarray(factor if dout.dtype == dtype else 2, dout.dtype),)


BUGS = {
    "a wrong factor": ({"backward": lambda dout, saved: (2.000001 * dout,)}, "gradient of x is wrong"),
    "wrong in float32 only": ({"backward": only_in(np.float32, 2.001)}, "gradient of x is wrong"),
    "wrong in float64 only": ({"backward": only_in(np.float64, 2.001)}, "gradient of x is wrong"),
    "a coarse gradient": (
        {"backward": lambda d, s: ((2 * d).astype(np.float16).astype(d.dtype),)},
        "gradient of x is not linear",
    ),
    "no gradient": ({"backward": lambda dout, saved: (None,)}, "backward returns no gradient for x"),
    "a view of dout": ({"forward": lambda x: (x + 0, Saved(x)), "backward": lambda d, s: (d,)}, "shares memory with"),
    "saved without names": ({"forward": lambda x: (2 * x, (x,))}, "named tuple"),
    "memory order": ({"forward": lambda x: (2 * x.ravel("K").reshape(x.shape), Saved(x))}, "give other outputs"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_checker_finds(bug: str, broken: Any) -> None:
    functions, complaint = BUGS[bug]
    broken(**functions)
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        check("double", case(np.arange(6.0).reshape(2, 3)))


def test_checker_passes_the_right_op(broken: Any) -> None:
    broken()
    check("double", case(np.arange(6.0).reshape(2, 3)))


def test_a_check_that_compares_nothing_fails(broken: Any) -> None:
    broken()
    check("double", case(np.zeros((0, 3)), empty=True))
    with pytest.raises(AssertionError, match="double: nothing to compare"):
        check("double", case(np.zeros((0, 3))))
    with pytest.raises(AssertionError, match="double: not empty"):
        check("double", case(np.zeros((1, 3)), empty=True))
    with pytest.raises(GradientError, match="none of the 0 inputs of double can be differentiated"):
        check("double", case(np.arange(3)))


def test_gradients_of_nothing_have_a_kind_too(broken: Any) -> None:
    broken(backward=lambda dout, saved: (dout.sum(0),))
    with pytest.raises(AssertionError, match="double: gradient of another kind"):
        check("double", case(np.zeros((0, 3)), empty=True))
