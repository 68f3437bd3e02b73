"""`gradcheck`: is a backward the derivative of its forward, and does it behave?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minitransformer.checks import check_choice, check_flag, is_integer, is_number, shown
from minitransformer.errors import ConfigError, GradientError
from minitransformer.gradients.function import problem_of
from minitransformer.gradients.report import GradcheckReport
from minitransformer.gradients.run import Check

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
    directions: int | None = None,
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
    whole Jacobian, "directional" products with `directions` random vectors; None decides by size. `directions`
    None is 1 in float64 by complex step, where hardly any error is below what is allowed, and 2 otherwise.

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
    check_flag("gradcheck", "raise_exception", raise_exception)
    eps, atol, rtol = (None if x is None else float(x) for x in (eps, atol, rtol))
    if eps == 0:
        raise ConfigError("gradcheck", "eps is 0, expected a number above 0", "Leave it out for the default")
    problem = problem_of(fn, inputs)
    if any(np.ndim(x) > 32 for x in problem.inputs):
        raise ConfigError("gradcheck", "an input has more than 32 axes", "Reshape it: fewer axes show the same")
    check = Check(problem, method, mode, directions, eps, atol, rtol, on_kink)
    report = check.run()
    for observer in observers:
        observer(report)
    if raise_exception and not report.ok:
        raise GradcheckError(report)
    return report


def _check_options(method: Any, mode: Any, directions: Any, eps: Any, atol: Any, rtol: Any, on_kink: Any) -> None:
    for name, value, known in (
        ("method", method, ("complex", "central")),
        ("mode", mode, ("full", "directional", None)),
        ("on_kink", on_kink, ("skip", "raise")),
    ):
        check_choice("gradcheck", name, value, known)
    if directions is not None and (not is_integer(directions) or directions < 1):
        problem = f"directions is {shown(directions)}, expected an integer from 1"
        raise ConfigError("gradcheck", problem, "No direction would compare nothing")
    for name, value in (("eps", eps), ("atol", atol), ("rtol", rtol)):
        if value is not None and not is_number(value, 0, 1e30):
            problem = f"{name} is {shown(value)}, expected a number of at least 0"
            raise ConfigError("gradcheck", problem, "Leave it out for the default")
