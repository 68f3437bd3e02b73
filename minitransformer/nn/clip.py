"""Clipping gradients by their norm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real

import numpy as np

from minitransformer.autograd import Tensor
from minitransformer.checks import is_number, shown
from minitransformer.errors import ConfigError, DTypeError, GradientError
from minitransformer.kernels import serve
from minitransformer.kernels.gpu.arrays import is_array, is_writable


def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> float:
    """Scale the `.grad`s in place so that their joint Euclidean norm is at most `max_norm`.

    Returns the norm before scaling. Tensors without `.grad` are left out, a tensor given twice counts
    once. `max_norm=math.inf` only measures. If the norm is NaN or infinite it is returned and no
    gradient is written: torch would multiply every one by NaN or 0. Test it with `math.isfinite`.

    Raises `ConfigError` unless `max_norm` is a positive number, `DTypeError` for what is no Tensor and for
    a `.grad` that is no float32 or float64 array, `GradientError` for one to scale that is read-only.
    Nothing has changed then.
    """
    if not (is_number(max_norm, 0) or (isinstance(max_norm, Real) and max_norm == math.inf)) or max_norm == 0:
        raise ConfigError(
            "clip_grad_norm_",
            f"max_norm is {shown(max_norm)}, expected a number above 0",
            "Pass math.inf to measure the norm without clipping",
        )
    if isinstance(parameters, np.ndarray) or not isinstance(parameters, Iterable):
        raise DTypeError("clip_grad_norm_", f"got {shown(parameters)}, expected Tensors", "Pass model.parameters()")
    tensors = {id(t): t for t in ([parameters] if isinstance(parameters, Tensor) else parameters)}
    for t in tensors.values():
        if not isinstance(t, Tensor):
            raise DTypeError(
                "clip_grad_norm_",
                f"got a {type(t).__name__}, expected Tensors",
                "Pass model.parameters()",
            )
    gradients = [t.grad for t in tensors.values() if t.grad is not None]
    for g in gradients:
        if not is_array(g) or g.dtype not in (np.float32, np.float64):
            raise DTypeError(
                "clip_grad_norm_",
                f"a .grad is {getattr(g, 'dtype', type(g).__name__)}, expected a float32 or float64 array",
                "Let backward fill .grad",
            )
    if not gradients:
        return 0.0
    kernels = serve("optimizer", *gradients)
    norm = math.sqrt(sum(kernels.squared_norm(g.reshape(-1)) for g in gradients))
    factor = kernels.clip_factor(norm, max_norm)
    if factor < 1:
        for g in gradients:
            if not is_writable(g):
                raise GradientError(
                    "clip_grad_norm_",
                    f"a .grad of shape {g.shape} is read-only, and the norm {norm:g} is above {max_norm:g}",
                    "Assign a copy: t.grad = t.grad.copy()",
                )
        for g in gradients:
            np.multiply(g, factor, out=g)
    return norm
