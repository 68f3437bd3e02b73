"""What a training says, and leaves behind, when a number is not finite."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.autograd import no_grad
from minitransformer.diagnose import BadOp, first_bad_op, save
from minitransformer.errors import NonFiniteError
from minitransformer.models.base import Model

LOWER_RATE = "The last checkpoint is kept. Start again with a lower learning rate or a longer warm-up"


def failure(
    problem: str, bad: BadOp, step: int, first_row: int, batch: Mapping[str, np.ndarray], folder: str | None
) -> NonFiniteError:
    """The error that names the first bad op, met in those rows of the step's batch; left in `folder`, if any."""
    last_row = first_row + len(next(iter(batch.values()))) - 1
    rows = f"row {last_row}" if first_row == last_row else f"rows {first_row} to {last_row}"
    fix = LOWER_RATE
    if folder is not None:
        path = Path(folder) / f"bad-op-step-{step}.npz"
        save(path, bad, {"step": step, "batch": rows, **batch})
        fix = f"See it with `minitransformer inspect {shlex.quote(str(path))}`. {fix}"
    return NonFiniteError("train", f"{problem}: {bad}; {rows} of the batch", fix)


def evaluation_failure(
    problem: str, model: Model, batches: Iterable[Mapping[str, Any]], step: int, folder: str | None
) -> NonFiniteError:
    """The error for a validation loss that is not finite: the batches again, watching every op."""
    first_row, was_training = 0, model.training
    model.eval()
    try:
        with no_grad():
            for batch in batches:
                bad = first_bad_op(lambda batch=batch: model(**batch).loss)  # type: ignore[misc]
                if bad is not None:
                    return failure(problem, bad, step, first_row, batch, folder)
                first_row += len(next(iter(batch.values())))
    finally:
        model.train(was_training)
    return NonFiniteError("train", f"{problem}, though that of every batch is finite", LOWER_RATE)
