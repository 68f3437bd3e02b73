"""Clipping gradients by their norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import numpy as np

from minitransformer.autograd import Tensor
from minitransformer.errors import ConfigError, DTypeError
from minitransformer.kernels import serve


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale the `.grad`s in place so that their joint Euclidean norm is at most `max_norm`.

    Returns the norm before scaling. Tensors without `.grad` are left out, a tensor given twice counts
    once. `max_norm=math.inf` only measures. If the norm is NaN or infinite it is returned and no
    gradient is written: torch would multiply every one by NaN or 0. Test it with `math.isfinite`.

    Raises `ConfigError` unless `max_norm` is a positive number, `DTypeError` for what is no Tensor.
    """
    if not isinstance(max_norm, Real) or not max_norm > 0:
        raise ConfigError(
            "clip_grad_norm_",
            f"max_norm is {max_norm!r}, expected a number above 0",
            "Pass math.inf to measure the norm without clipping",
        )
    tensors = {id(t): t for t in ([parameters] if isinstance(parameters, Tensor) else parameters)}
    for t in tensors.values():
        if not isinstance(t, Tensor):
            raise DTypeError(
                "clip_grad_norm_",
                f"got a {type(t).__name__}, expected Tensors",
                "Pass model.parameters()",
            )
    gradients = [t.grad for t in tensors.values() if t.grad is not None]
    if not gradients:
        return 0.0
    kernels = serve("optimizer", *gradients)
    norm = math.sqrt(sum(kernels.squared_norm(g.reshape(-1)) for g in gradients))
    factor = kernels.clip_factor(norm, max_norm)
    if factor < 1:
        for g in gradients:
            np.multiply(g, factor, out=g)
    return norm
