"""Every implementation of a kernel against the reference in float64, by the 2x rule."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import numpy as np

from minitransformer.autograd import OPS, Op, watching
from minitransformer.checks import check_choice, shown
from minitransformer.diagnose.shrink import map_arrays
from minitransformer.errors import ConfigError, GradientError, nearest
from minitransformer.gradients.function import Problem, problem_of
from minitransformer.gradients.report import element, index_of
from minitransformer.kernels import families_used, host_implementations, use_backend
from minitransformer.nn.module import Module

_ROUNDINGS = 4  # the floor, in roundings of the result and of what it is computed from
_NUDGE = 64 * float(np.finfo(np.float64).eps)
_NUDGES = 4  # different ones: a single one may happen to cancel
_JUMP = 1e-7  # what so small a nudge moves further than this has a kink or a tie there, and says nothing

Arrays = dict[str, np.ndarray]  # outputs and gradients, by name


class Comparison(NamedTuple):
    """One array that one implementation computed, against the truth."""

    implementation: str
    dtype: str
    what: str  # "out", "dq", ...
    error: float  # the largest difference from float64's reference
    plain: float  # the same of the reference in this dtype
    allowed: float  # 2 plain + floor
    compared: int
    worst: str  # the element with the largest difference, got and expected; or what else is wrong

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


class BackendError(GradientError, AssertionError):
    """An implementation of a kernel that `check_backends` found wrong; `report` says all about it."""

    def __init__(self, report: BackendReport) -> None:
        super().__init__("check_backends", str(report), "Correct the implementation")
        self.report = report

    def __str__(self) -> str:
        return str(self.report)


class BackendReport:
    """What `check_backends` compared. True if all is well; its text is a table."""

    def __init__(self, name: str, comparisons: Sequence[Comparison]) -> None:
        self.name, self.comparisons = name, tuple(comparisons)

    @property
    def compared(self) -> int:
        """How many numbers were compared."""
        return sum(c.compared for c in self.comparisons)

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.comparisons)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "passed" if self.ok else "FAILED"
        head = ("implementation", "dtype", "array", "error", "plain error", "allowed", "")
        rows = [
            (
                c.implementation,
                c.dtype,
                c.what,
                *(f"{x:.2e}" for x in (c.error, c.plain, c.allowed)),
                "" if c.ok else "!",
            )
            for c in self.comparisons
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        table = [
            "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        wrong = [f"{c.implementation} {c.dtype}: {c.worst}" for c in self.comparisons if not c.ok]
        return "\n".join(
            [f"check_backends of {self.name}: {verdict} ({self.compared} numbers compared)", *table, *wrong]
        )


def check_backends(op: Any, *args: Any, rule: str = "2x", **settings: Any) -> BackendReport:
    """Compare every implementation of the kernels that `op` calls with the reference, forward and backward.

    `op` is the name of an op, an op, a function of Tensors or a Module; `args` are its inputs and `settings` the
    keyword arguments of a function or op. Float inputs are rounded to float32 and run in
    float32 and float64. The truth is the reference in float64. By the rule "2x" an array may be
    wrong by twice the largest error of the plain NumPy reference in its own dtype (in float64, which has no better
    truth, that of float32 scaled down), plus a floor of some roundings: of its largest number, and of the inputs
    and of what forward keeps for backward, as far as they move the result. So where the reference happens to be
    exact, as on small integers, others need not be.

    Raises `BackendError`, an `AssertionError`, with the table and the worst element; `GradientError` if there is
    nothing to compare, as for kernels with no implementation besides the reference; `ConfigError`.
    """
    check_choice("check_backends", "rule", rule, ("2x",))
    if isinstance(op, str):
        if op not in OPS:
            raise ConfigError("check_backends", f"there is no op {shown(op)}", nearest(op, OPS))
        op = OPS[op]
    if settings and isinstance(op, Module):
        fix = "Wrap it in a function of its inputs"
        raise ConfigError("check_backends", f"a Module takes no settings, got {sorted(settings)}", fix)
    problem = problem_of(op if isinstance(op, Module) else _of_tensors(op, settings), args)
    name = problem.function.name
    plain32 = _run(problem, "reference", np.float32)
    exact = _run(problem, "reference", np.float64)
    moved = [_run(problem, "reference", np.float64, _Nudge(seed)) for seed in range(_NUDGES)]
    comparisons = []
    for implementation in _implementations(name, problem):
        for dtype in (np.float32, np.float64):
            got = _run(problem, implementation, dtype)
            for what in exact:
                comparisons.append(_compare(implementation or "as served", dtype, what, got, plain32, exact, moved))
    report = BackendReport(name, comparisons)
    if not report.compared:
        problem_text = f"{name} returned no number that float32 can hold"
        raise GradientError("check_backends", problem_text, "Give it inputs that have elements, and smaller ones")
    if not report.ok:
        raise BackendError(report)
    return report


def _of_tensors(op: Any, settings: dict[str, Any]) -> Callable[..., Any]:
    """The op as a function of Tensors that keeps its name and those of its arguments."""

    def call(*inputs: Any) -> Any:
        return op(*inputs, **settings)

    functools.update_wrapper(call, op.forward if isinstance(op, Op) else op)
    call.__name__ = op.name if isinstance(op, Op) else getattr(op, "__name__", type(op).__name__)
    return call


def _implementations(name: str, problem: Problem) -> list[str | None]:
    """What serves every kernel that is called, besides the reference; None is the first choice of each family."""
    with families_used() as families:
        _run(problem, None, np.float32)
    choices = [host_implementations(family) for family in sorted(families)]
    common = [n for n in (choices[0] if choices else ()) if n != "reference" and all(n in c for c in choices)]
    mixed = [None] if len({c[0] for c in choices}) > 1 else []
    if not (common or mixed):
        what = f"kernels of {', '.join(sorted(families))}, which have" if families else "no kernel, so it has"
        problem_text = f"{name} calls {what} no implementation besides the reference"
        raise GradientError("check_backends", problem_text, "Check it with gradcheck")
    return [*common, *mixed]


class _Nudge:
    """Moves numbers by some roundings; watching autograd, those that ops keep for backward.

    So forward seems to have rounded otherwise, and terms that cancel in backward show their size.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x * (1 + _NUDGE * self.rng.uniform(-1, 1, x.shape))

    def called(self, op: Any, inputs: Any, arrays: Any, static: Any, outputs: Any, node: Any) -> None:
        if node is not None:
            node.saved = map_arrays(node.saved, lambda x: self(x) if x.dtype == np.float64 else x)

    def differentiated(self, node: Any, douts: Any, gradients: Any) -> None:
        """Nothing to do: the numbers are moved before."""

    def inside(self, module: Any) -> AbstractContextManager[None]:
        return nullcontext()


def _run(problem: Problem, implementation: str | None, dtype: Any, nudge: _Nudge | None = None) -> Arrays:
    """Outputs and gradients by name, all computed by one implementation in one dtype."""

    def given(x: Any) -> Any:
        if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
            return x
        x = x.astype(np.float32).astype(dtype)
        return x if nudge is None else nudge(x)

    with ExitStack() as stack:
        if implementation is not None:
            stack.enter_context(use_backend(implementation))
        token = watching.set(nudge)
        stack.callback(watching.reset, token)
        outs, pullback = problem.function.pull(*map(given, problem.inputs))
        found = {f"out[{i}]" if len(outs) > 1 else "out": out for i, out in enumerate(outs)}
        draw = np.random.default_rng(1).standard_normal
        # Nothing flows back into outputs that are not finite: the log-sum-exp of an empty row is -inf, and stays.
        gradients = pullback([np.where(np.isfinite(o), given(draw(o.shape)), 0).astype(o.dtype) for o in outs])
    names = problem.function.names
    for position in problem.wanted:
        g = gradients[position] if position < len(gradients) else None
        if g is None:
            raise GradientError("check_backends", f"backward returns no gradient for {names[position]}", "Return one")
        found[f"d{names[position]}"] = g
    return found


def _compare(
    implementation: str,
    dtype: Any,
    what: str,
    results: Arrays,
    plain32: Arrays,
    exact: Arrays,
    moved: Sequence[Arrays],
) -> Comparison:
    got, expected, plain = results[what], exact[what], plain32[what]
    eps32, eps = float(np.finfo(np.float32).eps), float(np.finfo(dtype).eps)
    promised = (plain if dtype == np.float32 else expected).dtype
    if got.shape != expected.shape or got.dtype != promised:
        text = f"{what} has shape {got.shape} and dtype {got.dtype}, expected {expected.shape} and {promised}"
        return Comparison(implementation, np.dtype(dtype).name, what, math.inf, 0.0, 0.0, got.size, text)
    counted = np.isfinite(expected) & np.isfinite(plain)  # beyond float32 there is nothing to hold it to

    def largest(difference: np.ndarray) -> float:
        return float(np.max(abs(difference), where=counted, initial=0.0))

    with np.errstate(all="ignore"):
        error = np.where(counted, abs(got - expected), 0.0)
        moves = [abs(other[what] - expected) for other in moved]
        shift = max(largest(np.where(move < _JUMP, move, 0)) for move in moves) / _NUDGE
        plain_error = largest(plain - expected) * eps / eps32
    same = np.isfinite(expected) | (got == expected) | (np.isnan(got) & np.isnan(expected))
    error = np.where(np.isnan(error) | ~same, np.inf, error)
    # Below the smallest normal number an implementation may have 0: exp of what is far below the largest score.
    floor = float(np.finfo(dtype).tiny) / eps
    allowed = 2 * plain_error + _ROUNDINGS * eps * (largest(expected) + shift) + floor
    text, worst = "", 0.0
    if error.size:
        index = index_of(int(error.argmax()), error.shape)
        where = element(what[1:], index, error.shape) if what.startswith("d") else f"{what}{list(index)}"
        text = f"{where} is {float(got[index]):.9g}, expected {float(expected[index]):.9g}"
        worst = float(error[index])
    compared = int((np.isfinite(plain) | ~np.isfinite(expected)).sum())
    return Comparison(implementation, np.dtype(dtype).name, what, worst, plain_error, allowed, compared, text)
