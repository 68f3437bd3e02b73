"""Activations, softmax and log-softmax."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import check_axis, register
from minitransformer.checks import check_choice
from minitransformer.errors import DTypeError, ShapeError
from minitransformer.kernels.gpu.arrays import contiguous, is_array


class Elementwise(NamedTuple):
    """`kept` is the input or the output, whichever the backward is written in."""

    kept: np.ndarray
    kernel: ModuleType


class Gelu(NamedTuple):
    x: np.ndarray  # at least 1-d: arithmetic on 0-d arrays yields NumPy scalars, which kernels cannot fill
    tanh: bool  # which form
    kernel: ModuleType


class Gated(NamedTuple):
    gate: np.ndarray
    up: np.ndarray
    kernel: ModuleType


class Softmax(NamedTuple):
    rows: np.ndarray  # (N, C), the output
    shape: tuple[int, ...]  # of the input with the axis moved last
    axis: int
    kernel: ModuleType


def check_float(op: str, **arrays: np.ndarray) -> None:
    """`DTypeError` unless every array is float or complex."""
    for name, array in arrays.items():
        if not is_array(array) or array.dtype.kind not in "fc":
            raise DTypeError(
                op,
                f"{name} has dtype {getattr(array, 'dtype', type(array).__name__)}, expected float32 or float64",
                "Convert it: t.to('float32')",
            )


def relu_forward(x: np.ndarray) -> tuple[np.ndarray, Elementwise]:
    check_float("relu", x=x)
    kernel = kernels.serve("pointwise", x)
    out = kernel.relu_forward(x)
    return out, Elementwise(out, kernel)


def relu_backward(dout: np.ndarray, saved: Elementwise) -> tuple[np.ndarray]:
    return (saved.kernel.relu_backward(dout, saved.kept),)


def sigmoid_forward(x: np.ndarray) -> tuple[np.ndarray, Elementwise]:
    check_float("sigmoid", x=x)
    kernel = kernels.serve("pointwise", x)
    out = kernel.sigmoid_forward(x)
    return out, Elementwise(out, kernel)


def sigmoid_backward(dout: np.ndarray, saved: Elementwise) -> tuple[np.ndarray]:
    return (saved.kernel.sigmoid_backward(dout, saved.kept),)


def tanh_forward(x: np.ndarray) -> tuple[np.ndarray, Elementwise]:
    check_float("tanh", x=x)
    kernel = kernels.serve("pointwise", x)
    out = kernel.tanh_forward(x)
    return out, Elementwise(out, kernel)


def tanh_backward(dout: np.ndarray, saved: Elementwise) -> tuple[np.ndarray]:
    return (saved.kernel.tanh_backward(dout, saved.kept),)


def silu_forward(x: np.ndarray) -> tuple[np.ndarray, Elementwise]:
    check_float("silu", x=x)
    kernel = kernels.serve("pointwise", x)
    return kernel.silu_forward(x), Elementwise(x, kernel)


def silu_backward(dout: np.ndarray, saved: Elementwise) -> tuple[np.ndarray]:
    return (saved.kernel.silu_backward(dout, saved.kept),)


def gelu_forward(x: np.ndarray, *, approximate: str = "none") -> tuple[np.ndarray, Gelu]:
    """GELU: exact by erf ("none", BERT's) or by tanh ("tanh", GPT-2's)."""
    check_float("gelu", x=x)
    check_choice("gelu", "approximate", approximate, ("none", "tanh"))
    kernel = kernels.serve("pointwise", x)
    saved = Gelu(np.atleast_1d(x), approximate == "tanh", kernel)
    out = kernel.gelu_tanh_forward(saved.x) if saved.tanh else kernel.gelu_forward(saved.x)
    return out.reshape(x.shape), saved


def gelu_backward(dout: np.ndarray, saved: Gelu) -> tuple[np.ndarray]:
    backward = saved.kernel.gelu_tanh_backward if saved.tanh else saved.kernel.gelu_backward
    return (backward(np.atleast_1d(dout), saved.x).reshape(dout.shape),)


def swiglu_forward(gate: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, Gated]:
    """silu(gate) * up, both of one shape."""
    check_float("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ShapeError(
            "swiglu",
            f"gate has shape {gate.shape}, up {up.shape}, expected equal",
            "Project both to one width",
        )
    kernel = kernels.serve("pointwise", gate, up)
    return kernel.swiglu_forward(gate, up), Gated(gate, up, kernel)


def swiglu_backward(dout: np.ndarray, saved: Gated) -> tuple[np.ndarray, np.ndarray]:
    return saved.kernel.swiglu_backward(dout, saved.gate, saved.up)


def as_rows(x: np.ndarray, axis: int) -> np.ndarray:
    """(N, C) contiguous, with `axis`, from 0 on, moved last."""
    x = contiguous(_moved(x, axis, x.ndim - 1))
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _back(rows: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The inverse of `as_rows`, `shape` being the one with the axis last."""
    return contiguous(_moved(rows.reshape(shape), len(shape) - 1, axis))


def _moved(x: np.ndarray, source: int, destination: int) -> np.ndarray:
    """`np.moveaxis`, which takes as long as a small softmax to find that there is nothing to move."""
    return x if source == destination else np.moveaxis(x, source, destination)


def softmax_forward(x: np.ndarray, *, dim: int = -1) -> tuple[np.ndarray, Softmax]:
    check_float("softmax", x=x)
    axis = check_axis("softmax", dim, x.ndim)
    kernel = kernels.serve("rowwise", x)
    out = kernel.softmax_forward(as_rows(x, axis))
    shape = _moved(x, axis, x.ndim - 1).shape
    return _back(out, shape, axis), Softmax(out, shape, axis, kernel)


def softmax_backward(dout: np.ndarray, saved: Softmax) -> tuple[np.ndarray]:
    dx = saved.kernel.softmax_backward(as_rows(dout, saved.axis), saved.rows)
    return (_back(dx, saved.shape, saved.axis),)


def log_softmax_forward(x: np.ndarray, *, dim: int = -1) -> tuple[np.ndarray, Softmax]:
    check_float("log_softmax", x=x)
    axis = check_axis("log_softmax", dim, x.ndim)
    kernel = kernels.serve("rowwise", x)
    out = kernel.log_softmax_forward(as_rows(x, axis))
    shape = _moved(x, axis, x.ndim - 1).shape
    return _back(out, shape, axis), Softmax(out, shape, axis, kernel)


def log_softmax_backward(dout: np.ndarray, saved: Softmax) -> tuple[np.ndarray]:
    dx = saved.kernel.log_softmax_backward(as_rows(dout, saved.axis), saved.rows)
    return (_back(dx, saved.shape, saved.axis),)


register("relu", relu_forward, relu_backward)
register("sigmoid", sigmoid_forward, sigmoid_backward)
register("tanh", tanh_forward, tanh_backward)
register("silu", silu_forward, silu_backward)
register("gelu", gelu_forward, gelu_backward)
register("swiglu", swiglu_forward, swiglu_backward)
register("softmax", softmax_forward, softmax_backward)
register("log_softmax", log_softmax_forward, log_softmax_backward)
