"""Learning rate schedules: each function here returns a function from the step to the learning rate.

Steps count from 0. Warm-up is linear and starts above zero: step s of `warmup_steps` has
peak (s + 1) / (warmup_steps + 1), and step `warmup_steps` is the first at the peak. What decays reaches
`min_lr` at `total_steps`, the step after the last, and stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minitransformer.checks import check_at_most, check_count, check_number

Schedule = Callable[[int], float]


def _check_decay(op: str, peak: float, min_lr: float, warmup_steps: int, total_steps: int) -> None:
    check_number(op, "peak", peak)
    check_number(op, "min_lr", min_lr)
    check_at_most(op, "min_lr", min_lr, "peak", peak)
    check_count(op, "warmup_steps", warmup_steps)
    check_count(op, "total_steps", total_steps)
    check_at_most(op, "warmup_steps", warmup_steps, "total_steps", total_steps)


def constant(peak: float, warmup_steps: int = 0) -> Schedule:
    """`peak` at every step after the warm-up."""
    check_number("schedules.constant", "peak", peak)
    check_count("schedules.constant", "warmup_steps", warmup_steps)
    op = "schedules.constant"
    return lambda step: peak * min(1.0, (check_count(op, "step", step) + 1) / (warmup_steps + 1))


def _decaying(
    peak: float, min_lr: float, warmup_steps: int, start: int, end: int, shape: Callable[[float], float]
) -> Schedule:
    """Warm up, stay at `peak` until `start`, then fall to `min_lr` at `end` along `shape`, from 1 to 0."""

    def schedule(step: int) -> float:
        check_count("schedule", "step", step)
        if step < start:
            return peak * min(1.0, (step + 1) / (warmup_steps + 1))
        if step >= end:
            return min_lr
        return min_lr + (peak - min_lr) * shape((step - start) / (end - start))

    return schedule


def linear(peak: float, min_lr: float, warmup_steps: int, total_steps: int) -> Schedule:
    """A straight line from `peak` after the warm-up to `min_lr` at `total_steps`."""
    _check_decay("schedules.linear", peak, min_lr, warmup_steps, total_steps)
    return _decaying(peak, min_lr, warmup_steps, warmup_steps, total_steps, lambda x: 1 - x)


def cosine(peak: float, min_lr: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Half a cosine from `peak` after the warm-up to `min_lr` at `total_steps`.

    Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts".
    """
    _check_decay("schedules.cosine", peak, min_lr, warmup_steps, total_steps)
    return _decaying(peak, min_lr, warmup_steps, warmup_steps, total_steps, lambda x: 0.5 * (1 + math.cos(math.pi * x)))


def warmup_stable_decay(peak: float, min_lr: float, warmup_steps: int, total_steps: int, decay_steps: int) -> Schedule:
    """`peak` after the warm-up, then a straight line to `min_lr` over the last `decay_steps` steps.

    Hu et al. 2024, "MiniCPM". One run at the peak can be ended by a decay of its own at any step.
    """
    op = "schedules.warmup_stable_decay"
    _check_decay(op, peak, min_lr, warmup_steps, total_steps)
    check_count(op, "decay_steps", decay_steps)
    both = warmup_steps + decay_steps
    check_at_most(op, "warmup_steps + decay_steps", both, "total_steps", total_steps)
    return _decaying(peak, min_lr, warmup_steps, total_steps - decay_steps, total_steps, lambda x: 1 - x)


def noam(d_model: int, warmup_steps: int, factor: float = 1.0) -> Schedule:
    """factor d_model^-0.5 min(n^-0.5, n warmup_steps^-1.5) with n = step + 1

    Vaswani et al. 2017, "Attention is all you need": a linear warm-up, then the inverse square root.
    """
    check_count("schedules.noam", "d_model", d_model, least=1)
    check_count("schedules.noam", "warmup_steps", warmup_steps, least=1)
    check_number("schedules.noam", "factor", factor)
    scale = factor * d_model**-0.5
    op = "schedules.noam"
    return lambda step: scale * min((check_count(op, "step", step) + 1) ** -0.5, (step + 1) * warmup_steps**-1.5)
