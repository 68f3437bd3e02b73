"""One small valid call of every public function: what the fuzzer spoils.

A line for each name; `test_calls.py` fails when a public name has none. The package's own names are here, the
others in the files that are gathered here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from material import Lines, bools, call, gpt, inside, leaf, real, tokens
from valid_layers import LAYERS
from valid_models import MODELS
from valid_tensors import TENSORS
from valid_training import TRAINING

import minitransformer as mt
from minitransformer import training

# Lines that are refused as they stand: files that are not there, functions that would lose a gradient.
REFUSED = {"from_pretrained", "data.load_tokenizer", "numpy.arctan", "numpy.sum", "optim.Optimizer"}

VALID: Lines = {
    "ModelOutput": lambda: call(mt.ModelOutput, loss=leaf(1)),
    "Parameter": lambda: call(mt.Parameter, real(2, 3), requires_grad=True),
    "Tensor": lambda: call(mt.Tensor, real(2, 3), requires_grad=True),
    "TrainConfig": lambda: call(
        training.TrainConfig,
        out_dir="run",
        max_steps=2,
        batch_size=2,
        learning_rate=0.1,
        min_learning_rate=0.01,
        warmup_steps=1,
        schedule="linear",
        optimizer="sgd",
        betas=(0.9, 0.99),
        weight_decay=0.1,
        l1=0.0,
        grad_clip=1.0,
        grad_accumulation_steps=1,
        label_smoothing=0.0,
        eval_interval=1,
        save_interval=1,
        early_stopping_patience=2,
        seed=3,
        shards=1,
        threads=1,
        device="cpu",
        eval_batches=2,
        progress=False,
    ),
    "Trainer": lambda: call(
        training.Trainer, gpt(), training.TrainConfig(max_steps=1, progress=False), tokens(), tokens(), callbacks=[]
    ),
    "check_saved_arrays": lambda: call(inside(mt.check_saved_arrays)),
    "concat": lambda: call(mt.concat, [leaf(2, 3), real(1, 3)], dim=0),
    "einsum": lambda: call(mt.einsum, "ij,jk->ik", leaf(2, 3), leaf(3, 2)),
    "from_pretrained": lambda: call(lambda folder: mt.from_pretrained(folder), "absent"),
    "grad": lambda: call(lambda f, x, **kw: mt.grad(f(x), [x], **kw), lambda x: x * x, leaf(2, 3), gradient=real(2, 3)),
    "gradcheck": lambda: call(
        mt.gradcheck,
        lambda *x: x[0].tanh(),
        [real(2, 3)],
        method="central",
        mode="full",
        directions=2,
        eps=1e-3,
        atol=1e-2,
        rtol=1e-2,
        on_kink="raise",
        raise_exception=False,
    ),
    "manual_seed": lambda: call(mt.manual_seed, 3),
    "matmul": lambda: call(mt.matmul, leaf(2, 3), leaf(3, 2)),
    "maximum": lambda: call(mt.maximum, leaf(2, 3), real(3)),
    "minimum": lambda: call(mt.minimum, leaf(2, 3), 0.5),
    "no_grad": lambda: call(inside(mt.no_grad)),
    "set_num_threads": lambda: call(mt.set_num_threads, 2),
    "split": lambda: call(mt.split, leaf(3, 2), 2, dim=0),
    "split sections": lambda: call(mt.split, leaf(3, 2), (1, 2), dim=0),
    "stack": lambda: call(mt.stack, (leaf(2, 3), leaf(2, 3)), dim=1),
    "tensor": lambda: call(mt.tensor, [[1.0, 2.0], [3.0, 4.0]], dtype="float64", requires_grad=True, device="cpu"),
    "use_backend": lambda: call(inside(mt.use_backend), "reference"),
    "where": lambda: call(mt.where, bools(2, 3), leaf(2, 3), 0.0),
    **TENSORS,
    **LAYERS,
    **MODELS,
    **TRAINING,
}


def public_names() -> Iterator[str]:
    """What must have a line in VALID."""
    yield from (name for name in mt.__all__ if callable(getattr(mt, name)))
    for module in ("functional", "nn", "optim", "data"):
        owner = getattr(mt, module)
        yield from (f"{module}.{name}" for name in owner.__all__ if callable(getattr(owner, name)))
    for module in ("masks", "metrics", "optim.schedules"):
        owner = operator.attrgetter(module)(mt)
        for name, value in vars(owner).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == owner.__name__ and name.islower():
                yield f"{module}.{name}"
    yield from (f"Tensor.{name}" for name, value in vars(mt.Tensor).items() if name[0] != "_" and callable(value))
