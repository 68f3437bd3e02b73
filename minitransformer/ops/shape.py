"""Moving elements without changing them: the backward of each puts them back.

Forward returns views where NumPy does; backward always returns fresh arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import check_arrays, check_axis, refused_index, register
from minitransformer.checks import is_integer, shown
from minitransformer.errors import AllocationError, DTypeError, RangeError, ShapeError
from minitransformer.kernels.gpu.arrays import is_array, like, on_device, plain, zeros
from minitransformer.ops.arithmetic import Shapes, check_operands, shapes_of, sum_to

MAX_AXES = 64  # of NumPy


class Shape(NamedTuple):
    shape: tuple[int, ...]


class Dims(NamedTuple):
    dims: tuple[int, ...]


class Index(NamedTuple):
    shape: tuple[int, ...]
    index: Any


class Pieces(NamedTuple):
    sizes: tuple[int, ...]
    dim: int


class Choice(NamedTuple):
    shapes: Shapes
    condition: np.ndarray


def check_items(op: str, name: str, values: Any) -> Sequence[Any]:
    """`values`, one by one as they are; `DTypeError` for what is no list or tuple."""
    if not isinstance(values, (list, tuple)):
        raise DTypeError(op, f"{name} is {shown(values)}, expected a list or tuple", f"Pass {name} as [a, b]")
    return values


def check_shape(op: str, shape: Any, least: int = 0) -> tuple[int, ...]:
    """`shape` as a tuple of ints from `least`; `DTypeError`, or `ShapeError` for sizes that no array has."""
    if not isinstance(shape, (tuple, list)) or not all(map(is_integer, shape)):
        raise DTypeError(op, f"got {shown(shape)}, expected a tuple of integers", "Pass sizes as in (2, 3)")
    if any(not least <= size < 2**63 for size in shape):
        raise ShapeError(op, f"a size in {shown(shape)} is outside {least} to 2**63 - 1", "Pass other sizes")
    return tuple(int(size) for size in shape)


def reshape_forward(x: np.ndarray, *, shape: tuple[int, ...]) -> tuple[np.ndarray, Shape]:
    shape = check_shape("reshape", shape, least=-1)
    try:
        return x.reshape(shape), Shape(x.shape)
    except ValueError:
        raise ShapeError(
            "reshape",
            f"{x.size} elements of shape {x.shape} do not fit {shape}",
            "The product of the new sizes must be the same; one size may be -1",
        ) from None


def reshape_backward(dout: np.ndarray, saved: Shape) -> tuple[np.ndarray]:
    return (dout.copy().reshape(saved.shape),)


def transpose_forward(x: np.ndarray, *, dim0: int, dim1: int) -> tuple[np.ndarray, Dims]:
    dims = (check_axis("transpose", dim0, x.ndim), check_axis("transpose", dim1, x.ndim))
    return x.swapaxes(*dims), Dims(dims)


def transpose_backward(dout: np.ndarray, saved: Dims) -> tuple[np.ndarray]:
    return (dout.swapaxes(*saved.dims).copy(),)


def permute_forward(x: np.ndarray, *, dims: tuple[int, ...]) -> tuple[np.ndarray, Dims]:
    axes = tuple(check_axis("permute", dim, x.ndim) for dim in dims)
    if sorted(axes) != list(range(x.ndim)):
        raise ShapeError(
            "permute", f"dims are {dims}, expected each of {x.ndim} axes once", "Name every axis exactly once"
        )
    return x.transpose(axes), Dims(axes)


def permute_backward(dout: np.ndarray, saved: Dims) -> tuple[np.ndarray]:
    return (dout.transpose(tuple(np.argsort(saved.dims))).copy(),)


def expand_forward(x: np.ndarray, *, shape: tuple[int, ...]) -> tuple[np.ndarray, Shape]:
    """`x` repeated along axes of size 1 (and new leading axes) to `shape`, as a read-only view."""
    check_arrays("expand", x=x)
    shape = check_shape("expand", shape)
    if math.prod(shape) * x.itemsize >= 2**63:
        raise AllocationError("expand", f"shape {shape} is larger than any array", "Choose smaller sizes")
    try:
        return np.broadcast_to(x, shape), Shape(x.shape)
    except ValueError:
        raise ShapeError(
            "expand", f"shape {x.shape} does not broadcast to {shape}", "Only axes of size 1 can be expanded"
        ) from None


def expand_backward(dout: np.ndarray, saved: Shape) -> tuple[np.ndarray]:
    return (sum_to(dout, saved.shape),)


def getitem_forward(x: np.ndarray, *, index: Any) -> tuple[np.ndarray, Index]:
    """NumPy indexing: slices are views, integer and boolean arrays gather copies."""
    try:
        return x[_beside(x, index)], Index(x.shape, index)
    except (IndexError, TypeError, ValueError, OverflowError) as error:
        raise refused_index("getitem", x.shape, error) from None


def getitem_backward(dout: np.ndarray, saved: Index) -> tuple[np.ndarray]:
    parts = saved.index if isinstance(saved.index, tuple) else (saved.index,)
    gathers = any(isinstance(part, list) or is_array(part) for part in parts)
    if gathers and on_device(dout):  # summed in order, as no scattered addition on a GPU is
        size = math.prod(saved.shape)
        places = np.arange(size).reshape(saved.shape)[_beside(np.empty(0), saved.index)].reshape(-1)
        kernel = kernels.serve("rowwise", dout)
        return (kernel.embedding_backward(dout.reshape(-1, 1), like(dout, places), size).reshape(saved.shape),)
    dx = zeros(saved.shape, dout)
    if gathers:
        np.add.at(dx, saved.index, dout)  # a gathered element may occur several times
    else:
        dx[saved.index] = dout
    return (dx,)


def _beside(x: np.ndarray, index: Any) -> Any:
    """`index` with its arrays where `x` is."""
    if isinstance(index, tuple):
        return tuple(_beside(x, part) for part in index)
    return like(x, index) if is_array(index) else index


def concat_forward(*arrays: np.ndarray, dim: int) -> tuple[np.ndarray, Pieces]:
    if not arrays:
        raise ShapeError("concat", "got no tensors, expected at least one", "Pass a non-empty sequence")
    check_arrays("concat", **{f"tensor {i}": array for i, array in enumerate(arrays)})
    axis = check_axis("concat", dim, arrays[0].ndim)
    rest = {array.shape[:axis] + array.shape[axis + 1 :] for array in arrays}
    if len(rest) > 1 or len({array.ndim for array in arrays}) > 1:
        raise ShapeError(
            "concat",
            f"shapes {', '.join(str(array.shape) for array in arrays)} differ outside axis {axis}",
            "Make all other sizes equal",
        )
    return np.concatenate(arrays, axis), Pieces(tuple(array.shape[axis] for array in arrays), axis)


def concat_backward(dout: np.ndarray, saved: Pieces) -> tuple[np.ndarray, ...]:
    return tuple(piece.copy() for piece in np.split(dout, _edges(saved.sizes), saved.dim))


def _edges(sizes: Sequence[int]) -> list[int]:
    """Where pieces of these sizes end, but the last."""
    return list(accumulate(sizes))[:-1]


def stack_forward(*arrays: np.ndarray, dim: int) -> tuple[np.ndarray, Dims]:
    check_arrays("stack", **{f"tensor {i}": array for i, array in enumerate(arrays)})
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) != 1:
        raise ShapeError(
            "stack",
            f"got shapes {shapes}, expected one or more equal shapes",
            "Make them equal, or use concat",
        )
    axis = check_axis("stack", dim, len(shapes[0]) + 1)
    if len(shapes[0]) == MAX_AXES:
        raise ShapeError("stack", f"the tensors have {MAX_AXES} axes, and no array has more", "Reshape them")
    return np.stack(arrays, axis), Dims((axis,))


def stack_backward(dout: np.ndarray, saved: Dims) -> tuple[np.ndarray, ...]:
    (axis,) = saved.dims
    return tuple(np.take(dout, i, axis) for i in range(dout.shape[axis]))


def split_forward(x: np.ndarray, *, sizes: int | Sequence[int], dim: int) -> tuple[list[np.ndarray], Pieces]:
    """Consecutive pieces along `dim`: of length `sizes` (the last may be shorter), or of these lengths."""
    check_arrays("split", x=x)
    axis = check_axis("split", dim, x.ndim)
    length = x.shape[axis]
    if is_integer(sizes):
        if sizes < 1:  # type: ignore[operator]
            raise RangeError("split", f"the piece size is {sizes}, expected at least 1", "Pass a positive size")
        size = int(sizes)  # type: ignore[arg-type]
        lengths = [min(size, length - start) for start in range(0, length, size)] or [0]
    else:
        lengths = list(check_shape("split", sizes, least=-(2**63)))
        if sum(lengths) != length or min(lengths, default=0) < 0:
            raise ShapeError(
                "split",
                f"sizes {lengths} sum to {sum(lengths)}, expected {length} for axis {axis} of shape {x.shape}",
                "Pass non-negative sizes that sum to the axis",
            )
    return np.split(x, _edges(lengths), axis), Pieces(tuple(lengths), axis)


def split_backward(douts: tuple[np.ndarray, ...], saved: Pieces) -> tuple[np.ndarray]:
    return (np.concatenate(douts, saved.dim),)


def where_forward(a: Any, b: Any, condition: np.ndarray) -> tuple[np.ndarray, Choice]:
    """`a` where `condition`, else `b`; the branch not taken gets gradient 0, even if it is NaN there."""
    arrays = [x for x in (a, b) if is_array(x)]
    condition = plain(condition)  # a comparison of 0-d arrays gives one bool
    condition = like(arrays[0], condition) if arrays else condition  # a mask may come from the host
    check_operands("where", a, b)
    if max(map(np.ndim, (condition, a, b))) > 32:
        raise ShapeError("where", "an operand has more than 32 axes, which numpy.where has not", "Reshape them")
    if condition.dtype != np.bool_:
        raise DTypeError("where", "the condition is not a bool array", "Compare first: mt.where(t > 0, a, b)")
    try:
        np.broadcast_shapes(condition.shape, np.shape(a), np.shape(b))
    except ValueError:
        raise ShapeError(
            "where",
            f"condition {condition.shape}, a {np.shape(a)} and b {np.shape(b)} do not broadcast",
            "Compared from the right, sizes must be equal or 1",
        ) from None
    return np.where(condition, a, b), Choice(shapes_of(a, b), condition)


def where_backward(dout: np.ndarray, saved: Choice) -> tuple[np.ndarray | None, ...]:
    (a, b), condition = saved
    return (
        None if a is None else sum_to(np.where(condition, dout, 0), a),
        None if b is None else sum_to(np.where(condition, 0, dout), b),
    )


register("reshape", reshape_forward, reshape_backward)
register("transpose", transpose_forward, transpose_backward)
register("permute", permute_forward, permute_backward)
register("expand", expand_forward, expand_backward)
register("getitem", getitem_forward, getitem_backward)
register("concat", concat_forward, concat_backward)
register("stack", stack_forward, stack_backward)
register("split", split_forward, split_backward, many=True)
register("where", where_forward, where_backward)
