"""A gradient check inside a training: a few directions at the weights and batch of the moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitransformer.autograd import Parameter, Tensor, grad, no_grad
from minitransformer.checks import check_count
from minitransformer.errors import GradientError
from minitransformer.gradients.function import Function, Problem, holding
from minitransformer.gradients.numeric import Numeric, balanced, contract


def gradient_error(
    compute: Callable[[], Tensor], parameters: Sequence[Parameter], *, directions: int = 3, seed: int = 0
) -> float:
    """The largest error of `mt.grad(compute(), parameters)` along random directions, relative to its terms.

    `compute` returns one number and must be a function of the parameters alone: fix its dropout with
    `random.scope`. Its gradient comes from the kernels that serve now, the derivative to compare with from a
    complex step through the reference kernels, at the same weights in double precision. So about 1e-7 is right
    for float32 and 1e-16 for float64. Parameters and their `.grad` are as before afterwards. Raises
    `GradientError` if the loss or its gradient is not finite.
    """
    check_count("gradient_error", "directions", directions, least=1)

    def value(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        with holding(parameters, arrays), no_grad():
            return (compute().data,)

    def pull(*arrays: np.ndarray) -> Any:
        raise NotImplementedError  # the gradient is that of the live parameters

    arrays = tuple(p.data for p in parameters)
    gradients = [g.astype(np.float64) for g in grad(compute(), parameters)]
    function = Function("the loss", tuple(f"parameter {i}" for i in range(len(arrays))), value, pull)
    numeric = Numeric(Problem(function, arrays, tuple(range(len(arrays)))), "complex", None)
    if not np.isfinite(numeric.outs[0]).all() or not all(np.isfinite(g).all() for g in gradients):
        raise GradientError("gradient_error", "the loss or its gradient is not finite", "See diagnose.first_bad_op")
    rng = np.random.default_rng(seed)
    worst = 0.0
    for _ in range(directions):
        direction = balanced(dict(enumerate(gradients)), rng)
        expected = contract([np.ones(())], [out.reshape(()) for out in numeric.along(direction)])
        terms = [gradients[i] * v for i, v in direction.items()]
        size = float(sum(abs(t).sum() for t in terms)) or 1.0
        worst = max(worst, abs(float(sum(t.sum() for t in terms)) - expected.value) / size)
    return worst
