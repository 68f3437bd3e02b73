"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minitransformer import functional as F
from minitransformer.autograd import Parameter, Tensor
from minitransformer.nn.linear import check_size
from minitransformer.nn.module import Module


def _trailing(op: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    for size in sizes:
        check_size(op, normalized_shape=size)
    return sizes


class LayerNorm(Module):
    """Normalise the last axes, then scale by weight (starts at 1) and shift by bias (starts at 0)."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5, bias: bool = True) -> None:
        self.normalized_shape, self.eps = _trailing("LayerNorm", normalized_shape), eps
        self.weight = Parameter(np.ones(self.normalized_shape, np.float32))
        self.bias = Parameter(np.zeros(self.normalized_shape, np.float32)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Module):
    """Divide the last axes by their root mean square, then scale by weight (starts at 1)."""

    def __init__(self, normalized_shape: int | Sequence[int], eps: float = 1e-5) -> None:
        self.normalized_shape, self.eps = _trailing("RMSNorm", normalized_shape), eps
        self.weight = Parameter(np.ones(self.normalized_shape, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
