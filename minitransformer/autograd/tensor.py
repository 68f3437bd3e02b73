"""Tensor: its state, its operators and methods, and its part in NumPy's protocols.

What computes is called by name from the registry; the ops themselves live in `minitransformer.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minitransformer.autograd.base import (
    OPS,
    TensorBase,
    as_array,
    check_axis,
    check_same_device,
    recording,
    target_named,
)
from minitransformer.autograd.graph import differentiate
from minitransformer.autograd.indexing import assign, check_writable, plain_index
from minitransformer.autograd.protocols import UFUNCS, call_on_arrays, compare
from minitransformer.checks import check_flag
from minitransformer.errors import DeviceError, DTypeError, GradientError, RangeError, ShapeError
from minitransformer.kernels.gpu.arrays import device_of, plain, to_host


def _operator(name: str, swap: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Tensor, other: Any) -> Any:
        if other is None or isinstance(other, str):
            return NotImplemented
        return OPS[name](other, self) if swap else OPS[name](self, other)

    return method


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Tensor, other: Any) -> Any:
        if other is None or isinstance(other, str):
            return NotImplemented
        return Tensor(compare(name, self._data, as_array(name, other)))

    return method


class Tensor(TensorBase):
    """An array that remembers how it was computed.

    `data` is a NumPy array (float32 or float64; integers, bools and complex numbers as data without
    gradient). `grad` is a NumPy array of the same shape that this leaf owns, or None before backward.
    """

    __slots__ = ()

    def __init__(self, data: np.ndarray, requires_grad: bool = False) -> None:
        self._data = plain(as_array("Tensor", data))
        self._node = None
        self._index = 0
        self._version = [0]
        self._requires_grad = False
        self.grad = None
        if requires_grad is not False:
            self.requires_grad = requires_grad

    @classmethod
    def _wrap(cls, array: Any) -> Tensor:
        """A Tensor around an op's output, which needs no checks."""
        t = object.__new__(Tensor)
        t._data = array if type(array) is np.ndarray else plain(array)
        t._node, t._index, t._version, t._requires_grad, t.grad = None, 0, [0], False, None
        return t

    @property
    def data(self) -> np.ndarray:
        """The array itself, not a copy. Assigning writes into it, and backward notices."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        array = plain(as_array("data", value))
        check_same_device("data", "the new data", array, self.device)
        if array.shape != self.shape:
            raise ShapeError(
                "data",
                f"the new data has shape {array.shape}, expected {self.shape}",
                "Make a new tensor for another shape",
            )
        if not np.can_cast(array.dtype, self.dtype, "same_kind"):
            raise DTypeError(
                "data",
                f"the new data has dtype {array.dtype}, expected {self.dtype}",
                "Convert it with array.astype(...)",
            )
        check_writable("data", self._data)
        with np.errstate(all="ignore"):  # too large for float32 is infinity
            np.copyto(self._data, array, casting="same_kind")
        self._version[0] += 1

    @property
    def requires_grad(self) -> bool:
        """Whether backward computes a gradient for this tensor or for what it was computed from."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        value = check_flag("requires_grad", "requires_grad", value)
        if value and self._data.dtype.kind not in "fc":
            raise DTypeError(
                "requires_grad",
                f"a tensor of dtype {self.dtype} has no gradient, expected float32 or float64",
                "Convert its data first: array.astype(np.float32)",
            )
        if not value and self._node is not None:
            raise GradientError("requires_grad", "the tensor is the result of an op, expected a leaf", "Use t.detach()")
        self._requires_grad = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    @property
    def dtype(self) -> np.dtype:
        return self._data.dtype

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def device(self) -> str:
        """Where its numbers are: "cpu", "cuda", or "simulator", a GPU in Python."""
        return device_of(self._data)

    @property
    def is_leaf(self) -> bool:
        """Whether the tensor was given rather than computed: only leaves receive `.grad`."""
        return self._node is None

    def numpy(self) -> np.ndarray:
        """The array itself (shared memory). Do not write to it between forward and backward.

        `DeviceError` for a tensor that is not on the host.
        """
        if not isinstance(self._data, np.ndarray):
            problem = f"the tensor is on {self.device!r}, expected it on 'cpu'"
            raise DeviceError("numpy", problem, "Copy it to the host: t.to('cpu').numpy()")
        return self._data

    def item(self) -> Any:
        """The one element as a Python number; `ShapeError` if there are more."""
        if self._data.size != 1:
            raise ShapeError(
                "item", f"the tensor has shape {self.shape}, expected one element", "Index or reduce it first"
            )
        return self._data.item()

    def detach(self) -> Tensor:
        """The same memory without history; writes through either are noticed by backward."""
        t = Tensor._wrap(self._data)
        t._version = self._version
        return t

    def to(self, target: Any) -> Tensor:
        """This tensor on a device ("cpu", "cuda", "simulator") or in a dtype; itself if it is so already.

        Recorded for backward, which moves or casts the gradient back.
        """
        goal = target_named(target)
        if isinstance(goal, str):
            return self if goal == self.device else OPS["move"](self, device=goal)
        return self if goal == self.dtype else OPS["cast"](self, dtype=goal)

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add the gradient of this tensor to the `.grad` of every leaf it was computed from.

        `gradient` is the upstream gradient of this tensor's shape; 1 if the tensor is one number.
        Raises `GradientError` if there is nothing to differentiate, if the graph was freed by an earlier
        call, or if an array that backward needs was written to; then no `.grad` has changed.
        """
        for leaf, g in differentiate(self, gradient, None, check_flag("backward", "retain_graph", retain_graph)):
            assert g is not None
            if leaf.grad is None:
                leaf.grad = g.copy()
            else:
                np.add(leaf.grad, g, out=leaf.grad)

    # NumPy's own operators ask here first, so `array + tensor` is a Tensor and keeps its history.
    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        name = UFUNCS.get(ufunc.__name__)
        if method != "__call__" or kwargs or name is None:
            raise DTypeError(
                f"numpy.{ufunc.__name__}",
                "Tensors do not take part in this call, which would lose their gradient",
                "Use the Tensor's own operations, or t.numpy() for plain numbers",
            )
        if name in OPS:
            return OPS[name](*inputs)
        return Tensor(compare(name, *(as_array(name, x) for x in inputs)))

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Other functions of NumPy see the plain array, and are refused where that loses a gradient."""
        return call_on_arrays(func, args, kwargs)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._data.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._data.__dlpack_device__()

    __add__, __radd__ = _operator("add"), _operator("add", swap=True)
    __sub__, __rsub__ = _operator("subtract"), _operator("subtract", swap=True)
    __mul__, __rmul__ = _operator("multiply"), _operator("multiply", swap=True)
    __truediv__, __rtruediv__ = _operator("divide"), _operator("divide", swap=True)
    __pow__, __rpow__ = _operator("power"), _operator("power", swap=True)
    __matmul__, __rmatmul__ = _operator("matmul"), _operator("matmul", swap=True)
    __eq__, __ne__ = _comparison("eq"), _comparison("ne")
    __lt__, __le__ = _comparison("lt"), _comparison("le")
    __gt__, __ge__ = _comparison("gt"), _comparison("ge")
    __and__, __or__, __xor__ = _comparison("and_"), _comparison("or_"), _comparison("xor")
    __hash__ = object.__hash__

    def __neg__(self) -> Tensor:
        return OPS["multiply"](self, -1)

    def __invert__(self) -> Tensor:
        if self._data.dtype.kind not in "biu":
            raise DTypeError("invert", f"~ cannot be taken of {self.dtype}", "Use it on bools, as ~(t > 0)")
        return Tensor(~self._data)

    def __getitem__(self, index: Any) -> Tensor:
        return OPS["getitem"](self, index=plain_index("getitem", index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._node is not None or (self._requires_grad and recording.get()):
            raise GradientError(
                "setitem",
                "writing into a tensor with a gradient history would make its gradient wrong",
                "Build the result with mt.where or mt.concat, or write inside mt.no_grad()",
            )
        if isinstance(value, Tensor) and value.requires_grad and recording.get():
            raise GradientError(
                "setitem",
                "the assigned tensor requires a gradient, which a write does not record",
                "Use mt.where or mt.concat, or assign value.detach()",
            )
        assign(self._data, index, value)
        self._version[0] += 1

    def __len__(self) -> int:
        if not self.shape:
            raise ShapeError("len", "the tensor is a single number", "Use t.item()")
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self._real("float"))

    def __int__(self) -> int:
        number = self._real("int")
        if not math.isfinite(number):
            raise RangeError("int", f"the element is {number}, which no integer is", "Look for where it came from")
        return int(number)

    def __index__(self) -> int:
        number = self._real("index")
        if isinstance(number, float):
            raise DTypeError("index", f"a tensor of dtype {self.dtype} is no integer", "Convert it: int(t)")
        return int(number)

    def _real(self, op: str) -> Any:
        """The one element, if it is a real number."""
        if self._data.dtype.kind == "c":
            raise DTypeError(op, f"a tensor of dtype {self.dtype} is no real number", "Use complex(t.item())")
        return self.item()

    def __repr__(self) -> str:
        body = np.array2string(to_host(self._data), separator=", ", prefix="tensor(")
        history = f", op={self._node.op.name}" if self._node else ""
        where = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"tensor({body}, dtype={self.dtype}{where}{', requires_grad=True' * self._requires_grad}{history})"

    def sum(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        """Sum over `dim` (all axes if None)."""
        return OPS["sum"](self, dim=dim, keepdim=keepdim)

    def mean(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        """Mean over `dim` (all axes if None)."""
        return OPS["mean"](self, dim=dim, keepdim=keepdim)

    def max(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        """Largest value over `dim` (all axes if None); ties share the gradient equally."""
        return OPS["max"](self, dim=dim, keepdim=keepdim)

    def min(self, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
        """Smallest value over `dim` (all axes if None); ties share the gradient equally."""
        return OPS["min"](self, dim=dim, keepdim=keepdim)

    def argmax(self, dim: int | None = None) -> Tensor:
        """Index of the largest value along `dim` (of the flattened tensor if None), the first of ties."""
        axis = None if dim is None else check_axis("argmax", dim, self.ndim)
        if (self._data.size if axis is None else self.shape[axis]) == 0:
            raise ShapeError("argmax", f"no elements to compare in shape {self.shape}", "Pass an axis that holds some")
        return Tensor(plain(np.argmax(self._data, axis=axis)))

    def reshape(self, *shape: int | tuple[int, ...]) -> Tensor:
        """The same elements in another shape; one -1 is worked out."""
        return OPS["reshape"](self, shape=_unpack(shape))

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        """Two axes exchanged."""
        return OPS["transpose"](self, dim0=dim0, dim1=dim1)

    def permute(self, *dims: int | tuple[int, ...]) -> Tensor:
        """Axes in the order `dims`."""
        return OPS["permute"](self, dims=_unpack(dims))

    def exp(self) -> Tensor:
        return OPS["exp"](self)

    def log(self) -> Tensor:
        return OPS["log"](self)

    def sqrt(self) -> Tensor:
        return OPS["sqrt"](self)

    def tanh(self) -> Tensor:
        return OPS["tanh"](self)

    def sigmoid(self) -> Tensor:
        return OPS["sigmoid"](self)

    def abs(self) -> Tensor:
        return OPS["absolute"](self)


def _unpack(dims: tuple[Any, ...]) -> tuple[int, ...]:
    """`(2, 3)` from f(2, 3) and from f((2, 3))."""
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
