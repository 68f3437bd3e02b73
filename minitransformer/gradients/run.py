"""One gradient check: claimed against numeric derivatives, and the blame for what differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minitransformer.errors import GradientError
from minitransformer.gradients import manners
from minitransformer.gradients.function import Problem, copies
from minitransformer.gradients.numeric import Contraction, Direction, Numeric, balanced, contract, total, unit
from minitransformer.gradients.report import GradcheckReport, Mismatch, element, index_of
from minitransformer.kernels import FAMILIES, families_used, use_backend

_TOGETHER = 4  # inputs that move at once: each of them counts, and fewer evaluations are needed
_FULL = 48  # numbers going in, and coming out, up to which the whole Jacobian is compared unless told otherwise
_SEED = 0x67726164  # of our own: the numbers must not be those of a user who also began at 0
_SEARCHED = 1024  # elements of a wrong gradient that are looked at one by one
_RTOL = {("complex", "float64"): 1e-12, ("complex", "float32"): 5e-6}
_RTOL |= {("central", "float64"): 1e-6, ("central", "float32"): 5e-5}


class Check:
    """One run of `gradcheck`, whose options were checked."""

    def __init__(
        self,
        problem: Problem,
        method: str,
        mode: str | None,
        directions: int | None,
        eps: float | None,
        atol: float | None,
        rtol: float | None,
        on_kink: str,
    ) -> None:
        self.problem, self.names = problem, problem.function.names
        self.on_kink = on_kink
        self.rng = np.random.default_rng(_SEED)
        inputs = copies(problem.inputs)
        with families_used() as families:
            outs, self.pullback = problem.function.pull(*inputs)
        self.fast = any(FAMILIES[family] != ("reference",) for family in families)
        self.outs = [out.copy() for out in outs]
        self._check_outputs()
        # Nothing flows back into outputs that are not finite: the log-sum-exp of an empty row is -inf, and stays.
        self.douts = [np.where(np.isfinite(o), self.rng.standard_normal(o.shape), 0).astype(o.dtype) for o in self.outs]
        given = copies(self.douts)
        self.telling, self.largest = False, 0.0  # whether anything compared was large enough to say something
        self.first = manners.Run(inputs, self.outs, given, self.pullback(given))
        self.numeric = Numeric(problem, method, eps, None if self.fast else self.outs)
        sizes = sum(problem.inputs[i].size for i in problem.wanted), sum(o.size for o in self.outs)
        self.full = mode == "full" or (mode is None and max(sizes) <= _FULL)
        self.report = GradcheckReport(problem.function.name, method, "full" if self.full else "directional")
        self.gradients = self._claimed(self.first.gradients)
        self.settled: tuple[Direction, list[np.ndarray] | None] = {}, None
        if not self.report.problems:
            direction = self._direction(problem.wanted)
            self.settled = direction, self.numeric.settle(direction)
        self.report.method = self.numeric.method
        if self.numeric.reason is not None:
            self.report.notes.append(f"central differences, because {self.numeric.reason}")
        floats = [x.dtype for x in problem.inputs if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
        lowest = min(floats, key=lambda dtype: dtype.itemsize)
        exact = (self.numeric.method, lowest.name) == ("complex", "float64")
        self.directions = (1 if exact else 2) if directions is None else directions
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
            for first in range(0, len(self.problem.wanted), _TOGETHER):
                if not self.report.mismatches and not (self.full and self.report.kinks):
                    together = self.problem.wanted[first : first + _TOGETHER]
                    self._compare_directions(together, 1 if self.full else self.directions)
            if self.on_kink == "raise":
                for position in self.problem.wanted:
                    self._look_for_kinks(position)
            self._check_effort()
            # What is wrong element by element need not be linear too.
            atol = None if self.report.mismatches else self.atol
            for complaint in manners.complaints(self.problem, self.douts, self.first, 10 * self.rtol, atol):
                self._complain(complaint)
            self._compare_backends()
        return self.report

    def _check_effort(self) -> None:
        """`GradientError` if what was compared says nothing."""
        name = self.report.name
        if not self.report.compared:
            problem = f"nothing of {name} could be compared"
            raise GradientError("gradcheck", problem, "Give inputs of at least one element")
        if self.report.kinks == sum(self.problem.inputs[position].size for position in self.problem.wanted):
            problem = f"every element of the inputs of {name} lies on a kink"
            raise GradientError("gradcheck", problem, "Move the inputs away from kinks and ties")
        if not self.telling and self.largest > 1e-3 * self.atol:
            found = f"at most {self.largest:.2g}, cannot be told from rounding ({self.atol:.2g})"
            raise GradientError("gradcheck", f"the derivatives of {name}, {found}", "Scale the function, or pass atol")

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

    def _compare(self, claimed: Any, numeric: Any, tolerance: Any) -> np.ndarray:
        """Which numbers are wrong; keeps count."""
        error, size = np.abs(np.asarray(claimed - numeric)), np.abs(np.asarray(numeric))
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(error == 0, 0.0, error / tolerance)
        part = np.where(np.isnan(part), np.inf, part)
        self.report.compared += part.size
        self.report.worst = max(self.report.worst, float(part.max(initial=0.0)))
        largest = float(size.max(initial=0.0))
        self.largest = max(self.largest, largest)
        # Equal up to what is allowed says something only of numbers above that, or if they are close besides.
        self.telling |= largest > self.atol or float(error.max(initial=0.0)) <= 0.01 * largest
        return np.asarray(part > 1)

    def _complain(self, problem: str) -> None:
        if problem not in self.report.problems:
            self.report.problems.append(problem)

    # --- the whole Jacobian -------------------------------------------------------------------------------

    def _compare_jacobians(self) -> None:
        rows: dict[int, list[np.ndarray]] = {position: [] for position in self.problem.wanted}
        for dout in self._basis():
            sign = sum(float(d.sum()) for d in dout) or 1.0
            for position, g in self._claimed(self.pullback(dout)).items():
                rows[position].append(sign * g.ravel())
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
            wrong = self._compare(analytic, numeric, self.rtol * (abs(numeric) + scale) + self.atol + noise)
            claimed, together = self.gradients[position].ravel(), weights @ analytic
            size = abs(weights) @ (abs(analytic) + abs(numeric)) + scale
            tolerance = self.rtol * size + self.atol + noise * abs(weights).sum()
            if wrong.any():
                self._blame(position, weights @ numeric, np.asarray(wrong.any(axis=0)))
            elif not (abs(claimed - together) <= tolerance).all():
                self._complain(f"the gradient of {self.names[position]} is not linear in the upstream gradient")

    def _basis(self) -> Iterator[list[np.ndarray]]:
        """Upstream gradients of one output element each, 1 or -1 in turn."""
        for number, out in enumerate(self.outs):
            for index in range(out.size):
                douts = [np.zeros(o.shape, o.dtype) for o in self.outs]
                if self.numeric.counted[number].flat[index]:
                    douts[number].flat[index] = 1 - 2 * (index % 2)
                yield douts

    def _units(self, position: int) -> Iterator[np.ndarray]:
        x = self.problem.inputs[position]
        for index in range(x.size):
            yield unit(x.shape, index)

    # --- random directions --------------------------------------------------------------------------------

    def _direction(self, positions: Sequence[int]) -> Direction:
        return balanced({position: self.gradients[position] for position in positions}, self.rng)

    def _compare_directions(self, positions: Sequence[int], directions: int) -> None:
        if not any(self.gradients[position].size for position in positions):
            return
        noise = sum(self._noise(position) for position in positions) * total(self.douts)
        claimed, numeric, tolerance = np.empty((3, directions))
        for number in range(directions):
            direction, slopes = self.settled
            if number or slopes is None or [*direction] != [*positions]:
                direction, slopes = self._direction(positions), None
            if number % 2:  # along the gradient itself, where nothing cancels and a factor shows most
                direction = {i: np.copysign(v, self.gradients[i]) for i, v in direction.items()}
            steps = list(direction.values())
            expected = contract(self.douts, self.numeric.along(direction) if slopes is None else slopes)
            got = contract([self.gradients[position] for position in positions], steps)
            length = math.sqrt(contract(steps, steps).value)
            claimed[number], numeric[number] = got.value, expected.value
            tolerance[number] = self.rtol * (expected.size + got.size) + self.atol * max(1.0, length) + noise
        wrong = self._compare(claimed, numeric, tolerance)
        if not wrong.any():
            return
        before = len(self.report.mismatches) + self.report.kinks
        for position in positions:
            self._search(position)
        if len(self.report.mismatches) + self.report.kinks == before:
            what, first = " and ".join(self.names[position] for position in positions), int(wrong.argmax())
            factor = claimed[first] / numeric[first] if numeric[first] else math.inf
            self._complain(
                f"the gradient of {what} is right element by element and wrong along a direction by a factor "
                f"of {factor:.6g}: many small errors, or a tie"
            )

    def _search(self, position: int) -> None:
        """One by one, the elements of a gradient that is wrong somewhere; a sample of them if there are many."""
        g = self.gradients[position].ravel()
        looked_at = np.arange(g.size)
        if g.size > _SEARCHED:
            looked_at = np.sort(self.rng.choice(g.size, _SEARCHED, replace=False))
            self.report.notes.append(f"{_SEARCHED} of the {g.size} elements of d{self.names[position]} were looked at")
        noise = self._noise(position) * total(self.douts)
        numeric, wrong, unseen = g.copy(), np.zeros(g.size, bool), np.ones(g.size, bool)
        unseen[looked_at] = False
        for index in looked_at:
            slope = self._slope(position, int(index))
            numeric[index] = slope.value
            wrong[index] = (
                not abs(g[index] - slope.value) <= self.rtol * (slope.size + abs(g[index])) + self.atol + noise
            )
        if wrong.any():
            self._blame(position, numeric, wrong, unseen)

    def _slope(self, position: int, index: int) -> Contraction:
        return contract(self.douts, self.numeric.along({position: unit(self.problem.inputs[position].shape, index)}))

    # --- kinks and blame ----------------------------------------------------------------------------------

    def _blame(self, position: int, numeric: np.ndarray, wrong: np.ndarray, unseen: np.ndarray | None = None) -> None:
        """Report the elements marked `wrong`, except those on a kink."""
        shape, g = self.problem.inputs[position].shape, self.gradients[position].ravel()
        kinks = np.zeros(wrong.shape, bool)
        for index in np.flatnonzero(wrong):
            slopes = self.numeric.kink({position: unit(shape, int(index))}, self.douts)
            kinks[index] = slopes is not None and self._between(g[index], slopes)
        if kinks.any():  # all of them together too: of two that tie, only one may have the whole gradient
            together = {position: kinks.reshape(shape).astype(float)}
            slope = contract(self.douts, self.numeric.along(together)).value
            slopes = self.numeric.kink(together, self.douts) or (slope, slope)
            if not self._between(float(g[kinks].sum()), slopes):
                kinks[:] = False
        self.report.kinks += int(kinks.sum())
        if (wrong & ~kinks).any():
            hidden = kinks if unseen is None else kinks | unseen
            arrays = (g, numeric, wrong & ~kinks, hidden)
            self.report.mismatches.append(Mismatch(self.names[position], *(a.reshape(shape) for a in arrays)))

    def _between(self, claimed: float, slopes: tuple[float, float]) -> bool:
        slack = 0.01 * max(abs(slopes[0]), abs(slopes[1])) + self.atol  # a kink nearby is not in the middle
        return slopes[0] - slack <= claimed <= slopes[1] + slack

    def _look_for_kinks(self, position: int) -> None:
        shape = self.problem.inputs[position].shape
        for index in range(self.problem.inputs[position].size):
            if self.numeric.kink({position: unit(shape, index)}, self.douts) is not None:
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
        reference = self.numeric.outs
        if not self.numeric.same_inputs:
            with use_backend("reference"):
                reference = self.problem.function.value(*copies(self.problem.inputs))
        for number, (a, b) in enumerate(zip(self.outs, reference, strict=True)):
            if not manners.close(a, b, 10 * self.rtol):
                self._complain(f"output {number} differs from that of the reference kernels: the forward is wrong")


def _unsummed(g: np.ndarray, x: np.ndarray) -> str:
    """A hint, if the gradient was left in the shape that its input was broadcast to."""
    try:
        broadcast = np.broadcast_shapes(g.shape, x.shape) == g.shape
    except ValueError:
        return ""
    return ": it was not summed over the axes that the input was broadcast along" if broadcast else ""
