"""The graph: nodes that remember calls, and the walk over them from an output to its leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

import numpy as np

from minitransformer.autograd.base import (
    TensorBase,
    as_array,
    cast,
    check_same_device,
    checksums,
    too_large,
    watching,
)
from minitransformer.checks import check_flag, shown
from minitransformer.errors import DTypeError, GradientError, ShapeError
from minitransformer.kernels.gpu.arrays import device_of, is_array, like, plain, to_host, zeros
from minitransformer.memory import owner_of

_FREED = object()


class Node:
    """One recorded call of an op: what it saved, and where its input gradients go.

    `parents` holds, per input, the leaf Tensor or the (node, output index) that made it, or None.
    """

    __slots__ = ("checksums", "guards", "op", "outputs", "parents", "saved")

    def __init__(self, op: Any, saved: Any, inputs: Sequence[Any], outputs: Sequence[TensorBase]) -> None:
        self.op = op
        self.saved = saved
        self.outputs = tuple([(t._data.shape, t._data.dtype) for t in outputs])
        kept = {id(a) if a.base is None else id(owner_of(a)) for a in _arrays(saved)}
        parents, guards = [], []
        for x in inputs:
            parent = None
            if isinstance(x, TensorBase):
                if x._requires_grad:
                    parent = x if x._node is None else (x._node, x._index)
                a = x._data
                if (id(a) if a.base is None else id(owner_of(a))) in kept:
                    guards.append((x._version, x._version[0]))
            parents.append(parent)
        for t in outputs:
            if id(owner_of(t._data)) in kept:
                guards.append((t._version, t._version[0]))
        self.parents, self.guards = tuple(parents), tuple(guards)
        self.checksums = tuple(map(_checksum, _arrays(saved))) if checksums.get() else None

    def backward(self, douts: Sequence[np.ndarray | None], keep: bool) -> Sequence[np.ndarray | None]:
        """The gradients of the inputs; frees what was saved unless `keep`."""
        saved = self.saved
        if saved is _FREED:
            raise GradientError(
                "backward",
                f"{self.op.name} was already differentiated and freed what it had saved",
                "Pass retain_graph=True to the first call, or run the forward pass again",
            )
        for version, then in self.guards:
            if version[0] != then:
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
        given = next(dout for dout in douts if dout is not None)
        filled = tuple(
            zeros(shape, given, dtype) if dout is None else dout
            for dout, (shape, dtype) in zip(douts, self.outputs, strict=True)
        )
        try:
            gradients = self.op.backward(filled if self.op.many else filled[0], saved)
        except MemoryError as error:
            raise too_large(f"backward of {self.op.name}", error, filled) from error
        if (watcher := watching.get()) is not None:
            watcher.differentiated(self, filled, gradients)
        for position, parent in enumerate(self.parents[len(gradients) :], len(gradients)):
            if parent is not None:
                raise GradientError(
                    self.op.name,
                    f"input {position} requires a gradient, expected one only for the first {len(gradients)}",
                    "Pass it detached: t.detach()",
                )
        return gradients


def _arrays(saved: Any) -> list[np.ndarray]:
    """The arrays in what an op saved, a named tuple as a rule, and in tuples in it."""
    found = []
    fields = [*saved] if isinstance(saved, tuple) else [saved]
    for field in fields:  # which grow meanwhile
        if isinstance(field, tuple):
            fields += field
        elif is_array(field):
            found.append(field)
    return found


def _checksum(array: np.ndarray) -> int:
    return crc32(to_host(array).tobytes())


def _check_upstream(t: TensorBase, gradient: Any) -> np.ndarray:
    """The gradient that backward starts from, as an array of `t`'s shape and dtype that we own."""
    if not t._requires_grad:
        raise GradientError(
            "backward",
            "the tensor does not depend on anything that requires a gradient",
            "Create its inputs with requires_grad=True, outside no_grad()",
        )
    if gradient is None:
        if t._data.size != 1:
            raise GradientError(
                "backward",
                f"the output has shape {t._data.shape}, expected one number",
                "Reduce it first (.sum(), .mean()), or pass gradient= of the same shape",
            )
        return np.ones_like(t._data)
    gradient = as_array("backward", gradient)
    gradient = plain(gradient) if is_array(gradient) else like(t._data, np.asarray(gradient))
    check_same_device("backward", "gradient", gradient, device_of(t._data))
    if gradient.shape != t._data.shape:
        raise ShapeError(
            "backward",
            f"gradient has shape {gradient.shape}, expected {t._data.shape} like the output",
            "Pass one number per output element",
        )
    return cast("backward", gradient, t._data.dtype)


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


def differentiate(
    output: TensorBase, gradient: Any, wanted: Sequence[TensorBase] | None, keep: bool
) -> list[tuple[TensorBase, np.ndarray | None]]:
    """Gradients of `output` with respect to `wanted`, or to every leaf if None. Writes no Tensor."""
    dout = _check_upstream(output, gradient)
    leaves: dict[int, list[Any]] = {}  # id -> [leaf, gradient]
    pending: dict[int, list[np.ndarray | None]] = {}  # id of a node -> gradients of its outputs
    interior = {(id(t._node), t._index): None for t in wanted or () if t._node is not None}
    wanted_leaves = None if wanted is None else {id(t) for t in wanted}

    def give(parent: Any, gradient: np.ndarray) -> None:
        if isinstance(parent, TensorBase):
            if wanted_leaves is None or id(parent) in wanted_leaves:
                entry = leaves.setdefault(id(parent), [parent, None])
                entry[1] = gradient if entry[1] is None else plain(entry[1] + gradient)
        else:
            node, index = parent
            slots = pending.setdefault(id(node), [None] * len(node.outputs))
            slots[index] = gradient if slots[index] is None else plain(slots[index] + gradient)

    give(output if output._node is None else (output._node, output._index), dout)
    captured: dict[tuple[int, int], np.ndarray] = {}
    with np.errstate(all="ignore"):  # as in forward
        for node in _order(output._node) if output._node is not None else ():
            douts = pending.pop(id(node), None)
            if douts is None:
                continue  # reached only through inputs that received no gradient
            for index, upstream in enumerate(douts) if interior else ():
                if upstream is not None and (id(node), index) in interior:
                    captured[id(node), index] = upstream
            for parent, dx in zip(node.parents, node.backward(douts, keep), strict=False):
                if parent is None:
                    continue
                if isinstance(parent, TensorBase):
                    shape, dtype = parent._data.shape, parent._data.dtype
                else:
                    shape, dtype = parent[0].outputs[parent[1]]
                if dx is None or dx.shape != shape:
                    raise GradientError(
                        node.op.name,
                        f"backward returned {'no gradient' if dx is None else f'a gradient of shape {dx.shape}'} "
                        f"for an input of shape {shape}",
                        "Return one gradient of its input's shape for each differentiable input",
                    )
                if dx.dtype.kind == "c" and dtype.kind != "c":
                    raise GradientError(
                        node.op.name,
                        "an input that is real has a complex gradient, because it met complex numbers",
                        "Take the real part of what is complex before: array.real",
                    )
                give(parent, plain(dx, dtype))
    if wanted is None:
        return [(leaf, g) for leaf, g in leaves.values()]
    return [
        (t, leaves.get(id(t), (t, None))[1] if t._node is None else captured.get((id(t._node), t._index)))
        for t in wanted
    ]


def grad(
    output: TensorBase, inputs: Sequence[TensorBase], gradient: Any = None, *, retain_graph: bool = False
) -> list[np.ndarray]:
    """Gradients of `output` with respect to `inputs`, one array each; no `.grad` is read or written.

    `gradient` is the upstream gradient, 1 for a scalar output. An input that `output` does not depend
    on gets zeros. Frees the graph unless `retain_graph`. Safe to call from several threads at once.
    Raises `GradientError` for an input that does not require a gradient.
    """
    if not isinstance(output, TensorBase) or not isinstance(inputs, (list, tuple)):
        problem = f"got {shown(output)} and {shown(inputs)}, expected a Tensor and a list of Tensors"
        raise DTypeError("grad", problem, "Call mt.grad(loss, [x, y])")
    retain_graph = check_flag("grad", "retain_graph", retain_graph)
    for position, t in enumerate(inputs):
        if not isinstance(t, TensorBase) or not t._requires_grad:
            raise GradientError(
                "grad",
                f"input {position} is not a Tensor that requires a gradient",
                "Create it with requires_grad=True before the forward pass",
            )
    return [
        np.zeros_like(t._data) if g is None else g for t, g in differentiate(output, gradient, inputs, retain_graph)
    ]
