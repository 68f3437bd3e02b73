"""Embedding tables: learned rows for ids, sinusoids for positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor
from minitransformer.checks import check_size
from minitransformer.errors import RangeError
from minitransformer.nn.linear import as_sequence, parameter
from minitransformer.nn.module import Module


class Embedding(Module):
    """Integer ids (...) -> rows of weight (V, C): (..., C). The weight starts normal with deviation 1."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        check_size("Embedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        shape = (num_embeddings, embedding_dim)
        draw = random.generator().standard_normal
        self.weight = parameter("Embedding", "weight", shape, lambda: draw(shape, dtype=np.float32))

    def forward(self, ids: Any) -> Tensor:
        return F.embedding(ids, self.weight)


class SinusoidalPositions(Module):
    """x (B, T, C) -> x + sinusoids (T, C), the fixed positions of "Attention is all you need"."""

    def __init__(self, max_length: int, d_model: int) -> None:
        check_size("SinusoidalPositions", max_length=max_length, d_model=d_model)
        self.table = F.sinusoidal_positions(max_length, d_model)  # float64, not a parameter

    def forward(self, x: Tensor) -> Tensor:
        x = as_sequence("SinusoidalPositions", "x", x, self.table.shape[1])
        T = x.shape[1]
        if len(self.table) < T:
            raise RangeError(
                "SinusoidalPositions",
                f"the sequence has length {T}, expected at most {len(self.table)}",
                "Shorten it, or make the layer with a larger max_length",
            )
        return x + self.table[:T].astype(x.dtype)
