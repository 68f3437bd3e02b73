"""Tensors, and the graph that remembers how they were made.

An `Op` is a pair of functions on plain arrays: `forward(*arrays, **static) -> (out, saved)` and
`backward(dout, saved) -> gradients`. Its differentiable inputs come first, and backward returns one
gradient for each. Calling an `Op` with Tensors records a `Node`; `backward` walks the nodes once, from
the output to the leaves. There is no global tape: a graph is reachable only from its outputs, so
threads may build and differentiate graphs at once. This file knows no op by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from zlib import crc32

import numpy as np

from minitransformer.errors import DeviceError, DTypeError, GradientError, RangeError, ShapeError

Forward = Callable[..., tuple[Any, Any]]
Backward = Callable[[Any, Any], Sequence["np.ndarray | None"]]

_recording: ContextVar[bool] = ContextVar("minitransformer_recording", default=True)
_checksums: ContextVar[bool] = ContextVar("minitransformer_checksums", default=False)

_DTYPES = frozenset("?bBhHiIlLqQfdFD")
_FREED = object()


@contextmanager
def _set(flag: ContextVar[bool], value: bool) -> Iterator[None]:
    token = flag.set(value)
    try:
        yield
    finally:
        flag.reset(token)


def no_grad() -> Any:
    """Context manager (and decorator): ops inside record nothing, their outputs need no gradient."""
    return _set(_recording, False)


def is_grad_enabled() -> bool:
    """Whether ops record their inputs for backward, in this thread and context."""
    return _recording.get()


def check_saved_arrays() -> Any:
    """Context manager for debugging: checksum what ops save, and compare it before backward reads it.

    Finds writes that go around the Tensor API, as `t.data[...] = 0` or a write through an old view.
    """
    return _set(_checksums, True)


def as_array(op: str, x: Any) -> Any:
    """What an op's forward receives for `x`: an ndarray of a supported dtype, a Python number or None.

    NumPy scalars become Python numbers, so that `x * np.sqrt(d)` does not turn float32 into float64.
    Raises `DTypeError` for anything that would be read wrongly, `DeviceError` for arrays elsewhere.
    """
    if isinstance(x, Tensor):
        return x._data
    if isinstance(x, np.generic) and x.dtype.kind in "biufc":  # first: np.float64 is also a Python float
        return x.item()
    if x is None or isinstance(x, (bool, int, float, complex)):
        return x
    if isinstance(x, (list, tuple)):
        x = np.asarray([as_array(op, item) for item in x])
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(op, "got a masked array, whose mask would be lost", "Fill it first: array.filled(value)")
    if not isinstance(x, np.ndarray):
        if hasattr(x, "__cuda_array_interface__"):
            raise DeviceError(
                op,
                f"got a {type(x).__module__}.{type(x).__name__} on a GPU, expected arrays on 'cpu'",
                "Copy it to the host first",
            )
        raise DTypeError(
            op,
            f"got a {type(x).__module__}.{type(x).__name__}, expected a Tensor, NumPy array or number",
            "Convert it with mt.tensor(x)",
        )
    if x.dtype.char not in _DTYPES:
        raise DTypeError(
            op,
            f"got dtype {x.dtype}, expected float32, float64, an integer, bool or complex",
            "Convert it with array.astype(...)",
        )
    x = np.asarray(x)  # subclasses such as np.matrix change what operators mean
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _owner(array: np.ndarray) -> np.ndarray:
    """The array whose memory `array` looks into."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class Node:
    """One recorded call of an op: what it saved, and where its input gradients go.

    `parents` holds, per input, the leaf Tensor or the (node, output index) that made it, or None.
    """

    __slots__ = ("checksums", "guards", "op", "outputs", "parents", "saved")

    def __init__(self, op: Op, saved: Any, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        self.op = op
        self.saved = saved
        self.outputs = tuple((t._data.shape, t._data.dtype) for t in outputs)
        self.parents = tuple(
            None if not (isinstance(x, Tensor) and x.requires_grad) else (x if x._node is None else (x._node, x._index))
            for x in inputs
        )
        kept = {id(_owner(field)) for field in _arrays(saved)}
        self.guards = tuple(
            (t._version, t._version[0])
            for t in (*inputs, *outputs)
            if isinstance(t, Tensor) and id(_owner(t._data)) in kept
        )
        self.checksums = tuple(_checksum(field) for field in _arrays(saved)) if _checksums.get() else None

    def backward(self, douts: Sequence[np.ndarray | None], keep: bool) -> Sequence[np.ndarray | None]:
        """The gradients of the inputs; frees what was saved unless `keep`."""
        saved = self.saved
        if saved is _FREED:
            raise GradientError(
                "backward",
                f"{self.op.name} was already differentiated and freed what it had saved",
                "Pass retain_graph=True to the first call, or run the forward pass again",
            )
        if any(version[0] != then for version, then in self.guards):
            raise GradientError(
                "backward",
                f"an array that {self.op.name} needs was written to after the forward pass",
                "Write before the forward pass, or into a copy: mt.tensor(t.numpy())",
            )
        if self.checksums is not None and self.checksums != tuple(map(_checksum, _arrays(saved))):
            raise GradientError(
                "backward",
                f"an array that {self.op.name} saved was changed behind the Tensor API",
                "Look for writes into t.data, t.numpy() or an array that a Tensor was made from",
            )
        if not keep:
            self.saved = _FREED
        filled = tuple(
            np.zeros(shape, dtype) if dout is None else dout
            for dout, (shape, dtype) in zip(douts, self.outputs, strict=True)
        )
        with np.errstate(all="ignore"):
            gradients = self.op.backward(filled if self.op.many else filled[0], saved)
        for position, parent in enumerate(self.parents[len(gradients) :], len(gradients)):
            if parent is not None:
                raise GradientError(
                    self.op.name,
                    f"input {position} requires a gradient, expected one only for the first {len(gradients)}",
                    "Pass it detached: t.detach()",
                )
        return gradients


def _arrays(saved: Any) -> Iterator[np.ndarray]:
    if isinstance(saved, np.ndarray):
        yield saved
    elif isinstance(saved, tuple):
        for field in saved:
            yield from _arrays(field)


def _checksum(array: np.ndarray) -> int:
    return crc32(array.tobytes())


class Op:
    """A forward/backward pair on plain arrays, callable on Tensors.

    `many` says that forward returns a tuple of outputs; backward then receives a tuple of as many
    gradients, zeros where an output was not used.
    """

    __slots__ = ("backward", "forward", "many", "name")

    def __init__(self, name: str, forward: Forward, backward: Backward, many: bool = False) -> None:
        self.name, self.forward, self.backward, self.many = name, forward, backward, many

    def __call__(self, *inputs: Any, **static: Any) -> Any:
        arrays = [as_array(self.name, x) for x in inputs]
        with np.errstate(all="ignore"):  # NaN and infinity travel as values; the trainer looks for them
            out, saved = self.forward(*arrays, **static)
        outputs = [Tensor._wrap(a) for a in (out if self.many else (out,))]
        for t in outputs:
            # A view shares its input's version, so that a write through either is seen by both.
            if t._data.base is not None:
                owner = _owner(t._data)
                for x in inputs:
                    if isinstance(x, Tensor) and _owner(x._data) is owner:
                        t._version = x._version
        if _recording.get() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            node = Node(self, saved, inputs, outputs)
            for index, t in enumerate(outputs):
                if t._data.dtype.kind in "fc":
                    t._requires_grad, t._node, t._index = True, node, index
        return tuple(outputs) if self.many else outputs[0]

    def __repr__(self) -> str:
        return f"Op({self.name!r})"


OPS: dict[str, Op] = {}


def register(name: str, forward: Forward, backward: Backward, *, many: bool = False) -> Op:
    """Make the pair an `Op` under `name`, and return it. `GradientError` if the name is taken."""
    if name in OPS:
        raise GradientError("register", f"an op named {name!r} exists already", "Choose another name")
    OPS[name] = Op(name, forward, backward, many)
    return OPS[name]


def _check_upstream(t: Tensor, gradient: Any) -> np.ndarray:
    """The gradient that backward starts from, as an array of `t`'s shape and dtype that we own."""
    if not t.requires_grad:
        raise GradientError(
            "backward",
            "the tensor does not depend on anything that requires a gradient",
            "Create its inputs with requires_grad=True, outside no_grad()",
        )
    if gradient is None:
        if t._data.size != 1:
            raise GradientError(
                "backward",
                f"the output has shape {t.shape}, expected one number",
                "Reduce it first (.sum(), .mean()), or pass gradient= of the same shape",
            )
        return np.ones_like(t._data)
    gradient = np.asarray(as_array("backward", gradient))
    if gradient.shape != t.shape:
        raise ShapeError(
            "backward",
            f"gradient has shape {gradient.shape}, expected {t.shape} like the output",
            "Pass one number per output element",
        )
    return gradient.astype(t._data.dtype)


def _order(root: Node) -> list[Node]:
    """Every node below `root`, each after all nodes that use it. Iterative: chains may be long."""
    done: list[Node] = []
    seen = {id(root)}
    stack = [(root, iter(root.parents))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if type(parent) is tuple and id(parent[0]) not in seen:
                seen.add(id(parent[0]))
                stack.append((parent[0], iter(parent[0].parents)))
                break
        else:
            done.append(node)
            stack.pop()
    done.reverse()
    return done


def _differentiate(
    output: Tensor, gradient: Any, wanted: Sequence[Tensor] | None, keep: bool
) -> list[tuple[Tensor, np.ndarray | None]]:
    """Gradients of `output` with respect to `wanted`, or to every leaf if None. Writes no Tensor."""
    dout = _check_upstream(output, gradient)
    leaves: dict[int, list[Any]] = {}  # id -> [leaf, gradient]
    pending: dict[int, list[np.ndarray | None]] = {}  # id of a node -> gradients of its outputs
    interior = {(id(t._node), t._index): None for t in wanted or () if t._node is not None}
    wanted_leaves = None if wanted is None else {id(t) for t in wanted}

    def give(parent: Any, gradient: np.ndarray) -> None:
        if isinstance(parent, Tensor):
            if wanted_leaves is None or id(parent) in wanted_leaves:
                entry = leaves.setdefault(id(parent), [parent, None])
                entry[1] = gradient if entry[1] is None else np.asarray(entry[1] + gradient)
        else:
            node, index = parent
            slots = pending.setdefault(id(node), [None] * len(node.outputs))
            slots[index] = gradient if slots[index] is None else np.asarray(slots[index] + gradient)

    give(output if output._node is None else (output._node, output._index), dout)
    captured: dict[tuple[int, int], np.ndarray] = {}
    for node in _order(output._node) if output._node is not None else ():
        douts = pending.pop(id(node), None)
        if douts is None:
            continue  # reached only through inputs that received no gradient
        for index, upstream in enumerate(douts):
            if upstream is not None and (id(node), index) in interior:
                captured[id(node), index] = upstream
        for parent, dx in zip(node.parents, node.backward(douts, keep), strict=False):
            if parent is None:
                continue
            shape, dtype = (parent.shape, parent.dtype) if isinstance(parent, Tensor) else parent[0].outputs[parent[1]]
            if dx is None or dx.shape != shape:
                raise GradientError(
                    node.op.name,
                    f"backward returned {'no gradient' if dx is None else f'a gradient of shape {dx.shape}'} "
                    f"for an input of shape {shape}",
                    "Return one gradient of its input's shape for each differentiable input",
                )
            give(parent, np.asarray(dx, dtype))  # arithmetic on 0-d arrays yields NumPy scalars
    if wanted is None:
        return [(leaf, g) for leaf, g in leaves.values()]
    return [
        (t, leaves.get(id(t), (t, None))[1] if t._node is None else captured.get((id(t._node), t._index)))
        for t in wanted
    ]


def grad(
    output: Tensor, inputs: Sequence[Tensor], gradient: Any = None, *, retain_graph: bool = False
) -> list[np.ndarray]:
    """Gradients of `output` with respect to `inputs`, one array each; no `.grad` is read or written.

    `gradient` is the upstream gradient, 1 for a scalar output. An input that `output` does not depend
    on gets zeros. Frees the graph unless `retain_graph`. Safe to call from several threads at once.
    Raises `GradientError` for an input that does not require a gradient.
    """
    inputs = list(inputs)
    for position, t in enumerate(inputs):
        if not isinstance(t, Tensor) or not t.requires_grad:
            raise GradientError(
                "grad",
                f"input {position} is not a Tensor that requires a gradient",
                "Create it with requires_grad=True before the forward pass",
            )
    return [
        np.zeros_like(t._data) if g is None else g for t, g in _differentiate(output, gradient, inputs, retain_graph)
    ]


def _operator(name: str, swap: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Tensor, other: Any) -> Any:
        if other is None or isinstance(other, str):
            return NotImplemented
        return OPS[name](other, self) if swap else OPS[name](self, other)

    return method


def _compare(name: str, a: Any, b: Any) -> Any:
    try:
        return getattr(operator, name)(a, b)
    except ValueError:
        raise ShapeError(
            name.strip("_"),
            f"shapes {np.shape(a)} and {np.shape(b)} do not broadcast",
            "Compared from the right, sizes must be equal or 1",
        ) from None


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    def method(self: Tensor, other: Any) -> Any:
        if other is None or isinstance(other, str):
            return NotImplemented
        return Tensor(_compare(name, self._data, as_array(name, other)))

    return method


class Tensor:
    """An array that remembers how it was computed.

    `data` is a NumPy array (float32 or float64; integers, bools and complex numbers as data without
    gradient). `grad` is a NumPy array of the same shape that this leaf owns, or None before backward.
    """

    __slots__ = ("__weakref__", "_data", "_index", "_node", "_requires_grad", "_version", "grad")

    def __init__(self, data: np.ndarray, requires_grad: bool = False) -> None:
        self._data = np.asarray(as_array("Tensor", data))
        self._node: Node | None = None
        self._index = 0
        self._version = [0]
        self._requires_grad = False
        self.grad: np.ndarray | None = None
        if requires_grad:
            self.requires_grad = True

    @classmethod
    def _wrap(cls, array: Any) -> Tensor:
        """A Tensor around an op's output, which needs no checks."""
        t = object.__new__(Tensor)
        t._data = array if type(array) is np.ndarray else np.asarray(array)
        t._node, t._index, t._version, t._requires_grad, t.grad = None, 0, [0], False, None
        return t

    @property
    def data(self) -> np.ndarray:
        """The array itself, not a copy. Assigning writes into it, and backward notices."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        array = np.asarray(as_array("data", value))
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
        np.copyto(self._data, array, casting="same_kind")
        self._version[0] += 1

    @property
    def requires_grad(self) -> bool:
        """Whether backward computes a gradient for this tensor or for what it was computed from."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value and self._data.dtype.kind not in "fc":
            raise DTypeError(
                "requires_grad",
                f"a tensor of dtype {self.dtype} has no gradient, expected float32 or float64",
                "Convert its data first: array.astype(np.float32)",
            )
        if not value and self._node is not None:
            raise GradientError("requires_grad", "the tensor is the result of an op, expected a leaf", "Use t.detach()")
        self._requires_grad = bool(value)

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
        return "cpu"

    @property
    def is_leaf(self) -> bool:
        """Whether the tensor was given rather than computed: only leaves receive `.grad`."""
        return self._node is None

    def numpy(self) -> np.ndarray:
        """The array itself (shared memory). Do not write to it between forward and backward."""
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
        """This tensor on a device ("cpu") or in a dtype. Casting is recorded for backward."""
        if isinstance(target, str) and target.split(":")[0] in ("cpu", "cuda"):
            check_device("to", target)
            return self
        try:
            dtype = np.dtype(target)
        except TypeError:
            raise DTypeError(
                "to", f"{target!r} is neither a device nor a dtype", "Pass 'cpu', 'float32' or 'float64'"
            ) from None
        _check_dtype("to", dtype)
        return self if dtype == self.dtype else OPS["cast"](self, dtype=dtype)

    def backward(self, gradient: Any = None, retain_graph: bool = False) -> None:
        """Add the gradient of this tensor to the `.grad` of every leaf it was computed from.

        `gradient` is the upstream gradient of this tensor's shape; 1 if the tensor is one number.
        Raises `GradientError` if there is nothing to differentiate, if the graph was freed by an earlier
        call, or if an array that backward needs was written to; then no `.grad` has changed.
        """
        for leaf, g in _differentiate(self, gradient, None, retain_graph):
            assert g is not None
            if leaf.grad is None:
                leaf.grad = g.copy()
            else:
                np.add(leaf.grad, g, out=leaf.grad)

    # NumPy's own operators ask here first, so `array + tensor` is a Tensor and keeps its history.
    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        name = _UFUNCS.get(ufunc.__name__)
        if method != "__call__" or kwargs or name is None:
            raise DTypeError(
                f"numpy.{ufunc.__name__}",
                "Tensors do not take part in this call, which would lose their gradient",
                "Use the Tensor's own operations, or t.numpy() for plain numbers",
            )
        if name in OPS:
            return OPS[name](*inputs)
        return Tensor(_compare(name, *(as_array(name, x) for x in inputs)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._data, dtype=dtype, copy=copy)

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
        return Tensor(~self._data)

    def __getitem__(self, index: Any) -> Tensor:
        return OPS["getitem"](self, index=_plain_index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        if self._node is not None or (self._requires_grad and _recording.get()):
            raise GradientError(
                "setitem",
                "writing into a tensor with a gradient history would make its gradient wrong",
                "Build the result with mt.where or mt.concat, or write inside mt.no_grad()",
            )
        if isinstance(value, Tensor) and value.requires_grad and _recording.get():
            raise GradientError(
                "setitem",
                "the assigned tensor requires a gradient, which a write does not record",
                "Use mt.where or mt.concat, or assign value.detach()",
            )
        self._data[_plain_index(index)] = as_array("setitem", value)
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
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __index__(self) -> int:
        return operator.index(self.item())

    def __repr__(self) -> str:
        body = np.array2string(self._data, separator=", ", prefix="tensor(")
        history = f", op={self._node.op.name}" if self._node else ""
        return f"tensor({body}, dtype={self.dtype}{', requires_grad=True' * self._requires_grad}{history})"

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
        return Tensor(np.asarray(np.argmax(self._data, axis=dim)))

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


_UFUNCS = {
    **{name: name for name in ("add", "subtract", "multiply", "divide", "power", "matmul", "maximum")},
    **{name: name for name in ("minimum", "exp", "log", "sqrt", "tanh", "absolute", "sin", "cos")},
    "equal": "eq",
    "not_equal": "ne",
    "less": "lt",
    "less_equal": "le",
    "greater": "gt",
    "greater_equal": "ge",
    "bitwise_and": "and_",
    "bitwise_or": "or_",
}


def _unpack(dims: tuple[Any, ...]) -> tuple[int, ...]:
    """`(2, 3)` from f(2, 3) and from f((2, 3))."""
    return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims


def _plain_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_plain_index(i) for i in index)
    # Backward needs it as it was: a copy, because a static argument has no version to look at.
    return index._data.copy() if isinstance(index, Tensor) else index


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


def _check_dtype(op: str, dtype: np.dtype) -> None:
    if dtype.char not in _DTYPES:
        raise DTypeError(op, f"dtype {dtype} is not supported", "Use float32, float64, an integer type or bool")


def check_device(op: str, device: str | None) -> None:
    """`DeviceError` unless `device` is one this version has."""
    if device not in (None, "cpu"):
        raise DeviceError(op, f"device {device!r} is not available in this version, expected 'cpu'", "Use 'cpu'")


def tensor(data: Any, dtype: Any = None, requires_grad: bool = False, device: str | None = None) -> Tensor:
    """A Tensor with a copy of `data`: numbers, nested lists, arrays, or anything with `__array__` or DLPack.

    float64, integer, bool and complex arrays keep their dtype; Python floats and every other float
    become float32, Python integers int64. `dtype` overrides. Raises `DTypeError` for data that is not
    numeric, `ShapeError` for ragged lists, `DeviceError` for a device this version does not have.
    """
    check_device("tensor", device)
    if isinstance(data, Tensor):
        data = data._data
    if isinstance(data, np.ma.MaskedArray) or hasattr(data, "__cuda_array_interface__"):
        as_array("tensor", data)  # raises
    if not hasattr(data, "__array__") and hasattr(data, "__dlpack__"):
        data = np.from_dlpack(data)
    try:
        array = np.array(data)
    except ValueError as error:
        raise ShapeError("tensor", f"the data is ragged ({error})", "Pad all rows to one length") from None
    if array.dtype.kind not in "biufc":
        raise DTypeError("tensor", f"got data of dtype {array.dtype}, expected numbers", "Encode it as numbers first")
    keeps_kind = array.dtype.kind != "f" or (array.dtype.char == "d" and hasattr(data, "__array__"))
    target = np.dtype(dtype) if dtype is not None else array.dtype if keeps_kind else np.dtype(np.float32)
    _check_dtype("tensor", target)
    return Tensor(array.astype(target.newbyteorder("="), copy=False), requires_grad)


def check_axis(op: str, dim: Any, ndim: int) -> int:
    """`dim` as a non-negative axis of an array with `ndim` axes; `RangeError` or `DTypeError` otherwise."""
    if isinstance(dim, bool) or not isinstance(dim, (int, np.integer)):
        raise DTypeError(op, f"dim is {dim!r}, expected an integer", "Pass the number of an axis")
    if not -ndim <= dim < ndim:
        raise RangeError(
            op,
            f"dim is {dim}, expected {-ndim} to {ndim - 1} for {ndim} axes",
            "Count axes from 0 or from -1",
        )
    return int(dim) % ndim
