"""minitransformer: transformers from scratch on NumPy and Numba.

An autograd engine, hand-written layers, language models that train on a laptop, and gradient tests.
"""

from minitransformer import data, errors, functional, masks, metrics, nn, optim
from minitransformer.autograd import Parameter, Tensor, check_saved_arrays, grad, no_grad, tensor
from minitransformer.functional import concat, einsum, matmul, maximum, minimum, split, stack, where
from minitransformer.kernels import use_backend
from minitransformer.models import GPT, GPTConfig, ModelOutput, from_pretrained
from minitransformer.random import manual_seed
from minitransformer.threads import set_num_threads
from minitransformer.training import TrainConfig, Trainer
from minitransformer.version import __version__

__all__ = [
    "GPT",
    "GPTConfig",
    "ModelOutput",
    "Parameter",
    "Tensor",
    "TrainConfig",
    "Trainer",
    "__version__",
    "check_saved_arrays",
    "concat",
    "data",
    "einsum",
    "errors",
    "from_pretrained",
    "functional",
    "grad",
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
