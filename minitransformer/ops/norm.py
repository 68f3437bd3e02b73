"""Layer norm and RMS norm over the last axes."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import register
from minitransformer.checks import check_number
from minitransformer.errors import GradientError, ShapeError
from minitransformer.kernels.gpu.arrays import contiguous
from minitransformer.ops.activation import check_float


class LayerNorm(NamedTuple):
    rows: np.ndarray  # (N, C), the input
    weight: np.ndarray | None
    mean: np.ndarray  # (N,)
    rstd: np.ndarray  # (N,)
    shape: tuple[int, ...]
    normalized_shape: tuple[int, ...]
    biased: bool
    kernel: ModuleType


class RMSNorm(NamedTuple):
    rows: np.ndarray  # (N, C), the input
    weight: np.ndarray | None
    rrms: np.ndarray  # (N,)
    shape: tuple[int, ...]
    normalized_shape: tuple[int, ...]
    kernel: ModuleType


def _rows(
    op: str, x: np.ndarray, normalized_shape: tuple[int, ...], **affine: np.ndarray | None
) -> tuple[np.ndarray, dict[str, np.ndarray | None]]:
    """x as (N, C) and the affine parameters as (C,), all checked."""
    check_float(op, x=x)
    if not normalized_shape or x.shape[-len(normalized_shape) :] != normalized_shape:
        raise ShapeError(
            op,
            f"x has shape {x.shape}, expected its last axes to be {normalized_shape}",
            "Pass the trailing shape that the norm was made for",
        )
    flat: dict[str, np.ndarray | None] = {}
    for name, array in affine.items():
        if array is not None:
            check_float(op, **{name: array})
            if array.shape != normalized_shape:
                raise ShapeError(
                    op,
                    f"{name} has shape {array.shape}, expected {normalized_shape}",
                    "Use one value per feature",
                )
        flat[name] = None if array is None else contiguous(array).reshape(-1)
    width = math.prod(normalized_shape)
    rows = math.prod(x.shape[: x.ndim - len(normalized_shape)])
    return contiguous(x).reshape(rows, width), flat


def layer_norm_forward(
    x: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    normalized_shape: tuple[int, ...],
    eps: float = 1e-5,
) -> tuple[np.ndarray, LayerNorm]:
    """Normalise the last axes to mean 0 and variance 1, then scale and shift (Ba et al. 2016)."""
    eps = check_number("layer_norm", "eps", eps)
    rows, affine = _rows("layer_norm", x, normalized_shape, weight=weight, bias=bias)
    kernel = kernels.serve("rowwise", rows, *(a for a in affine.values() if a is not None))
    out, mean, rstd = kernel.layer_norm_forward(rows, affine["weight"], affine["bias"], eps)
    return out.reshape(x.shape), LayerNorm(
        rows, affine["weight"], mean, rstd, x.shape, normalized_shape, bias is not None, kernel
    )


def layer_norm_backward(dout: np.ndarray, saved: LayerNorm) -> tuple[np.ndarray | None, ...]:
    if dout.dtype.kind != saved.rows.dtype.kind:
        raise GradientError("layer_norm", "x is real beside complex parameters, and has no real gradient", "Cast x too")
    drows = contiguous(dout).reshape(saved.rows.shape)
    dx, dweight, dbias = saved.kernel.layer_norm_backward(drows, saved.rows, saved.weight, saved.mean, saved.rstd)
    return (
        dx.reshape(saved.shape),
        None if saved.weight is None else dweight.reshape(saved.normalized_shape),
        dbias.reshape(saved.normalized_shape) if saved.biased else None,
    )


def rms_norm_forward(
    x: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    normalized_shape: tuple[int, ...],
    eps: float = 1e-5,
) -> tuple[np.ndarray, RMSNorm]:
    """Divide the last axes by their root mean square, then scale (Zhang and Sennrich 2019)."""
    eps = check_number("rms_norm", "eps", eps)
    rows, affine = _rows("rms_norm", x, normalized_shape, weight=weight)
    kernel = kernels.serve("rowwise", rows, *(a for a in affine.values() if a is not None))
    out, rrms = kernel.rms_norm_forward(rows, affine["weight"], eps)
    return out.reshape(x.shape), RMSNorm(rows, affine["weight"], rrms, x.shape, normalized_shape, kernel)


def rms_norm_backward(dout: np.ndarray, saved: RMSNorm) -> tuple[np.ndarray | None, ...]:
    drows = contiguous(dout).reshape(saved.rows.shape)
    dx, dweight = saved.kernel.rms_norm_backward(drows, saved.rows, saved.weight, saved.rrms)
    return dx.reshape(saved.shape), None if saved.weight is None else dweight.reshape(saved.normalized_shape)


register("layer_norm", layer_norm_forward, layer_norm_backward)
register("rms_norm", rms_norm_forward, rms_norm_backward)
