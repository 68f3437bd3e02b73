"""Position-wise feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from minitransformer import functional as F
from minitransformer.autograd import Tensor
from minitransformer.checks import check_choice, check_size
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.linear import Linear
from minitransformer.nn.module import Module

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class FeedForward(Module):
    """(..., C) -> (..., F) -> (..., C): down(dropout(activation(up(x)))).

    `activation` is "relu" (Vaswani et al. 2017), "gelu" (by erf), "gelu_tanh" (GPT-2), "silu", or
    "swiglu": down(dropout(silu(gate(x)) * up(x))) with gate and up packed in `up` (2F, C), gate first.
    """

    def __init__(
        self, d_model: int, dff: int, dropout_rate: float = 0.0, activation: str = "relu", bias: bool = True
    ) -> None:
        check_choice("FeedForward", "activation", activation, (*_ACTIVATIONS, "swiglu"))
        check_size("FeedForward", d_model=d_model, dff=dff)
        self.activation, self.dff = activation, dff
        self.up = Linear(d_model, 2 * int(dff) if activation == "swiglu" else dff, bias)
        self.dropout = Dropout(dropout_rate)
        self.down = Linear(dff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)  # (..., F) or (..., 2F)
        if self.activation == "swiglu":
            hidden = F.swiglu(*F.split(hidden, self.dff, dim=-1))  # (..., F)
        else:
            hidden = _ACTIVATIONS[self.activation](hidden)
        return self.down(self.dropout(hidden))
