"""Tensors, and the graph that remembers how they were made.

An `Op` is a pair of functions on plain arrays: `forward(*arrays, **static) -> (out, saved)` and
`backward(dout, saved) -> gradients`. Its differentiable inputs come first, and backward returns one
gradient for each. Calling an `Op` with Tensors records a `Node`; `backward` walks the nodes once, from
the output to the leaves. There is no global tape: a graph is reachable only from its outputs, so
threads may build and differentiate graphs at once. This package knows no op by name.
"""

from minitransformer.autograd.base import (
    OPS,
    as_array,
    as_host,
    cast,
    check_arrays,
    check_axis,
    check_dtype,
    check_same_device,
    check_saved_arrays,
    is_grad_enabled,
    no_grad,
    target_named,
    watching,
)
from minitransformer.autograd.graph import grad
from minitransformer.autograd.indexing import refused_index
from minitransformer.autograd.op import Op, Parameter, register, tensor
from minitransformer.autograd.tensor import Tensor

__all__ = [
    "OPS",
    "Op",
    "Parameter",
    "Tensor",
    "as_array",
    "as_host",
    "cast",
    "check_arrays",
    "check_axis",
    "check_dtype",
    "check_same_device",
    "check_saved_arrays",
    "grad",
    "is_grad_enabled",
    "no_grad",
    "refused_index",
    "register",
    "target_named",
    "tensor",
    "watching",
]
