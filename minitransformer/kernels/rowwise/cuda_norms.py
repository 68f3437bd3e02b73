"""Layer norm and RMS norm on the GPU: a block a row, and strips of rows for the sums that the parameters need."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from numba import boolean, float32, float64, int64

from minitransformer.kernels.gpu.blocks import (
    NARROW,
    WIDE,
    Block,
    U,
    block_for,
    column_blocks,
    column_sum,
    down_columns,
    functions,
    launch,
    reductions,
    strips,
    type_of,
)
from minitransformer.kernels.gpu.entrance import entrance
from minitransformer.kernels.gpu.kernel import Kernel

# --- the kernels -----------------------------------------------------------------------------------------


@cache
def _layer_norm(T: Any, block: Block, adds: bool) -> Kernel:
    """`adds` says that `x += delta + delta_bias` comes first."""
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        math = functions(cuda)
        total, _ = reductions(cuda, block)

        def kernel(
            x: Any,
            delta: Any,
            delta_bias: Any,
            weight: Any,
            bias: Any,
            C: Any,
            eps: Any,
            out: Any,
            mean: Any,
            rstd: Any,
        ) -> None:
            scratch = cuda.shared.array(warps, T)
            n, t = U(cuda.blockIdx.x), cuda.threadIdx.x
            start = n * U(C)
            first = T(0)
            c = t
            while c < C:
                i = start + U(c)
                a = x[i]
                if adds:
                    a = a + delta[i] + delta_bias[U(c)]
                    x[i] = a  # read again by this thread alone
                first += a
                c += threads
            m = total(first, scratch) / T(C)
            second = T(0)
            c = t
            while c < C:
                a = x[start + U(c)] - m
                second += a * a
                c += threads
            r = T(1) / math.sqrt(total(second, scratch) / T(C) + eps)
            c = t
            while c < C:
                i = start + U(c)
                out[i] = (x[i] - m) * r * weight[U(c)] + bias[U(c)]
                c += threads
            if t == 0:
                mean[n] = m
                rstd[n] = r

        return kernel

    return Kernel(build, (T[::1],) * 5 + (int64, T, T[::1], T[::1], T[::1]), threads)


@cache
def _layer_norm_backward(T: Any, block: Block) -> Kernel:
    """`adds` says that the gradient is added to `dx`."""
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        total, _ = reductions(cuda, block)

        def kernel(dout: Any, x: Any, weight: Any, mean: Any, rstd: Any, C: Any, adds: Any, dx: Any) -> None:
            scratch = cuda.shared.array(warps, T)
            n, t = U(cuda.blockIdx.x), cuda.threadIdx.x
            start, m, r = n * U(C), mean[n], rstd[n]
            straight = slope = T(0)
            c = t
            while c < C:
                i = start + U(c)
                d = dout[i] * weight[U(c)]
                straight += d
                slope += d * ((x[i] - m) * r)
                c += threads
            straight = total(straight, scratch) / T(C)
            slope = total(slope, scratch) / T(C)
            c = t
            while c < C:
                i = start + U(c)
                d = (dout[i] * weight[U(c)] - straight - (x[i] - m) * r * slope) * r
                if adds:
                    d += dx[i]
                dx[i] = d
                c += threads

        return kernel

    return Kernel(build, (T[::1],) * 5 + (int64, boolean, T[::1]), threads)


@cache
def _layer_norm_sums(T: Any, block: Block) -> Kernel:
    """Row y of `sums` (count, 2 C) is what strip y adds to dweight, and then to dbias."""
    threads, warp, warps = block.threads, block.warp, block.warps

    def build(cuda: Any) -> Any:
        down = down_columns(cuda, block)

        def kernel(dout: Any, x: Any, mean: Any, rstd: Any, N: Any, C: Any, height: Any, sums: Any) -> None:
            scratch = cuda.shared.array(threads, T)
            c = cuda.blockIdx.x * warp + cuda.threadIdx.x % warp
            n = cuda.blockIdx.y * height + cuda.threadIdx.x // warp
            last = min((cuda.blockIdx.y + 1) * height, N)
            dweight = dbias = T(0)
            if c < C:
                while n < last:
                    i = U(n) * U(C) + U(c)
                    d = dout[i]
                    dweight += d * ((x[i] - mean[U(n)]) * rstd[U(n)])
                    dbias += d
                    n += warps
            dweight, dbias = down(dweight, scratch), down(dbias, scratch)
            if cuda.threadIdx.x < warp and c < C:
                i = U(cuda.blockIdx.y) * U(2 * C) + U(c)
                sums[i] = dweight
                sums[i + U(C)] = dbias

        return kernel

    return Kernel(build, (T[::1],) * 4 + (int64, int64, int64, T[::1]), threads)


@cache
def _rms_norm(T: Any, block: Block) -> Kernel:
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        math = functions(cuda)
        total, _ = reductions(cuda, block)

        def kernel(x: Any, weight: Any, C: Any, eps: Any, out: Any, rrms: Any) -> None:
            scratch = cuda.shared.array(warps, T)
            n, t = U(cuda.blockIdx.x), cuda.threadIdx.x
            start = n * U(C)
            second = T(0)
            c = t
            while c < C:
                a = x[start + U(c)]
                second += a * a
                c += threads
            r = T(1) / math.sqrt(total(second, scratch) / T(C) + eps)
            c = t
            while c < C:
                i = start + U(c)
                out[i] = x[i] * r * weight[U(c)]
                c += threads
            if t == 0:
                rrms[n] = r

        return kernel

    return Kernel(build, (T[::1], T[::1], int64, T, T[::1], T[::1]), threads)


@cache
def _rms_norm_backward(T: Any, block: Block) -> Kernel:
    threads, warps = block.threads, block.warps

    def build(cuda: Any) -> Any:
        total, _ = reductions(cuda, block)

        def kernel(dout: Any, x: Any, weight: Any, rrms: Any, C: Any, dx: Any) -> None:
            scratch = cuda.shared.array(warps, T)
            n, t = U(cuda.blockIdx.x), cuda.threadIdx.x
            start, r = n * U(C), rrms[n]
            slope = T(0)
            c = t
            while c < C:
                i = start + U(c)
                slope += dout[i] * weight[U(c)] * (x[i] * r)
                c += threads
            slope = total(slope, scratch) / T(C)
            c = t
            while c < C:
                i = start + U(c)
                dx[i] = (dout[i] * weight[U(c)] - x[i] * r * slope) * r
                c += threads

        return kernel

    return Kernel(build, (T[::1],) * 4 + (int64, T[::1]), threads)


@cache
def _rms_norm_sums(T: Any, block: Block) -> Kernel:
    """Row y of `sums` (count, C) is what strip y adds to dweight."""
    threads, warp, warps = block.threads, block.warp, block.warps

    def build(cuda: Any) -> Any:
        down = down_columns(cuda, block)

        def kernel(dout: Any, x: Any, rrms: Any, N: Any, C: Any, height: Any, sums: Any) -> None:
            scratch = cuda.shared.array(threads, T)
            c = cuda.blockIdx.x * warp + cuda.threadIdx.x % warp
            n = cuda.blockIdx.y * height + cuda.threadIdx.x // warp
            last = min((cuda.blockIdx.y + 1) * height, N)
            dweight = T(0)
            if c < C:
                while n < last:
                    i = U(n) * U(C) + U(c)
                    dweight += dout[i] * (x[i] * rrms[U(n)])
                    n += warps
            dweight = down(dweight, scratch)
            if cuda.threadIdx.x < warp and c < C:
                sums[U(cuda.blockIdx.y) * U(C) + U(c)] = dweight

        return kernel

    return Kernel(build, (T[::1],) * 3 + (int64, int64, int64, T[::1]), threads)


def configurations() -> Iterator[tuple[str, Kernel]]:
    """Every kernel of this file as a GPU gets it."""
    for T in (float32, float64):
        for block in (WIDE, NARROW):
            yield f"layer_norm {T} {block.threads}", _layer_norm(T, block, False)
            yield f"add_layer_norm {T} {block.threads}", _layer_norm(T, block, True)
            yield f"layer_norm_backward {T} {block.threads}", _layer_norm_backward(T, block)
            yield f"rms_norm {T} {block.threads}", _rms_norm(T, block)
            yield f"rms_norm_backward {T} {block.threads}", _rms_norm_backward(T, block)
        yield f"layer_norm_sums {T}", _layer_norm_sums(T, WIDE)
        yield f"rms_norm_sums {T}", _rms_norm_sums(T, WIDE)


# --- their entrances -------------------------------------------------------------------------------------


@entrance("NC", "C", "C")
def layer_norm_forward(x: Any, weight: Any | None, bias: Any | None, eps: float) -> tuple[Any, Any, Any]:
    """weight * (x - mean) * rstd + bias, and the (N,) statistics. The variance is the biased one."""
    return _normed(x, None, None, weight, bias, eps)


@entrance("NC!", "NC", "C", "C", "C")
def add_layer_norm(
    x: Any, delta: Any, delta_bias: Any | None, weight: Any | None, bias: Any | None, eps: float
) -> tuple[Any, Any, Any]:
    """x += delta + delta_bias in place, a residual sum; then the layer norm of that x, as `layer_norm_forward`."""
    return _normed(x, delta, delta_bias, weight, bias, eps)


@entrance("NC", "NC", "C", "N", "N")
def layer_norm_backward(dout: Any, x: Any, weight: Any | None, mean: Any, rstd: Any) -> tuple[Any, Any, Any]:
    """dx, dweight, dbias."""
    dx = np.empty_like(x)
    return dx, *_layer_norm_gradients(dout, x, weight, mean, rstd, False, dx)


@entrance("NC", "NC", "C", "N", "N", "NC!")
def layer_norm_backward_add(dout: Any, x: Any, weight: Any | None, mean: Any, rstd: Any, dx: Any) -> tuple[Any, Any]:
    """dweight, dbias; the gradient of x is added to `dx` in place, where that of the residual stream is."""
    return _layer_norm_gradients(dout, x, weight, mean, rstd, True, dx)


@entrance("NC", "C")
def rms_norm_forward(x: Any, weight: Any | None, eps: float) -> tuple[Any, Any]:
    """weight * x * rrms, and the (N,) reciprocal root mean squares."""
    N, C = x.shape
    out, rrms = np.empty_like(x), np.empty_like(x, shape=(N,))
    launch(_rms_norm(type_of(x), block_for(x, C)), N, x, _or_ones(x, weight), C, eps, out, rrms)
    return out, rrms


@entrance("NC", "NC", "C", "N")
def rms_norm_backward(dout: Any, x: Any, weight: Any | None, rrms: Any) -> tuple[Any, Any]:
    """dx, dweight. With n = x rrms and dn = dout weight: dx = rrms (dn - n mean(dn n))"""
    N, C = x.shape
    dx, T = np.empty_like(x), type_of(x)
    launch(_rms_norm_backward(T, block_for(x, C)), N, dout, x, _or_ones(x, weight), rrms, C, dx)
    block = block_for(x)
    count, height = strips(N, block)
    sums = np.empty_like(x, shape=(count, C))
    launch(_rms_norm_sums(T, block), (column_blocks(C, block), count), dout, x, rrms, N, C, height, sums)
    return dx, column_sum(sums)


def _normed(
    x: Any, delta: Any | None, delta_bias: Any | None, weight: Any | None, bias: Any | None, eps: float
) -> tuple[Any, Any, Any]:
    N, C = x.shape
    out, mean, rstd = np.empty_like(x), np.empty_like(x, shape=(N,)), np.empty_like(x, shape=(N,))
    kernel = _layer_norm(type_of(x), block_for(x, C), delta is not None)
    # Without `delta`, the kernel reads neither that nor its bias: any array will do.
    added = (x, x) if delta is None else (delta, _or_zeros(x, delta_bias))
    launch(kernel, N, x, *added, _or_ones(x, weight), _or_zeros(x, bias), C, eps, out, mean, rstd)
    return out, mean, rstd


def _layer_norm_gradients(
    dout: Any, x: Any, weight: Any | None, mean: Any, rstd: Any, adds: bool, dx: Any
) -> tuple[Any, Any]:
    """dweight, dbias, and dx where it is wanted."""
    (N, C), T = x.shape, type_of(x)
    kernel = _layer_norm_backward(T, block_for(x, C))
    launch(kernel, N, dout, x, _or_ones(x, weight), mean, rstd, C, adds, dx)
    block = block_for(x)
    count, height = strips(N, block)
    sums = np.empty_like(x, shape=(count, 2 * C))
    blocks = column_blocks(C, block), count
    launch(_layer_norm_sums(T, block), blocks, dout, x, mean, rstd, N, C, height, sums)
    both = column_sum(sums)
    return both[:C], both[C:]


def _or_ones(x: Any, weight: Any | None) -> Any:
    return np.ones_like(x, shape=x.shape[1:]) if weight is None else weight


def _or_zeros(x: Any, bias: Any | None) -> Any:
    return np.zeros_like(x, shape=x.shape[1:]) if bias is None else bias
