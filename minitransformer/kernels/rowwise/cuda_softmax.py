"""Softmax, log-softmax and cross-entropy on the GPU: a block a row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import boolean, float32, float64, int64

from minitransformer.kernels.gpu.blocks import NARROW, WIDE, Block, U, block_for, functions, launch, reductions, type_of
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel

# --- softmax ---------------------------------------------------------------------------------------------


def _log_sum(cuda: Any, T: Any, block: Block) -> Any:
    """log_sum(x, start, C, scratch): the maximum of a row, and the sum of exp(x - maximum)."""
    threads, infinity = block.threads, T(np.inf)
    math = functions(cuda)
    total, largest = reductions(cuda, block)

    def sums(x: Any, start: Any, C: Any, scratch: Any) -> Any:
        top, t = -infinity, cuda.threadIdx.x
        c = t
        while c < C:
            a = x[start + U(c)]
            if a > top or a != a:  # NaN stays: nothing is greater
                top = a
            c += threads
        top = largest(top, scratch)
        share = T(0)
        c = t
        while c < C:
            share += math.exp(x[start + U(c)] - top)
            c += threads
        return top, total(share, scratch)

    return cuda.jit(device=True)(sums)


@cache
def _softmax(T: Any, block: Block, log: bool) -> Kernel:
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        math, sums = functions(cuda), _log_sum(cuda, T, block)

        def kernel(x: Any, C: Any, out: Any) -> None:
            scratch = cuda.shared.array(warps, T)
            start = U(cuda.blockIdx.x) * U(C)
            top, total = sums(x, start, C, scratch)
            log_total = math.log(total)
            c = cuda.threadIdx.x
            while c < C:
                i = start + U(c)
                a = x[i] - top
                if log:
                    out[i] = a - log_total
                else:
                    out[i] = math.exp(a) / total
                c += threads

        return kernel

    return Kernel(build, (T[::1], int64, T[::1]), threads)


@cache
def _softmax_backward(T: Any, block: Block, log: bool) -> Kernel:
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        math = functions(cuda)
        total, _ = reductions(cuda, block)

        def kernel(dout: Any, out: Any, C: Any, dx: Any) -> None:
            scratch = cuda.shared.array(warps, T)
            start, t = U(cuda.blockIdx.x) * U(C), cuda.threadIdx.x
            inner = T(0)
            c = t
            while c < C:
                i = start + U(c)
                if log:
                    inner += dout[i]
                else:
                    inner += dout[i] * out[i]
                c += threads
            inner = total(inner, scratch)
            c = t
            while c < C:
                i = start + U(c)
                if log:
                    dx[i] = dout[i] - math.exp(out[i]) * inner
                else:
                    dx[i] = out[i] * (dout[i] - inner)
                c += threads

        return kernel

    return Kernel(build, (T[::1], T[::1], int64, T[::1]), threads)


@entrance("NC")
def softmax_forward(x: Any) -> Any:
    """exp(x) / sum exp(x) along each row, shifted by the row's maximum so that nothing overflows."""
    return _forward(x, False)


@entrance("NC", "NC")
def softmax_backward(dout: Any, out: Any) -> Any:
    """dx = p * (dout - <dout, p>)"""
    return _backward(dout, out, False)


@entrance("NC")
def log_softmax_forward(x: Any) -> Any:
    """x - log sum exp(x) along each row."""
    return _forward(x, True)


@entrance("NC", "NC")
def log_softmax_backward(dout: Any, out: Any) -> Any:
    """dx = dout - p * sum(dout)"""
    return _backward(dout, out, True)


def _forward(x: Any, log: bool) -> Any:
    (N, C), out = x.shape, np.empty_like(x)
    launch(_softmax(type_of(x), block_for(x, C), log), N, x, C, out)
    return out


def _backward(dout: Any, out: Any, log: bool) -> Any:
    (N, C), dx = out.shape, np.empty_like(out)
    launch(_softmax_backward(type_of(out), block_for(out, C), log), N, dout, out, C, dx)
    return dx


# --- cross-entropy ---------------------------------------------------------------------------------------


@cache
def _cross_entropy(T: Any, block: Block) -> Kernel:
    """`keep` is 1 - smoothing. The target of a row that is not valid is not looked at."""
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        math, sums = functions(cuda), _log_sum(cuda, T, block)
        total, _ = reductions(cuda, block)

        def kernel(
            logits: Any, targets: Any, valid: Any, V: Any, keep: Any, smoothing: Any, losses: Any, lses: Any
        ) -> None:
            scratch = cuda.shared.array(warps, T)
            n, t = U(cuda.blockIdx.x), cuda.threadIdx.x
            start = n * U(V)
            top, share = sums(logits, start, V, scratch)
            lse = math.log(share) + top
            mean = T(0)
            if smoothing > T(0):  # for all threads alike
                c = t
                while c < V:
                    mean += logits[start + U(c)]
                    c += threads
                mean = total(mean, scratch) / T(V)
            if t == 0:
                loss = T(0)
                if valid[n]:
                    loss = keep * (lse - logits[start + U(targets[n])])
                    if smoothing > T(0):
                        loss += smoothing * (lse - mean)
                losses[n] = loss
                lses[n] = lse

        return kernel

    return Kernel(build, (T[::1], int64[::1], boolean[::1], int64, T, T, T[::1], T[::1]), threads)


@cache
def _cross_entropy_backward(T: Any, block: Block) -> Kernel:
    """`keep` is 1 - smoothing, `share` smoothing / V."""
    threads = block.threads

    def build(cuda: Any) -> Any:
        math = functions(cuda)

        def kernel(
            dlosses: Any,
            logits: Any,
            targets: Any,
            valid: Any,
            lses: Any,
            V: Any,
            keep: Any,
            share: Any,
            dlogits: Any,
        ) -> None:
            n, t = U(cuda.blockIdx.x), cuda.threadIdx.x
            start, lse, target, counts, dloss = n * U(V), lses[n], targets[n], valid[n], dlosses[n]
            c = t
            while c < V:
                d = T(0)
                if counts:
                    d = math.exp(logits[start + U(c)] - lse) - share
                    if c == target:
                        d -= keep
                    d *= dloss
                dlogits[start + U(c)] = d
                c += threads

        return kernel

    types = (T[::1], T[::1], int64[::1], boolean[::1], T[::1], int64, T, T, T[::1])
    return Kernel(build, types, threads)


@entrance("NV", "N", "N")
def cross_entropy_forward(logits: Any, targets: Any, valid: Any, label_smoothing: float) -> tuple[Any, Any]:
    """Losses (N,), 0 where not `valid`, and the log-sum-exp of each row.

    With smoothing e over V classes: (1 - e) * -log p[target] + e * mean over classes of -log p.
    """
    N, V = logits.shape
    losses, lse = np.empty_like(logits, shape=(N,)), np.empty_like(logits, shape=(N,))
    kernel = _cross_entropy(type_of(logits), block_for(logits, V))
    launch(kernel, N, logits, targets, valid, V, 1 - label_smoothing, label_smoothing, losses, lse)
    return losses, lse


@entrance("N", "NV", "N", "N", "N")
def cross_entropy_backward(
    dlosses: Any, logits: Any, targets: Any, valid: Any, lse: Any, label_smoothing: float
) -> Any:
    """dlogits = dloss (p - (1 - e) onehot - e / V), 0 in rows that are not valid."""
    (N, V), dlogits = logits.shape, np.empty_like(logits)
    kernel = _cross_entropy_backward(type_of(logits), block_for(logits, V))
    settings = V, 1 - label_smoothing, label_smoothing / max(V, 1)
    launch(kernel, N, dlosses, logits, targets, valid, lse, *settings, dlogits)
    return dlogits


def configurations() -> Iterator[tuple[str, Kernel]]:
    """Every kernel of this file as a GPU gets it."""
    for T in (float32, float64):
        for block in (WIDE, NARROW):
            for log in (False, True):
                name = "log_softmax" if log else "softmax"
                yield f"{name} {T} {block.threads}", _softmax(T, block, log)
                yield f"{name}_backward {T} {block.threads}", _softmax_backward(T, block, log)
            yield f"cross_entropy {T} {block.threads}", _cross_entropy(T, block)
            yield f"cross_entropy_backward {T} {block.threads}", _cross_entropy_backward(T, block)
