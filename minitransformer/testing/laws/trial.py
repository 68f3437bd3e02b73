"""One example of one law: draws a problem, calls the attention, compares, and remembers what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cache
from itertools import product
from typing import Any, NamedTuple, TypeVar

import numpy as np
from hypothesis import strategies as st

from minitransformer.errors import MiniTransformerError
from minitransformer.testing.adapters import Attention
from minitransformer.testing.laws.problem import Problem

Drawn = TypeVar("Drawn")

SCORES = ("enable_gqa", "scale", "softcap")
MASKS = ("attn_mask", "additive_mask", "key_lengths")
POSITIONS = ("is_causal", "window_size", "alibi_slopes")
EVERY_OPTION = (*SCORES, *MASKS, *POSITIONS)

_FACTOR = 64  # rounding errors allowed, in units of the last place of the largest number that takes part
_AXES = {"out": "bhtd", "dq": "bhtd", "dk": "bhsd", "dv": "bhsd", "weights": "bhts", "lse": "bht"}
# What functions raise that cannot do what they claim to support.
_REFUSALS = (ArithmeticError, AttributeError, LookupError, MiniTransformerError, RuntimeError, TypeError, ValueError)


@cache
def _between(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@cache
def _lengths(least: int) -> st.SearchStrategy[int]:
    """Mostly short, so that examples are fast; some reach past a tile or vector of a kernel."""
    return st.sampled_from([*range(least, 6), *range(least, 6), *range(least, 6), 9, 17, 33, 70])


# One draw an option, and the simplest is to have none: so what does not matter shrinks away.
_SCALES = st.sampled_from([None, 1.0, 0.25, 2.0])
_SOFTCAPS = st.sampled_from([None, 1.0, 30.0])
_WINDOWS = st.sampled_from([*product((None, 0, 1, 3), (None, 0, 1, 3)), (None, None)])
_SLOPES = st.sampled_from([None, 0.5, 1.0])
_VARYING = st.sampled_from([*product((True, False), repeat=3)])
_BASES = st.tuples(st.booleans(), st.sampled_from([1.0, 0.1, 4.0, 0.0]), st.integers(0, 7))


class Violation(AssertionError):
    """A law that does not hold, and by how much."""


class Run(NamedTuple):
    """What one call gave; the gradients are None where there is no backward."""

    out: np.ndarray
    dq: np.ndarray | None
    dk: np.ndarray | None
    dv: np.ndarray | None

    def map(self, change: Callable[[str, np.ndarray], np.ndarray]) -> Run:
        """change(name, array) in the place of every array."""
        changed = (None if x is None else change(n, x) for n, x in zip(self._fields, self, strict=True))
        return Run(*changed)  # type: ignore[arg-type]


class Trial:
    """What a law works with. `calls` are those made so far, `compared` the numbers compared."""

    def __init__(self, attention: Attention, bitwise: bool, draw: Callable[..., Any]) -> None:
        self.attention = attention
        self.bitwise = bitwise
        self.draw = draw
        self.calls: list[tuple[Problem, bool]] = []
        self.compared = 0

    def can(self, *abilities: str) -> bool:
        """Whether the attention supports all of them."""
        return self.attention.supports.issuperset(abilities)

    def one_of(self, *choices: tuple[Drawn, str]) -> Drawn:
        """Draw a choice among those whose ability there is; "" needs none."""
        return self.draw(st.sampled_from([choice for choice, ability in choices if not ability or self.can(ability)]))

    # --- drawing ------------------------------------------------------------------------------------------

    def problem(
        self,
        *options: str,
        square: bool = False,
        sure: Collection[str] = (),
        least: int = 1,
        corners: Collection[str] = ("upper_left", "lower_right"),
        even: bool = False,
        rows: int = 1,
        heads: int = 1,
    ) -> Problem:
        """A problem with some of `options` and all of those `sure`, as far as the attention supports them.

        Every query may attend to a key. There are at least `least` queries, `rows` and key `heads`, and S = T
        if `square`; where positions must be named, by one of the `corners`. `even` makes D even.
        """
        draw, asked = self.draw, {o for o in (*options, *sure) if self.can(o)}
        B = draw(_between(rows, rows + 1))
        K = draw(_between(heads, heads + 1))
        H = K * draw(_between(2 if "enable_gqa" in sure else 1, 3)) if "enable_gqa" in asked else K
        D = 2 * draw(_between(1, 2)) if even else draw(_between(1, 4))
        Dv = draw(_between(1, 4)) if self.can("value_width") else D
        T = draw(_lengths(least))
        S = draw(_lengths(1)) if self.can("cross") and not square else T
        drawn: dict[str, Any] = {"enable_gqa": True} if H > K else {}
        if "scale" in asked and (scale := draw(_SCALES)):
            drawn["scale"] = scale
        if "softcap" in asked and (softcap := draw(_SOFTCAPS)):
            drawn["softcap"] = softcap
        if "is_causal" in asked and ("is_causal" in sure or draw(st.booleans())):
            drawn["is_causal"] = True
        if "window_size" in asked and (window := draw(_WINDOWS)) != (None, None):
            drawn["window_size"] = window
        if "alibi_slopes" in asked and (slope := draw(_SLOPES)):
            drawn["alibi_slopes"] = slope * np.arange(1, H + 1)
        positional = not drawn.keys().isdisjoint(POSITIONS)
        corners = [c for c in corners if self.can(c)]
        if positional:
            S = max(S, T) if corners else T  # the own position of every query is among the keys
        if "key_lengths" in asked and (corners or not positional):
            fewest = T if positional else 1
            lengths = np.array([S - draw(_between(0, S - fewest)) for _ in range(B)])
            if (lengths < S).any():
                drawn["key_lengths"] = lengths
        if positional and (S != T or "key_lengths" in drawn):
            drawn["causal_align"] = draw(st.sampled_from(corners))
        values = self.values()
        shapes = (B, H, T, D), (B, K, S, D), (B, K, S, Dv), (B, H, T, Dv)
        q, k, v, dout = (values(shape) for shape in shapes)
        problem = Problem(q, k, v, dout, drawn)
        kinds = [kind for kind in ("attn_mask", "additive_mask") if kind in asked]
        if kinds:
            none = [] if asked.intersection(sure).intersection(kinds) else [""]
            kinds = [kind for kind in kinds if kind in sure] or kinds
            if kind := draw(st.sampled_from([*none, *kinds])):
                problem = problem.having(attn_mask=self._mask(problem, kind == "additive_mask", values))
        return problem

    def values(self) -> Callable[[tuple[int, ...]], np.ndarray]:
        """A source of arrays: a fixed base whose kind, scale and seed are drawn, and shrink to halves like 1.5."""
        smooth, scale, seed = self.draw(_BASES)
        rng = np.random.default_rng(seed)

        def array(shape: tuple[int, ...]) -> np.ndarray:
            halves = rng.integers(1, 5, shape) * rng.choice([0.5, -0.5], shape)
            return (scale * (rng.standard_normal(shape) if smooth else halves)).astype(self.attention.dtype)

        return array

    def _mask(self, problem: Problem, additive: bool, values: Callable[..., np.ndarray]) -> np.ndarray:
        B, H, T, S = problem.sizes
        b, h, t = (n if varies else 1 for n, varies in zip((B, H, T), self.draw(_VARYING), strict=True))
        may = ~self.cells((b, h, t, S))
        empty = ~(may & problem.allowed).any(-1).all((0, 1))  # (T,)
        may[:, :, empty if t == T else slice(None)] |= empty.any()
        # A quarter keeps a mask of zeros and ones away, which is ambiguous and which we refuse.
        return np.where(may, values(may.shape) + 0.25, -np.inf).astype(self.attention.dtype) if additive else may

    def cells(self, shape: tuple[int, ...]) -> np.ndarray:
        """A drawn bool array, False where it shrinks to; patterns repeat after 61 elements."""
        size = math.prod(shape)
        bits = self.draw(_between(0, 2 ** min(61, size) - 1))
        return np.array([bits >> i & 1 for i in range(min(61, size))], bool)[np.arange(size) % 61].reshape(shape)

    # --- calling ------------------------------------------------------------------------------------------

    def forward(self, problem: Problem) -> Any:
        """Output, and what else the options ask for; a Violation if it is not finite."""
        self.calls.append((problem, False))
        result = self._try(lambda: self.attention(*_copies(problem), **problem.options))
        names = ["out", *(n for n in ("weights", "lse") if problem.options.get(f"need_{n}"))]
        for name, array in zip(names, result if isinstance(result, tuple) else (result,), strict=True):
            _check_finite(name, array)
        return result

    def run(self, problem: Problem) -> Run:
        """Output and gradients of one call, the latter where there is a backward."""
        if self.attention.pull is None:
            return Run(self.forward(problem), None, None, None)
        self.calls.append((problem, True))
        run = Run(
            *self._try(lambda: self.attention.gradients(problem.dout.copy(), *_copies(problem), **problem.options))
        )
        run.map(_check_finite)
        return run

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except _REFUSALS as error:
            raise Violation(f"{type(error).__name__}: {error}") from error

    # --- comparing ----------------------------------------------------------------------------------------

    def same(self, got: Run, expected: Run, problem: Problem, bitwise: bool | None = None) -> None:
        """Every array of both runs is equal: to the bit if this law is to hold so, else to rounding."""
        for name, a, b in zip(Run._fields, got, expected, strict=True):
            if a is not None and b is not None:
                self.equal(name, a, b, problem, bitwise)

    def equal(
        self, name: str, got: np.ndarray, expected: np.ndarray, problem: Problem, bitwise: bool | None = None
    ) -> None:
        """One array, named "out", "dq", "dk", "dv", "weights" or "lse": the name says how it may be rounded."""
        magnitudes = problem.magnitudes()
        amplified = _FACTOR * float(np.finfo(got.dtype).eps) * (4 + magnitudes["scores"])
        exactly = self.bitwise if bitwise is None else bitwise
        self.within(name, got, expected, 0.0 if exactly else amplified * magnitudes[name])

    def zero(self, name: str, got: np.ndarray | None) -> None:
        """Exactly 0, for every attention."""
        if got is not None:
            self.within(name, got, np.zeros_like(got), 0.0)

    def within(self, name: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
        """|got - expected| <= tolerance, and -inf only where -inf is expected."""
        self.compared += got.size
        with np.errstate(invalid="ignore"):
            error = np.where(got == expected, 0.0, abs(got - expected))
        wrong = ~(error <= tolerance)
        if wrong.any():
            at = _index(np.where(wrong, np.where(np.isnan(error), np.inf, error), -1.0))
            allowed = f", {tolerance:.1e} is rounding" if tolerance else ""
            problem = f"is {got[at]!s}, expected {expected[at]!s} (off by {error[at]:.1e}{allowed})"
            raise Violation(f"{_element(name, at)} {problem}")


def _copies(problem: Problem) -> tuple[np.ndarray, ...]:
    """q, k, v, which may be written to: that is held against a function before the laws, not by them."""
    return problem.q.copy(), problem.k.copy(), problem.v.copy()


def _check_finite(name: str, array: np.ndarray) -> np.ndarray:
    bad = np.isnan(array) | (np.isposinf(array) if name == "lse" else np.isinf(array))
    if bad.any():
        at = _index(bad)
        raise Violation(f"{_element(name, at)} is {array[at]!s}")
    return array


def _index(x: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(x.argmax()), x.shape))


def _element(name: str, at: tuple[int, ...]) -> str:
    axes = _AXES.get(name, "")
    return f"{name}[{', '.join(f'{a}={i}' for a, i in zip(axes, at, strict=True))}]" if axes else name
