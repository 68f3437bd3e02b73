"""The gradient checker finds the bugs it is there for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from checker import case, check

from minitransformer.autograd import OPS, register


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
    "a lost imaginary part": (
        {"forward": lambda x: (2 * x.real, Saved(x)), "backward": lambda d, s: (0 * d,)},
        "differences",
    ),
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
    check("double", case(np.arange(6.0).reshape(2, 3)))


def test_a_check_that_compares_nothing_fails(broken: Any) -> None:
    broken()
    with pytest.raises(AssertionError, match="0 derivatives compared"):
        check("double", case(np.zeros((0, 3))))
    with pytest.raises(AssertionError, match="0 derivatives compared"):
        check("double", case(np.arange(3)))
