"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer.autograd import Tensor
from minitransformer.checks import check_flag, check_number, check_size
from minitransformer.nn.linear import parameter
from minitransformer.nn.module import Module


def _trailing(op: str, shape: Any) -> tuple[int, ...]:
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    for size in sizes or ((),):
        check_size(op, normalized_shape=size)
    return tuple(int(size) for size in sizes)


class LayerNorm(Module):
    """Normalise the last axes, then scale by weight (starts at 1) and shift by bias (starts at 0)."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5, bias: bool = True) -> None:
        shape = self.normalized_shape = _trailing("LayerNorm", normalized_shape)
        self.eps = check_number("LayerNorm", "eps", eps)
        self.weight = parameter("LayerNorm", "weight", shape, lambda: np.ones(shape, np.float32))
        biased = check_flag("LayerNorm", "bias", bias)
        self.bias = parameter("LayerNorm", "bias", shape, lambda: np.zeros(shape, np.float32)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Divide the last axes by their root mean square, then scale by weight (starts at 1)."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5) -> None:
        shape = self.normalized_shape = _trailing("RMSNorm", normalized_shape)
        self.eps = check_number("RMSNorm", "eps", eps)
        self.weight = parameter("RMSNorm", "weight", shape, lambda: np.ones(shape, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
