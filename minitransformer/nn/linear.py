"""Linear layer."""

from __future__ import annotations

import math

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Parameter, Tensor
from minitransformer.errors import ConfigError
from minitransformer.nn.module import Module


def check_size(op: str, **sizes: int) -> None:
    """`ConfigError` unless every size is a positive integer."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ConfigError(op, f"{name} is {size!r}, expected a positive integer", "Pass such a number")


class Linear(Module):
    """x (..., C_in) -> x @ weight.T + bias (..., C_out), weight (C_out, C_in).

    Weight and bias start uniform in +-1/sqrt(C_in), as in torch.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        check_size("Linear", in_features=in_features, out_features=out_features)
        bound = 1 / math.sqrt(in_features)
        draw = random.generator().uniform
        self.weight = Parameter(draw(-bound, bound, (out_features, in_features)).astype(np.float32))
        self.bias = Parameter(draw(-bound, bound, out_features).astype(np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
