"""Dropout layer."""

from __future__ import annotations

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor
from minitransformer.nn.module import Module
from minitransformer.ops.dropout import check_rate
from minitransformer.random import DrawKey


def call_site(module: Module) -> int | None:
    """The dropout call-site id of a module that knows its path in a model."""
    return None if module.path is None else random.site_id(module.path)


class Dropout(Module):
    """While training, each element is 0 with probability p, else divided by 1 - p."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = check_rate("Dropout", p)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training, site=call_site(self))

    def draw(self) -> tuple[float, DrawKey] | None:
        """The rate and the address of this call's numbers, for a layer by hand; None if nothing is dropped."""
        return (self.p, random.next_key(call_site(self))) if self.training and self.p else None
