"""Linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Parameter, Tensor, as_array
from minitransformer.checks import allocate, check_flag, check_size
from minitransformer.errors import ShapeError
from minitransformer.nn.module import Module
from minitransformer.ops.activation import check_float


def parameter(op: str, name: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> Parameter:
    """A float32 Parameter of what `make` draws; `AllocationError` for one larger than the memory there is."""
    return allocate(op, f"a {name}", shape, np.float32, lambda: Parameter(make().astype(np.float32, copy=False)))


def as_sequence(op: str, name: str, x: Any, width: int) -> Tensor:
    """x (B, T, width) as a Tensor; `DTypeError` or `ShapeError` for anything else."""
    array = as_array(op, x)
    check_float(op, **{name: array})
    if array.ndim != 3 or array.shape[-1] != width:
        raise ShapeError(
            op,
            f"{name} has shape {array.shape}, expected (batch, length, {width})",
            "Pass batches of sequences of this layer's d_model",
        )
    return x if isinstance(x, Tensor) else Tensor(array)


class Linear(Module):
    """x (..., C_in) -> x @ weight.T + bias (..., C_out), weight (C_out, C_in).

    Weight and bias start uniform in +-1/sqrt(C_in), as in torch.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        check_size("Linear", in_features=in_features, out_features=out_features)
        biased = check_flag("Linear", "bias", bias)

        def drawn(name: str, *shape: int) -> Parameter:
            def make() -> np.ndarray:
                bound = 1 / math.sqrt(in_features)
                return random.generator().uniform(-bound, bound, shape)

            return parameter("Linear", name, shape, make)

        self.weight = drawn("weight", out_features, in_features)
        self.bias = drawn("bias", out_features) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
