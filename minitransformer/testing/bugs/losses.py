"""Wrong losses: what is counted, and what it is divided by."""

from __future__ import annotations

from typing import Any

import numpy as np

import minitransformer.ops  # noqa: F401  (registers the ops)
from minitransformer.autograd import OPS
from minitransformer.testing.bugs.bug import Patch, bug

_LOSS = OPS["cross_entropy"]
_BRUTE_FORCE = "tests/ops/test_ops_layers.py::test_cross_entropy_by_brute_force"


@bug(
    _LOSS,
    "forward",
    story="The mean is over all targets, the ignored ones included: the more padding, the smaller loss and gradient.",
    exercise="The gradient check passes: the gradient is that of the wrong mean. Which law fails?",
    solution="Padding changes nothing (L4): the loss of a batch must not change when ignored targets are appended.",
    caught_by=[_BRUTE_FORCE],
)
def loss_averaged_over_ignored(right: Any, logits: Any, targets: Any, **options: Any) -> Any:
    out, saved = right(logits, targets, **options)
    if options.get("reduction", "mean") == "mean":
        share = np.count_nonzero(saved.valid) / max(saved.valid.size, 1)
        out, saved = out * share, saved._replace(scale=saved.scale * share)
    return out, saved


def _of_ignored(right: Any, dout: Any, saved: Any) -> Any:
    """Backward of `smoothing_of_ignored`."""
    (dlogits,) = right(dout, saved)
    dlosses = dout.reshape(-1) if saved.scale is None else np.full(saved.lse.shape, dout * saved.scale, dout.dtype)
    p = np.exp(saved.logits - saved.lse[:, None])
    dlogits = dlogits.reshape(p.shape)
    slope = saved.label_smoothing * (p - 1 / p.shape[-1]) * dlosses[:, None]
    return (np.where(saved.valid[:, None], dlogits, slope).astype(dlogits.dtype).reshape(saved.shape),)


@bug(
    _LOSS,
    "forward",
    Patch(_LOSS, "backward", _of_ignored),
    story="-log p[target] is masked where the target is ignored, the smoothing term beside it is not (pytorch#73205, "
    "#69339).",
    exercise="Without smoothing all is right, and with it the gradient check passes. What do ignored rows have to do?",
    solution="Nothing: their loss is 0 and so is their gradient, whatever their logits are. Fill them with other "
    "numbers, and nothing may change.",
    caught_by=[_BRUTE_FORCE, "tests/ops/test_ops_layers.py::test_ignored_rows_may_hold_anything_and_all_ignored_is_0"],
)
def smoothing_of_ignored(right: Any, logits: Any, targets: Any, **options: Any) -> Any:
    out, saved = right(logits, targets, **options)
    if saved.label_smoothing:
        uniform = saved.lse - saved.logits.mean(axis=-1)  # -log p, averaged over the classes
        extra = np.where(saved.valid, 0, saved.label_smoothing * uniform).astype(saved.lse.dtype)
        out = out + (extra.reshape(saved.shape[:-1]) if saved.scale is None else extra.sum() * saved.scale)
    return out, saved


@bug(
    _LOSS,
    "forward",
    story="`ignore_index` is taken and not passed on, and the default, -100, is used: the model learns to predict the "
    "padding id, and does so with great success.",
    exercise="All tests use -100. Which value shows it?",
    solution="Any class: with ignore_index=0, targets of 0 have loss 0 and gradient 0.",
    caught_by=[_BRUTE_FORCE],
)
def padding_id_trained(right: Any, logits: Any, targets: Any, *, ignore_index: int = -100, **options: Any) -> Any:
    return right(logits, targets, **options)
