"""Row kernels in NumPy: the specification. Rows are the first axis, x is (N, C).

Complex-clean: the maximum is taken by the real part, nothing is conjugated, so a complex step through
a forward gives its derivative.
"""

from __future__ import annotations

import numpy as np


def softmax_forward(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum exp(x) along each row, shifted by the row's maximum so that nothing overflows."""
    out = x - x.real.max(axis=-1, keepdims=True, initial=-np.inf)
    np.exp(out, out=out)
    out /= out.sum(axis=-1, keepdims=True)
    return out


def softmax_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = p * (dout - <dout, p>)"""
    inner = np.einsum("nc,nc->n", dout, out)[:, None]
    return out * (dout - inner)


def log_softmax_forward(x: np.ndarray) -> np.ndarray:
    out = x - x.real.max(axis=-1, keepdims=True, initial=-np.inf)
    out -= np.log(np.exp(out).sum(axis=-1, keepdims=True))
    return out


def log_softmax_backward(dout: np.ndarray, out: np.ndarray) -> np.ndarray:
    """dx = dout - p * sum(dout)"""
    return dout - np.exp(out) * dout.sum(axis=-1, keepdims=True)


def layer_norm_forward(
    x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """weight * (x - mean) * rstd + bias, and the (N,) statistics. The variance is the biased one."""
    mean = x.sum(axis=-1) / x.shape[-1]
    out = x - mean[:, None]
    rstd = 1 / np.sqrt(np.einsum("nc,nc->n", out, out) / x.shape[-1] + eps)
    out *= rstd[:, None]
    for ufunc, affine in ((np.multiply, weight), (np.add, bias)):
        if affine is not None:
            out = ufunc(out, affine, out=out if affine.dtype == out.dtype else None)
    return out, mean, rstd


def layer_norm_backward(
    dout: np.ndarray, x: np.ndarray, weight: np.ndarray | None, mean: np.ndarray, rstd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dweight, dbias. With n = (x - mean) rstd and dn = dout weight:

    dx = rstd (dn - mean(dn) - n mean(dn n))
    """
    normed = (x - mean[:, None]) * rstd[:, None]  # (N, C)
    dweight = np.einsum("nc,nc->c", dout, normed)
    dbias = dout.sum(axis=0)
    dnormed = dout if weight is None else dout * weight
    slope = np.einsum("nc,nc->n", dnormed, normed) / x.shape[-1]
    normed *= slope[:, None]
    dx = dnormed - dnormed.sum(axis=-1, keepdims=True) / x.shape[-1]
    dx -= normed
    dx *= rstd[:, None]
    return dx, dweight, dbias


def add_layer_norm(
    x: np.ndarray,
    delta: np.ndarray,
    delta_bias: np.ndarray | None,
    weight: np.ndarray | None,
    bias: np.ndarray | None,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x += delta + delta_bias in place, a residual sum; then the layer norm of that x, as `layer_norm_forward`."""
    x += delta
    if delta_bias is not None:
        x += delta_bias
    return layer_norm_forward(x, weight, bias, eps)


def layer_norm_backward_add(
    dout: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None,
    mean: np.ndarray,
    rstd: np.ndarray,
    dx: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """dweight, dbias; the gradient of x is added to `dx` in place, where that of the residual stream is."""
    more, dweight, dbias = layer_norm_backward(dout, x, weight, mean, rstd)
    dx += more
    return dweight, dbias


def rms_norm_forward(x: np.ndarray, weight: np.ndarray | None, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """weight * x * rrms, and the (N,) reciprocal root mean squares."""
    rrms = 1 / np.sqrt(np.einsum("nc,nc->n", x, x) / x.shape[-1] + eps)
    out = x * rrms[:, None]
    return (out if weight is None else out * weight), rrms


def rms_norm_backward(
    dout: np.ndarray, x: np.ndarray, weight: np.ndarray | None, rrms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """dx, dweight. With n = x rrms and dn = dout weight: dx = rrms (dn - n mean(dn n))"""
    normed = x * rrms[:, None]
    dweight = np.einsum("nc,nc->c", dout, normed)
    dnormed = dout if weight is None else dout * weight
    slope = np.einsum("nc,nc->n", dnormed, normed) / x.shape[-1]
    return (dnormed - normed * slope[:, None]) * rrms[:, None], dweight


def cross_entropy_forward(
    logits: np.ndarray, targets: np.ndarray, valid: np.ndarray, label_smoothing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (N,), 0 where not `valid`, and the log-sum-exp of each row.

    With smoothing e over V classes: (1 - e) * -log p[target] + e * mean over classes of -log p.
    """
    rows = np.arange(len(logits))
    top = logits.real.max(axis=-1, initial=-np.inf)
    lse = np.log(np.exp(logits - top[:, None]).sum(axis=-1)) + top
    losses = (1 - label_smoothing) * (lse - logits[rows, np.where(valid, targets, 0)])
    if label_smoothing:
        losses = losses + label_smoothing * (lse - logits.mean(axis=-1))
    return np.where(valid, losses, losses.dtype.type(0)), lse


def cross_entropy_backward(
    dlosses: np.ndarray,
    logits: np.ndarray,
    targets: np.ndarray,
    valid: np.ndarray,
    lse: np.ndarray,
    label_smoothing: float,
) -> np.ndarray:
    """dlogits = dloss (p - (1 - e) onehot - e / V), 0 in rows that are not valid."""
    dlogits = logits - lse[:, None]
    np.exp(dlogits, out=dlogits)
    if label_smoothing:
        dlogits -= label_smoothing / logits.shape[-1]
    dlogits[np.arange(len(logits)), np.where(valid, targets, 0)] -= 1 - label_smoothing
    dlogits *= dlosses[:, None]
    dlogits[~valid] = 0
    return dlogits


def add_residual(x: np.ndarray, delta: np.ndarray, bias: np.ndarray | None) -> None:
    """x += delta + bias, in place: rows (N, C) and a bias (C,)."""
    x += delta
    if bias is not None:
        x += bias


def column_sum(x: np.ndarray) -> np.ndarray:
    """The sum of the rows, (C,): the gradient of a bias."""
    return x.sum(axis=0)


def embedding_backward(dout: np.ndarray, ids: np.ndarray, num_rows: int) -> np.ndarray:
    """(V, C) from dout (N, C) and ids (N,): row v is the sum of dout[n] over all n with ids[n] = v, in order of n."""
    dweight = np.zeros((num_rows, dout.shape[1]), dout.dtype)
    if ids.size:
        # Sorting groups equal ids into runs; reduceat then sums each run in one pass over memory.
        order = np.argsort(ids, kind="stable")
        grouped = ids[order]
        starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
        dweight[grouped[starts]] = np.add.reduceat(dout[order], starts, axis=0)
    return dweight
