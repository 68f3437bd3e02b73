"""minitransformer: transformers from scratch on NumPy and Numba.

An autograd engine, hand-written layers, language models that train on a laptop, and gradient tests.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minitransformer import errors, functional, masks, nn
from minitransformer.autograd import Parameter, Tensor, check_saved_arrays, grad, no_grad, tensor
from minitransformer.functional import concat, einsum, matmul, maximum, minimum, split, stack, where
from minitransformer.kernels import use_backend
from minitransformer.random import manual_seed
from minitransformer.threads import set_num_threads
from minitransformer.version import __version__

if TYPE_CHECKING:
    from minitransformer import data, diagnose, metrics, optim
    from minitransformer.gradients import gradcheck
    from minitransformer.models import GPT, GPTConfig, ModelOutput, Transformer, from_pretrained
    from minitransformer.training import TrainConfig, Trainer

# The upper floors are imported when first asked for: who wants tensors does not wait for training.
_UPPER_FLOORS = {
    **dict.fromkeys(("GPT", "GPTConfig", "ModelOutput", "Transformer", "from_pretrained"), "models"),
    **dict.fromkeys(("TrainConfig", "Trainer"), "training"),
    "gradcheck": "gradients",
    **{module: module for module in ("data", "diagnose", "metrics", "optim")},
}

__all__ = [
    "GPT",
    "GPTConfig",
    "ModelOutput",
    "Parameter",
    "Tensor",
    "TrainConfig",
    "Trainer",
    "Transformer",
    "__version__",
    "check_saved_arrays",
    "concat",
    "data",
    "diagnose",
    "einsum",
    "errors",
    "from_pretrained",
    "functional",
    "grad",
    "gradcheck",
    "manual_seed",
    "masks",
    "matmul",
    "maximum",
    "metrics",
    "minimum",
    "nn",
    "no_grad",
    "optim",
    "set_num_threads",
    "split",
    "stack",
    "tensor",
    "use_backend",
    "where",
]


def __getattr__(name: str) -> Any:
    if name not in _UPPER_FLOORS:
        raise AttributeError(f"module 'minitransformer' has no attribute {name!r}")
    module = import_module(f"minitransformer.{_UPPER_FLOORS[name]}")
    value = module if _UPPER_FLOORS[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
