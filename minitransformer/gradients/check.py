"""`gradcheck`: is a backward the derivative of its forward, and does it behave?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minitransformer.errors import ConfigError, GradientError
from minitransformer.gradients import manners
from minitransformer.gradients.function import Problem, copies, problem_of
from minitransformer.gradients.numeric import Contraction, Direction, Numeric, balanced, contract, total, unit
from minitransformer.gradients.report import GradcheckReport, Mismatch, element, index_of
from minitransformer.kernels import FAMILIES, families_used, use_backend

_TOGETHER = 4  # inputs that move at once: each of them counts, and fewer evaluations are needed
_FULL = 48  # numbers going in, and coming out, up to which the whole Jacobian is compared unless told otherwise
_SEARCHED = 4096  # elements of a wrong gradient that are looked at one by one
_RTOL = {("complex", "float64"): 1e-12, ("complex", "float32"): 2e-5}
_RTOL |= {("central", "float64"): 1e-6, ("central", "float32"): 5e-5}


# Called with every report, as the pytest plugin does to write its table.
observers: list[Callable[[GradcheckReport], None]] = []


class GradcheckError(GradientError, AssertionError):
    """A gradient that `gradcheck` found wrong; `report` says all about it."""

    def __init__(self, report: GradcheckReport) -> None:
        super().__init__("gradcheck", str(report), "Correct the backward, or the forward if that is what is wrong")
        self.report = report

    def __str__(self) -> str:
        return str(self.report)


def gradcheck(
    fn: Any,
    inputs: Any,
    *,
    method: str = "complex",
    mode: str | None = None,
    directions: int = 8,
    eps: float | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    on_kink: str = "skip",
    raise_exception: bool = True,
) -> GradcheckReport:
    """Compare the gradient of `fn` at `inputs` with derivatives that nobody wrote by hand, and look at its manners.

    `fn` is a function of Tensors that returns one or several, an `nn.Module` (its inputs and every
    parameter are checked), an op, or a pair (forward, backward) of functions on arrays with
    forward(*inputs) -> (out, saved) and backward(dout, saved) -> gradients. Functions of torch, JAX, autograd
    and MyGrad go through `minitransformer.testing.adapters`. Of `inputs`, float arrays and Tensors that require
    a gradient are differentiated, everything else is passed on.

    `method` "complex" takes f'(x) = Im f(x + ih) / h, exact to rounding, so that a float32 backward is held to
    float32's own accuracy; for functions that are not made for complex numbers, differences take its place and
    the report says why. "central" takes (f(x + h) - f(x - h)) / 2h with h = `eps`. `mode` "full" compares the
    whole Jacobian, "directional" products with `directions` random vectors per input; None decides by size.

    A number passes within `rtol` (by dtype and method, 1e-12 to 5e-5) of the sum of the absolute values of its
    terms, plus `atol` (`rtol` times the largest output, at least 1). Elements on a kink, where the slopes to
    both sides differ and the gradient claimed lies between them, are left out, or with on_kink="raise" are
    an error. Manners: inputs and upstream gradients are not written to, gradients share no memory, runs agree
    bit for bit, read-only and strided arrays are taken, every backend's forward agrees with the reference's.

    Raises `GradcheckError`, an `AssertionError`, with the report (unless not `raise_exception`), and
    `GradientError`, `DTypeError` or `ConfigError` for what cannot be checked: a check that compared nothing
    never passes.
    """
    _check_options(method, mode, directions, eps, atol, rtol, on_kink)
    check = _Check(problem_of(fn, inputs), method, mode, directions, eps, atol, rtol, on_kink)
    report = check.run()
    for observer in observers:
        observer(report)
    if raise_exception and not report.ok:
        raise GradcheckError(report)
    return report


class _Check:
    """One run of `gradcheck`."""

    def __init__(
        self,
        problem: Problem,
        method: str,
        mode: str | None,
        directions: int,
        eps: float | None,
        atol: float | None,
        rtol: float | None,
        on_kink: str,
    ) -> None:
        self.problem, self.names = problem, problem.function.names
        self.directions, self.on_kink = directions, on_kink
        self.rng = np.random.default_rng(0)
        inputs = copies(problem.inputs)
        with families_used() as families:
            outs, self.pullback = problem.function.pull(*inputs)
        self.fast = any(FAMILIES[family] != ("reference",) for family in families)
        self.outs = [out.copy() for out in outs]
        self._check_outputs()
        # Nothing flows back into outputs that are not finite: the log-sum-exp of an empty row is -inf, and stays.
        self.douts = [np.where(np.isfinite(o), self.rng.standard_normal(o.shape), 0).astype(o.dtype) for o in self.outs]
        given = copies(self.douts)
        self.first = manners.Run(inputs, self.outs, given, self.pullback(given))
        self.numeric = Numeric(problem, method, eps, None if self.fast else self.outs)
        sizes = sum(problem.inputs[i].size for i in problem.wanted), sum(o.size for o in self.outs)
        self.full = mode == "full" or (mode is None and max(sizes) <= _FULL)
        self.report = GradcheckReport(problem.function.name, method, "full" if self.full else "directional")
        self.gradients = self._claimed(self.first.gradients)
        if not self.report.problems:
            self.numeric.settle(self._direction(problem.wanted))
        self.report.method = self.numeric.method
        if self.numeric.reason is not None:
            self.report.notes.append(f"central differences, because {self.numeric.reason}")
        lowest = min((problem.inputs[i].dtype for i in problem.wanted), key=lambda dtype: dtype.itemsize)
        self.rtol = _RTOL[self.numeric.method, lowest.name] if rtol is None else rtol
        largest = max(float(np.max(abs(o), where=np.isfinite(o), initial=1.0)) for o in self.outs)
        self.atol = self.rtol * largest if atol is None else atol

    def _check_outputs(self) -> None:
        name = self.problem.function.name
        if not any(out.size for out in self.outs):
            raise GradientError("gradcheck", f"{name} returned no number", "Give it inputs of at least one element")
        for out in self.outs:
            if out.dtype.kind != "f":
                raise GradientError("gradcheck", f"{name} returned {out.dtype}, expected floats", "Return floats")
            if np.isnan(out).any():
                raise GradientError("gradcheck", f"{name} is NaN at these inputs", "Move them into its domain")
        if not any(np.isfinite(out).any() for out in self.outs):
            raise GradientError("gradcheck", f"no output of {name} is finite at these inputs", "Move the inputs")

    def run(self) -> GradcheckReport:
        if not self.report.problems:
            if self.full:
                self._compare_jacobians()
            else:
                for first in range(0, len(self.problem.wanted), _TOGETHER):
                    self._compare_directions(self.problem.wanted[first : first + _TOGETHER])
            if self.on_kink == "raise":
                for position in self.problem.wanted:
                    self._look_for_kinks(position)
            if not self.report.compared and not self.report.kinks:
                problem = f"nothing of {self.report.name} could be compared"
                raise GradientError("gradcheck", problem, "Give inputs of at least one element")
            self.report.problems += manners.complaints(self.problem, self.douts, self.first, 10 * self.rtol)
            self._compare_backends()
        return self.report

    def _claimed(self, gradients: Sequence[Any]) -> dict[int, np.ndarray]:
        """The gradients of the wanted inputs in float64, after a look at their shapes and dtypes."""
        found = {}
        for position in self.problem.wanted:
            x, name = self.problem.inputs[position], self.names[position]
            g = gradients[position] if position < len(gradients) else None
            if g is None:
                self._complain(f"backward returns no gradient for {name}")
            elif g.shape != x.shape:
                self._complain(f"the gradient of {name} has shape {g.shape}, expected {x.shape}{_unsummed(g, x)}")
            elif g.dtype != x.dtype:
                self._complain(f"the gradient of {name} is {g.dtype}, expected {x.dtype} as its input")
            else:
                found[position] = np.array(g, np.float64)
        return found

    def _compare(self, error: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
        """Which errors are too large; keeps count."""
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(error == 0, 0.0, abs(error) / tolerance)
        part = np.where(np.isnan(part), np.inf, part)
        self.report.compared += part.size
        self.report.worst = max(self.report.worst, float(part.max(initial=0.0)))
        return np.asarray(part > 1)

    def _complain(self, problem: str) -> None:
        if problem not in self.report.problems:
            self.report.problems.append(problem)

    # --- the whole Jacobian -------------------------------------------------------------------------------

    def _compare_jacobians(self) -> None:
        rows: dict[int, list[np.ndarray]] = {position: [] for position in self.problem.wanted}
        for dout in self._basis():
            for position, g in self._claimed(self.pullback(dout)).items():
                rows[position].append(g.ravel())
        if self.report.problems:
            return
        weights = np.concatenate([d.ravel() for d in self.douts]).astype(np.float64)
        for position in self.problem.wanted:
            analytic = np.array(rows[position])  # (numbers coming out, numbers going in)
            columns = [
                np.concatenate([s.ravel() for s in self.numeric.along({position: v})]) for v in self._units(position)
            ]
            numeric = np.array(columns).reshape(analytic.shape[::-1]).T
            noise = self._noise(position)
            scale = abs(numeric).max(initial=0.0)
            wrong: np.ndarray = self._compare(
                analytic - numeric, self.rtol * (abs(numeric) + scale) + self.atol + noise
            )
            together = weights @ analytic if len(analytic) else np.zeros(0)
            size = abs(weights) @ (abs(analytic) + abs(numeric)) + scale
            tolerance = self.rtol * size + self.atol + noise * abs(weights).sum()
            claimed = self.gradients[position].ravel()
            if wrong.any():
                self._blame(position, weights @ numeric, np.asarray(wrong.any(axis=0)))
            elif not (abs(claimed - together) <= tolerance).all():
                self._complain(f"the gradient of {self.names[position]} is not linear in the upstream gradient")

    def _basis(self) -> Iterator[list[np.ndarray]]:
        """Upstream gradients that are 1 for one output element and 0 for all others."""
        for number, out in enumerate(self.outs):
            for index in range(out.size):
                douts = [np.zeros(o.shape, o.dtype) for o in self.outs]
                if self.numeric.counted[number].flat[index]:
                    douts[number].flat[index] = 1
                yield douts

    def _units(self, position: int) -> Iterator[np.ndarray]:
        x = self.problem.inputs[position]
        for index in range(x.size):
            yield unit(x.shape, index)

    # --- random directions --------------------------------------------------------------------------------

    def _direction(self, positions: Sequence[int]) -> Direction:
        return balanced({position: self.gradients[position] for position in positions}, self.rng)

    def _compare_directions(self, positions: Sequence[int]) -> None:
        noise = sum(self._noise(position) for position in positions) * total(self.douts)
        for _ in range(self.directions if any(self.gradients[position].size for position in positions) else 0):
            direction = self._direction(positions)
            expected = contract(self.douts, self.numeric.along(direction))
            terms = [self.gradients[position] * v for position, v in direction.items()]
            got, size = (float(sum(part.sum() for part in parts)) for parts in (terms, [abs(t) for t in terms]))
            tolerance = self.rtol * (expected.size + size) + self.atol + noise
            if self._compare(np.asarray(got - expected.value), np.asarray(tolerance)):
                before = len(self.report.mismatches) + self.report.kinks
                for position in positions:
                    self._search(position)
                if len(self.report.mismatches) + self.report.kinks == before:
                    what = " and ".join(self.names[position] for position in positions)
                    self._complain(f"the gradient of {what} is wrong by many small errors, none of which stands out")
                return

    def _search(self, position: int) -> None:
        """One by one, the elements of a gradient that is wrong somewhere; a sample of them if there are many."""
        g = self.gradients[position]
        looked_at = np.arange(g.size)
        if g.size > _SEARCHED:
            looked_at = np.sort(self.rng.choice(g.size, _SEARCHED, replace=False))
            self.report.notes.append(f"{_SEARCHED} of the {g.size} elements of d{self.names[position]} were looked at")
        numeric, tolerance = g.ravel().copy(), np.zeros(g.size)
        for index in looked_at:
            slope = self._slope(position, int(index))
            numeric[index] = slope.value
            noise = self._noise(position) * total(self.douts)
            tolerance[index] = self.rtol * (slope.size + abs(g.flat[index])) + self.atol + noise
        wrong = ~(abs(g.ravel() - numeric) <= tolerance)
        if wrong.any():
            self._blame(position, numeric, wrong)

    def _slope(self, position: int, index: int) -> Contraction:
        return contract(self.douts, self.numeric.along({position: unit(self.problem.inputs[position].shape, index)}))

    # --- kinks and blame ----------------------------------------------------------------------------------

    def _blame(self, position: int, numeric: np.ndarray, wrong: np.ndarray) -> None:
        """Report the elements marked `wrong`, except those on a kink."""
        shape = self.problem.inputs[position].shape
        kinks = np.zeros(wrong.shape, bool)
        for index in np.flatnonzero(wrong):
            kinks[index] = self._on_kink(position, int(index), self.gradients[position].flat[index])
        self.report.kinks += int(kinks.sum())
        if (wrong & ~kinks).any():
            arrays = (self.gradients[position].ravel(), numeric, np.where(wrong, -1.0, np.inf), kinks)
            self.report.mismatches.append(Mismatch(self.names[position], *(a.reshape(shape) for a in arrays)))

    def _on_kink(self, position: int, index: int, claimed: float = math.nan) -> bool:
        """Whether the slopes to both sides of an element differ, with what is `claimed` between them."""
        sides = self.numeric.sides({position: unit(self.problem.inputs[position].shape, index)})
        left, right = contract(self.douts, sides.left).value, contract(self.douts, sides.right).value
        noise = 2 * sides.noise * total(self.douts) + 1e-3 * max(abs(left), abs(right))
        between = min(left, right) - noise <= claimed <= max(left, right) + noise
        return abs(left - right) > noise and (math.isnan(claimed) or between)

    def _look_for_kinks(self, position: int) -> None:
        shape = self.problem.inputs[position].shape
        for index in range(self.problem.inputs[position].size):
            if self._on_kink(position, index):
                where = element(self.names[position], index_of(index, shape), shape)[1:]
                self._complain(f"{where} lies on a kink: there is no gradient to compare with")

    def _noise(self, position: int) -> float:
        """The rounding noise of one number of a difference; none by complex step."""
        if self.numeric.method == "complex":
            return 0.0
        return self.numeric.sides({position: np.zeros(self.problem.inputs[position].shape)}).noise

    def _compare_backends(self) -> None:
        if not self.fast:
            return
        with use_backend("reference"):
            reference = self.problem.function.value(*copies(self.problem.inputs))
        for number, (a, b) in enumerate(zip(self.outs, reference, strict=True)):
            scale = float(np.max(abs(b), where=np.isfinite(b), initial=1.0))
            if not np.allclose(a, b, rtol=10 * self.rtol, atol=10 * self.rtol * scale, equal_nan=True):
                self._complain(f"output {number} differs from that of the reference kernels: the forward is wrong")


def _unsummed(g: np.ndarray, x: np.ndarray) -> str:
    """A hint, if the gradient was left in the shape that its input was broadcast to."""
    try:
        broadcast = np.broadcast_shapes(g.shape, x.shape) == g.shape
    except ValueError:
        return ""
    return ": it was not summed over the axes that the input was broadcast along" if broadcast else ""


def _check_options(method: Any, mode: Any, directions: Any, eps: Any, atol: Any, rtol: Any, on_kink: Any) -> None:
    for name, value, known in (
        ("method", method, ("complex", "central")),
        ("mode", mode, ("full", "directional", None)),
        ("on_kink", on_kink, ("skip", "raise")),
    ):
        if value not in known:
            raise ConfigError("gradcheck", f"{name} is {value!r}, expected one of {known}", "Pass one of them")
    if isinstance(directions, bool) or not isinstance(directions, int) or directions < 1:
        problem = f"directions is {directions!r}, expected an integer from 1"
        raise ConfigError("gradcheck", problem, "No direction would compare nothing")
    for name, value in (("eps", eps), ("atol", atol), ("rtol", rtol)):
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            problem = f"{name} is {value!r}, expected a number of at least 0"
            raise ConfigError("gradcheck", problem, "Leave it out for the default")
