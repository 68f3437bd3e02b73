"""Derivatives that nobody wrote by hand: by complex step, or by central differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minitransformer.errors import GradientError, MiniTransformerError
from minitransformer.gradients.function import Arrays, Function, Problem, copies
from minitransformer.kernels import use_backend

COMPLEX_STEP = 1e-20  # its square is below every rounding, so the step has no truncation error
DIFFERENCE = {"float64": 1e-6, "float32": 3e-3}  # step of differences, by the precision of what comes out
_AGREE = {"float64": 1e-6, "float32": 1e-2}  # how well differences and complex step must agree
_LONGEST = 1e3  # how much further an input with small gradients may move than others

# What functions raise that were not made for complex numbers.
_REFUSALS = (MiniTransformerError, TypeError, ValueError, RuntimeError, AttributeError, np.exceptions.ComplexWarning)

Direction = dict[int, np.ndarray]


class Numeric:
    """Derivatives of a problem along directions, by the reference kernels in float64 whatever the dtype of its inputs.

    `outs` are its outputs, if the reference kernels computed them. A direction is a dict from positions of
    inputs to arrays of their shapes. `same_inputs` says whether all inputs were float64, `reason` why differences
    are used although the complex step was asked for; None if they are not.
    """

    def __init__(
        self, problem: Problem, method: str, eps: float | None, outs: Sequence[np.ndarray] | None = None
    ) -> None:
        self.function: Function = problem.function
        self.wanted = problem.wanted
        self.inputs: Arrays = tuple(_double(x) for x in problem.inputs)
        # All that are wanted, whichever moves: a buffer made like one input must hold what comes of another.
        self.complex_inputs: Arrays = tuple(
            x.astype(np.complex128) if i in self.wanted else x for i, x in enumerate(self.inputs)
        )
        self.eps = eps
        dtypes = {x.dtype for x in problem.inputs if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
        self.same_inputs = dtypes == {np.dtype(np.float64)}
        self.outs = tuple(outs) if outs is not None and self.same_inputs else self._at({}, 0)
        self.counted = tuple(np.isfinite(out) for out in self.outs)  # the others must stay as they are
        self.all_counted = all(counted.all() for counted in self.counted)
        self.precision = "float64" if all(out.dtype == np.float64 for out in self.outs) else "float32"
        self.method = method if self.function.takes_complex else "central"
        self.reason: str | None = None

    def along(self, direction: Direction) -> list[np.ndarray]:
        """The derivative of every output along `direction`; 0 where an output is not finite."""
        if self.method == "complex":
            return self._complex(direction)
        near, far = self.sides(direction), self.sides(direction, 2)
        # Richardson's extrapolation: the errors of both, of second order, cancel.
        quads = zip(near.left, near.right, far.left, far.right, strict=True)
        return [(4 * (a + b) - (c + d)) / 6 for a, b, c, d in quads]

    def _complex(self, direction: Direction) -> list[np.ndarray]:
        h = self.eps or COMPLEX_STEP
        stepped = self._at(direction, 1j * h)
        return self._slopes([out.imag / h for out in stepped])

    def _slopes(self, slopes: list[np.ndarray]) -> list[np.ndarray]:
        """`slopes` with 0 where the output is not finite."""
        if self.all_counted:
            return slopes
        return [np.where(counted, s, 0.0) for s, counted in zip(slopes, self.counted, strict=True)]

    def sides(self, direction: Direction, stretch: float = 1.0) -> Sides:
        """The slopes of every output to the left and to the right, with steps of the usual length times `stretch`."""
        h = self._step(direction) * stretch
        low, high = self._at(direction, -h), self._at(direction, h)
        noise = 0.0
        for a, m, b, counted in zip(low, self.outs, high, self.counted, strict=True):
            if not (np.isfinite(a) & np.isfinite(b))[counted].all():
                names = ", ".join(self.function.names[position] for position in direction)
                problem = f"{self.function.name} is finite at {names}, and not {h:g} beside it"
                fix = "Move the inputs away from poles and from the edges of the domain"
                raise GradientError("gradcheck", problem, fix)
            eps = float(np.finfo(a.dtype).eps)  # of float32, where the function casts
            noise = max(noise, 8 * eps * float(np.max(abs(m), where=counted, initial=1.0)) / h)
        with np.errstate(invalid="ignore"):
            left = self._slopes([(m - a) / h for a, m in zip(low, self.outs, strict=True)])
            right = self._slopes([(b - m) / h for b, m in zip(high, self.outs, strict=True)])
        return Sides(left, right, noise)

    def kink(self, direction: Direction, douts: list[np.ndarray]) -> tuple[float, float] | None:
        """The slopes of <douts, f> to both sides, the lower first, if they differ by a kink; None if there is none.

        A bend looks like a kink too, but its slopes part with the step: eight times as far at eight times the step.
        """
        near, far = self.sides(direction), self.sides(direction, 8)
        slopes = [contract(douts, side).value for side in (near.left, near.right, far.left, far.right)]
        noise = 2 * near.noise * total(douts) + 1e-3 * max(map(abs, slopes[:2]))
        jump, wider = abs(slopes[1] - slopes[0]), abs(slopes[3] - slopes[2])
        return (min(slopes[:2]), max(slopes[:2])) if jump > noise and wider < 3 * jump else None

    def _step(self, direction: Direction) -> float:
        if self.method == "central" and self.eps is not None:
            return self.eps
        scale, length = 1.0, 0.0
        for position, v in direction.items():
            x = self.inputs[position]
            scale = max(scale, float(np.max(abs(x), where=np.isfinite(x), initial=0.0)))
            length = max(length, float(np.max(abs(v), initial=0.0)))
        return DIFFERENCE[self.precision] * scale / max(length, 1.0)

    def _at(self, direction: Direction, h: complex) -> Arrays:
        inputs = copies(self.complex_inputs if isinstance(h, complex) else self.inputs)
        for position, v in direction.items():
            inputs[position] += h * v
        with use_backend("reference"):
            return tuple(np.asarray(out) for out in self.function.value(*inputs))

    def settle(self, direction: Direction) -> list[np.ndarray] | None:
        """Decide on the method: code that drops imaginary parts would silently give 0 by complex step.

        One direction, in which every input moves, is compared with differences; if they disagree, these are used.
        Otherwise the derivative along it is returned.
        """
        if self.method != "complex":
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)
                exact = self._complex(direction)
        except _REFUSALS as error:
            self._give_up(f"it refuses complex numbers ({type(error).__name__}: {error})")
            return None
        if not all(np.isfinite(a).all() for a in exact):
            self._give_up("its complex step is not finite")
            return None
        sides = self.sides(direction)
        outside = [
            _outside(a, left, right, _AGREE[self.precision], 10 * sides.noise)
            for a, left, right in zip(exact, sides.left, sides.right, strict=True)
        ]
        if any(x.any() for x in outside):
            # Beside a pole differences say nothing: then they do not settle as the step gets shorter.
            closer = self.sides(direction, 1 / 8)
            settled = [
                abs(a + b - c - d) <= 0.1 * np.maximum(abs(a + b), abs(c + d)) + 20 * closer.noise
                for a, b, c, d in zip(closer.left, closer.right, sides.left, sides.right, strict=True)
            ]
            if any((x & y).any() for x, y in zip(outside, settled, strict=True)):
                self._give_up(
                    "its complex step disagrees with differences: something drops imaginary parts, as abs, .real, "
                    "np.var and the functions of math do"
                )
                return None
        return exact

    def _give_up(self, reason: str) -> None:
        self.method, self.reason, self.eps = "central", reason, None


def _outside(a: np.ndarray, left: np.ndarray, right: np.ndarray, part: float, noise: float) -> np.ndarray:
    """Where `a` does not lie between two slopes: at a kink the complex step takes one of them, or a mean."""
    if a.shape != left.shape:
        return np.ones(left.shape, bool)
    low, high = np.minimum(left, right), np.maximum(left, right)
    slack = part * np.maximum(abs(low), abs(high)) + noise
    return (a < low - slack) | (a > high + slack)


class Sides(NamedTuple):
    """Slopes to both sides of a point, one array an output, and the rounding noise in each number of them."""

    left: list[np.ndarray]
    right: list[np.ndarray]
    noise: float


class Contraction(NamedTuple):
    """<dout, J v>, summed over all outputs, and the sum of the absolute values of its terms."""

    value: float
    size: float


def contract(douts: Sequence[np.ndarray], slopes: Sequence[np.ndarray]) -> Contraction:
    value = size = 0.0
    for d, s in zip(douts, slopes, strict=True):
        value += float(np.vdot(d, s))
        size += float(np.vdot(abs(d), abs(s)))
    return Contraction(value, size)


def _double(x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        return x.astype(np.float64)
    return x


def balanced(gradients: Direction, rng: np.random.Generator) -> Direction:
    """A random direction in which all inputs weigh about the same, as far as their gradients are claimed."""
    sizes = {position: _size(g) for position, g in gradients.items()}
    largest = max(sizes.values(), default=0.0)
    return {
        position: rng.standard_normal(gradients[position].shape) * (min(largest / size, _LONGEST) if size else 1.0)
        for position, size in sizes.items()
    }


def _size(g: np.ndarray) -> float:
    """The root mean square; 0 if there is nothing, or if it is not finite."""
    size = math.sqrt(g.ravel() @ g.ravel() / g.size) if g.size else 0.0
    return size if math.isfinite(size) else 0.0


def unit(shape: tuple[int, ...], index: int) -> np.ndarray:
    """1 at a flat position, else 0."""
    v = np.zeros(shape)
    v.flat[index] = 1
    return v


def total(douts: Sequence[np.ndarray]) -> float:
    """The sum of all absolute values."""
    return float(sum(abs(d).sum() for d in douts))
