"""What others wrote, in a form that our checks understand.

`torch(fn)`, `jax(fn)`, `autograd(fn)` and `mygrad(fn)` turn a function of that framework into one that
`gradcheck` takes. `attention(fn, framework)`, `numpy_function(forward, backward)`, `ours()`, `torch_sdpa()` and
`jax_sdpa()` give an `Attention`, which `check_laws` takes.
"""

from minitransformer.testing.adapters.attention import (
    ABILITIES,
    Attention,
    as_attention,
    attention,
    jax_sdpa,
    numpy_function,
    ours,
    torch_sdpa,
)
from minitransformer.testing.adapters.functions import autograd, jax, mygrad, torch

__all__ = [
    "ABILITIES",
    "Attention",
    "as_attention",
    "attention",
    "autograd",
    "jax",
    "jax_sdpa",
    "mygrad",
    "numpy_function",
    "ours",
    "torch",
    "torch_sdpa",
]
