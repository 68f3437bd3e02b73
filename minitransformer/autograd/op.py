"""Op, whose calls make Tensors and record how; Parameter; and tensors from data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitransformer.autograd.base import (
    OPS,
    as_array,
    cast,
    check_dtype,
    recording,
    too_large,
    watching,
)
from minitransformer.autograd.graph import Node
from minitransformer.autograd.tensor import Tensor
from minitransformer.errors import DeviceError, DTypeError, GradientError, ShapeError
from minitransformer.kernels.gpu.arrays import check_device, device_of, is_array, move, on_device
from minitransformer.memory import owner_of

Forward = Callable[..., tuple[Any, Any]]
Backward = Callable[[Any, Any], Sequence["np.ndarray | None"]]


class Parameter(Tensor):
    """A leaf that `nn.Module` finds and optimizers update."""

    __slots__ = ()

    def __init__(self, data: np.ndarray, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)

    def rebind(self, array: np.ndarray) -> None:
        """Look into `array` from now on, whose values must equal the current ones.

        For owners of flat buffers (`optim`) and for casts (`Module.to`): the memory changes, the values
        do not, except for the rounding of a cast.
        """
        self._data = array
        self.grad = None
        self._version = [0]

    def mark_written(self) -> None:
        """Tell backward that the memory behind this parameter has changed."""
        self._version[0] += 1


class Op:
    """A forward/backward pair on plain arrays, callable on Tensors.

    `many` says that forward returns a tuple of outputs; backward then receives a tuple of as many
    gradients, zeros where an output was not used.
    """

    __slots__ = ("backward", "forward", "many", "name")

    def __init__(self, name: str, forward: Forward, backward: Backward, many: bool = False) -> None:
        self.name, self.forward, self.backward, self.many = name, forward, backward, many

    def __call__(self, *inputs: Any, **static: Any) -> Any:
        arrays, tracked = [], False
        for x in inputs:
            if isinstance(x, Tensor):
                arrays.append(x._data)
                tracked = tracked or x._requires_grad
            else:
                arrays.append(as_array(self.name, x))
        try:
            with np.errstate(all="ignore"):  # NaN and infinity travel as values; the trainer looks for them
                out, saved = self.forward(*arrays, **static)
        except MemoryError as error:
            raise too_large(self.name, error, arrays) from error
        except TypeError as error:
            devices = sorted({device_of(a) for a in arrays if is_array(a) and a.dtype.kind in "fc"})
            if len(devices) > 1:
                problem = f"got arrays on {' and '.join(map(repr, devices))}, expected one device"
                raise DeviceError(self.name, problem, "Move one of them: t.to(device)") from error
            raise
        outputs = [Tensor._wrap(a) for a in (out if self.many else (out,))]
        for t in outputs:
            # A view shares its input's version, so that a write through either is seen by both.
            if t._data.base is not None:
                owner = owner_of(t._data)
                for x in inputs:
                    if isinstance(x, Tensor) and owner_of(x._data) is owner:
                        t._version = x._version
        node = None
        if tracked and recording.get():
            node = Node(self, saved, inputs, outputs)
            for index, t in enumerate(outputs):
                if t._data.dtype.kind in "fc":
                    t._requires_grad, t._node, t._index = True, node, index
        if (watcher := watching.get()) is not None:
            watcher.called(self, inputs, arrays, static, outputs, node)
        return tuple(outputs) if self.many else outputs[0]

    def __repr__(self) -> str:
        return f"Op({self.name!r})"


def register(name: str, forward: Forward, backward: Backward, *, many: bool = False) -> Op:
    """Make the pair an `Op` under `name`, and return it. `GradientError` if the name is taken."""
    if name in OPS:
        raise GradientError("register", f"an op named {name!r} exists already", "Choose another name")
    OPS[name] = Op(name, forward, backward, many)
    return OPS[name]


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False, device: str | None = None) -> Tensor:
    """A Tensor with a copy of `data`: numbers, nested lists, arrays, or anything with `__array__` or DLPack.

    float64, integer, bool and complex arrays keep their dtype; Python floats and every other float
    become float32, Python integers int64. `dtype` overrides. Raises `DTypeError` for data that is not
    numeric, `ShapeError` for ragged lists, `DeviceError` for a `device` that is not there. Without one, the data
    stay where they are.
    """
    if isinstance(data, Tensor):
        data = data._data
    device = device_of(data) if device is None else check_device("tensor", device)
    if isinstance(data, np.ma.MaskedArray) or (hasattr(data, "__cuda_array_interface__") and not on_device(data)):
        as_array("tensor", data)  # raises
    if not hasattr(data, "__array__") and hasattr(data, "__dlpack__"):
        data = np.from_dlpack(data)
    try:
        array = as_array("tensor", data).copy() if on_device(data) else np.array(data)
    except (ValueError, RecursionError) as error:
        raise ShapeError("tensor", f"the data is ragged ({error})", "Pad all rows to one length") from None
    if array.dtype.kind not in "biufc":
        raise DTypeError("tensor", f"got data of dtype {array.dtype}, expected numbers", "Encode it as numbers first")
    keeps_kind = array.dtype.kind != "f" or (array.dtype.char == "d" and hasattr(data, "__array__"))
    target = check_dtype("tensor", (array.dtype if keeps_kind else np.float32) if dtype is None else dtype)
    return Tensor(move(cast("tensor", array, target), device), requires_grad)
