"""Losses: cross-entropy, mean squared error, Kullback-Leibler divergence."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import register
from minitransformer.checks import check_choice, check_flag, check_number, is_integer, shown
from minitransformer.errors import ConfigError, DTypeError, RangeError, ShapeError
from minitransformer.kernels.gpu.arrays import like, plain
from minitransformer.ops.activation import as_rows, check_float


class CrossEntropy(NamedTuple):
    logits: np.ndarray  # (N, V)
    targets: np.ndarray  # (N,)
    valid: np.ndarray  # (N,) bool
    lse: np.ndarray  # (N,)
    label_smoothing: float
    scale: float | None  # of every row's loss, None if they are not reduced
    shape: tuple[int, ...]
    kernel: ModuleType


class Difference(NamedTuple):
    difference: np.ndarray
    reduction: str


class Divergence(NamedTuple):
    input: np.ndarray
    target: np.ndarray
    log_target: bool
    reduction: str


def check_reduction(op: str, reduction: str, known: tuple[str, ...] = ("mean", "sum", "none")) -> None:
    check_choice(op, "reduction", reduction, known)


def check_targets(
    op: str,
    name: str,
    targets: np.ndarray,
    vocab_size: int,
    ignore_index: int = -100,
    *,
    fix: str = "Use the tokenizer that the model was made with",
) -> np.ndarray:
    """Which integer `targets` are not ignored, bool; `RangeError` with the position of one that is no class."""
    valid = targets != ignore_index
    outside = valid & ((targets < 0) | (targets >= vocab_size))
    if outside.any():
        position = tuple(int(i) for i in np.argwhere(outside)[0])
        raise RangeError(
            op,
            f"the {name} at position {position} is {int(targets[position])}, expected 0 to {vocab_size - 1} "
            f"or ignore_index {ignore_index}",
            fix,
        )
    return valid


def cross_entropy_forward(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[np.ndarray, CrossEntropy]:
    """-log softmax(logits)[target]; logits (..., V), integer targets (...).

    Targets equal to `ignore_index` count neither in the sum nor in the mean. The mean over no target
    is 0 (torch gives NaN there): a batch without targets then changes nothing. Targets may be on the host,
    where they are checked soonest.
    """
    check_float("cross_entropy", input=logits)
    targets = plain(targets)  # one class may be a Python number
    check_reduction("cross_entropy", reduction)
    if logits.ndim < 1 or targets.shape != logits.shape[:-1]:
        raise ShapeError(
            "cross_entropy",
            f"target has shape {targets.shape}, expected {logits.shape[:-1]} for input {logits.shape}",
            "Put the classes on the last axis and give one target per row",
        )
    if targets.dtype.kind not in "iu":
        raise DTypeError(
            "cross_entropy",
            f"target has dtype {targets.dtype}, expected integer class ids",
            "Cast it to int64",
        )
    label_smoothing = check_number("cross_entropy", "label_smoothing", label_smoothing)
    if label_smoothing > 1:
        raise ConfigError("cross_entropy", f"label_smoothing is {label_smoothing}, expected 0 to 1", "0 turns it off")
    if not is_integer(ignore_index):
        problem = f"ignore_index is {shown(ignore_index)}, expected an integer"
        raise ConfigError("cross_entropy", problem, "Pass a class id, or -100 to ignore none")
    vocab_size = logits.shape[-1]
    valid = check_targets("cross_entropy", "target", targets, vocab_size, ignore_index)
    rows, count = as_rows(logits, logits.ndim - 1), max(int(valid.sum()), 1)
    flat, valid = like(rows, targets.reshape(-1)), like(rows, valid.reshape(-1))
    kernel = kernels.serve("rowwise", logits)
    losses, lse = kernel.cross_entropy_forward(rows, flat, valid, label_smoothing)
    scale = {"none": None, "sum": 1.0, "mean": 1 / count}[reduction]
    out = losses.reshape(targets.shape) if scale is None else losses.sum() * scale
    return out, CrossEntropy(rows, flat, valid, lse, label_smoothing, scale, logits.shape, kernel)


def cross_entropy_backward(dout: np.ndarray, saved: CrossEntropy) -> tuple[np.ndarray]:
    dlosses = dout.reshape(-1) if saved.scale is None else np.zeros_like(saved.lse) + dout * saved.scale
    dlogits = saved.kernel.cross_entropy_backward(
        dlosses, saved.logits, saved.targets, saved.valid, saved.lse, saved.label_smoothing
    )
    return (dlogits.reshape(saved.shape),)


def _reduce(losses: np.ndarray, reduction: str) -> np.ndarray:
    if reduction == "none":
        return losses
    return losses.sum() / (max(losses.size, 1) if reduction == "mean" else 1)


def _spread(dout: np.ndarray, size: int, reduction: str) -> np.ndarray:
    """The upstream gradient of each unreduced loss."""
    return dout / max(size, 1) if reduction == "mean" else dout


def mse_loss_forward(
    input: np.ndarray, target: np.ndarray, *, reduction: str = "mean"
) -> tuple[np.ndarray, Difference]:
    """(input - target)^2, equal shapes."""
    check_float("mse_loss", input=input, target=target)
    check_reduction("mse_loss", reduction)
    if input.shape != target.shape:
        raise ShapeError("mse_loss", f"input has shape {input.shape}, target {target.shape}", "Make the shapes equal")
    difference = input - target
    return _reduce(difference * difference, reduction), Difference(difference, reduction)


def mse_loss_backward(dout: np.ndarray, saved: Difference) -> tuple[np.ndarray, np.ndarray]:
    dinput = 2 * saved.difference * _spread(dout, saved.difference.size, saved.reduction)
    return dinput, -dinput


def kl_div_forward(
    input: np.ndarray, target: np.ndarray, *, reduction: str = "mean", log_target: bool = False
) -> tuple[np.ndarray, Divergence]:
    """target (log target - input), `input` being log-probabilities; 0 where the target is 0.

    "batchmean" sums and divides by the first axis, which is the divergence of the definition; "mean"
    divides by the number of elements, as in torch.
    """
    check_float("kl_div", input=input, target=target)
    check_reduction("kl_div", reduction, ("mean", "batchmean", "sum", "none"))
    if input.shape != target.shape:
        raise ShapeError("kl_div", f"input has shape {input.shape}, target {target.shape}", "Make the shapes equal")
    log_target = check_flag("kl_div", "log_target", log_target)
    if log_target:
        losses = np.exp(target) * (target - input)
    else:
        positive = target.real > 0
        losses = np.where(positive, target * (np.log(np.where(positive, target, 1)) - input), 0 * target)
    out = losses.sum() / max(len(input), 1) if reduction == "batchmean" else _reduce(losses, reduction)
    return out, Divergence(input, target, log_target, reduction)


def kl_div_backward(dout: np.ndarray, saved: Divergence) -> tuple[np.ndarray, np.ndarray]:
    input, target, log_target, reduction = saved
    dlosses = dout / max(len(input), 1) if reduction == "batchmean" else _spread(dout, input.size, reduction)
    if log_target:
        p = np.exp(target)
        return -p * dlosses, p * (target - input + 1) * dlosses
    positive = target > 0
    slope = np.where(positive, np.log(np.where(positive, target, 1)) + 1 - input, 0)
    return np.where(positive, -target, 0) * dlosses, slope * dlosses


register("cross_entropy", cross_entropy_forward, cross_entropy_backward)
register("mse_loss", mse_loss_forward, mse_loss_backward)
register("kl_div", kl_div_forward, kl_div_backward)
