"""Matrix products: matmul, linear and einsum. All of them end in BLAS."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from minitransformer.autograd import check_arrays, register
from minitransformer.checks import shown
from minitransformer.errors import DTypeError, ShapeError
from minitransformer.kernels.gpu.arrays import contiguous, plain
from minitransformer.ops.arithmetic import sum_to


class Product(NamedTuple):
    a: np.ndarray
    b: np.ndarray


class Linear(NamedTuple):
    x: np.ndarray
    weight: np.ndarray
    biased: bool


class Einsum(NamedTuple):
    operands: tuple[np.ndarray, ...]
    terms: tuple[str, ...]
    result: str


def matmul_forward(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, Product]:
    """Matrix product over the last two axes, leading axes broadcast; 1-D operands as in NumPy."""
    if a is None or b is None or np.ndim(a) == 0 or np.ndim(b) == 0:
        raise ShapeError("matmul", "an operand is a single number, expected at least one axis", "Use *")
    if a.shape[-1] != (b.shape[-2] if b.ndim > 1 else b.shape[0]):
        raise ShapeError(
            "matmul",
            f"the inner sizes of {a.shape} and {b.shape} differ",
            "The last axis of the left must equal the last but one of the right",
        )
    try:
        return np.matmul(a, b), Product(a, b)
    except ValueError:
        raise ShapeError(
            "matmul",
            f"the leading axes of {a.shape} and {b.shape} do not broadcast",
            "Compared from the right, sizes must be equal or 1",
        ) from None


def matmul_backward(dout: np.ndarray, saved: Product) -> tuple[np.ndarray, ...]:
    a, b = saved
    matrix_a = a if a.ndim > 1 else a[None, :]  # a row
    matrix_b = b if b.ndim > 1 else b[:, None]  # a column
    if a.ndim == 1:
        dout = dout[..., None, :] if b.ndim > 1 else dout[None]
    if b.ndim == 1:
        dout = dout[..., None]
    da = dout @ matrix_b.swapaxes(-1, -2)  # (..., N, K)
    db = matrix_a.swapaxes(-1, -2) @ dout  # (..., K, M)
    return sum_to(da, matrix_a.shape).reshape(a.shape), sum_to(db, matrix_b.shape).reshape(b.shape)


def _rows(x: np.ndarray) -> np.ndarray:
    """(..., C) as (N, C), contiguous; -1 would not do for C = 0."""
    return contiguous(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray, Linear]:
    """`x @ weight.T + bias`: x (..., C_in), weight (C_out, C_in) as in torch, bias (C_out,)."""
    check_arrays("linear", x=x, weight=weight)
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            "linear",
            f"x has shape {x.shape}, weight {weight.shape}, expected (..., C_in) and (C_out, C_in)",
            "The last axis of x must equal the last axis of the weight",
        )
    if bias is not None:
        check_arrays("linear", bias=bias)
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ShapeError(
            "linear",
            f"bias has shape {bias.shape}, expected ({weight.shape[0]},) for weight {weight.shape}",
            "Give one bias per output",
        )
    rows = _rows(x)  # (N, C_in)
    out = rows @ weight.T  # (N, C_out)
    if bias is not None:
        out = np.add(out, bias, out=out if out.dtype == np.result_type(out, bias) else None)
    return out.reshape(*x.shape[:-1], weight.shape[0]), Linear(x, weight, bias is not None)


def linear_backward(dout: np.ndarray, saved: Linear) -> tuple[np.ndarray, ...]:
    x, weight, biased = saved
    drows, rows = _rows(dout), _rows(x)  # (N, C_out), (N, C_in)
    dx = (drows @ weight).reshape(x.shape)
    dweight = drows.T @ rows  # (C_out, C_in)
    if not biased:
        return dx, dweight
    return dx, dweight, np.ones_like(drows, shape=drows.shape[:1]) @ drows  # BLAS sums columns faster than sum(0)


def einsum_forward(*operands: np.ndarray, equation: str) -> tuple[np.ndarray, Einsum]:
    """Einstein summation with named axes, as `"bthd,bshd->bhts"`.

    No ellipsis and no index twice in one operand: write the axes out, they are what is documented.
    """
    if not isinstance(equation, str):
        raise DTypeError("einsum", f"equation is {shown(equation)}, expected a string", "Pass it first: 'ij,jk->ik'")
    check_arrays("einsum", **{f"operand {i}": operand for i, operand in enumerate(operands)})
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = tuple(inputs.split(","))
    if not arrow:
        counts = "".join(terms)
        result = "".join(sorted(c for c in set(counts) if counts.count(c) == 1))
    if not all(c.isalpha() for c in "".join(terms) + result):
        raise DTypeError(
            "einsum",
            f"equation {shown(equation)} holds something else than letters",
            "Name every axis by a letter",
        )
    if any(len(set(term)) != len(term) for term in (*terms, result)):
        raise ShapeError(
            "einsum", f"equation {shown(equation)} repeats an index within one term", "Use indexing for diagonals"
        )
    if not set(result) <= set("".join(terms)):
        raise ShapeError(
            "einsum", f"equation {shown(equation)} has a result index that no input has", "Use expand to repeat"
        )
    if len(terms) != len(operands) or any(len(t) != o.ndim for t, o in zip(terms, operands, strict=False)):
        raise ShapeError(
            "einsum",
            f"equation {shown(equation)} does not fit shapes {[o.shape for o in operands]}",
            "Give one term per operand and one letter per axis",
        )
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for letter, size in zip(term, operand.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ShapeError(
                    "einsum",
                    f"index {letter!r} has sizes {sizes[letter]} and {size} in {equation!r}",
                    "Axes that share a letter must have one size",
                )
    out = plain(np.einsum(",".join(terms) + "->" + result, *operands, optimize=True))
    return out, Einsum(operands, terms, result)


def einsum_backward(dout: np.ndarray, saved: Einsum) -> tuple[np.ndarray, ...]:
    """Each gradient is the einsum of `dout` with all other operands, indices exchanged."""
    gradients = []
    for position, (term, operand) in enumerate(zip(saved.terms, saved.operands, strict=True)):
        others = [i for i in range(len(saved.terms)) if i != position]
        inputs = [saved.result, *(saved.terms[i] for i in others)]
        arrays = [dout, *(saved.operands[i] for i in others)]
        present = set("".join(inputs))
        # an index that only this operand had was summed: its gradient is the same along that axis
        alone = [letter for letter in term if letter not in present]
        inputs.extend(alone)
        arrays.extend(np.ones_like(dout, shape=(operand.shape[term.index(letter)],)) for letter in alone)
        gradients.append(plain(np.einsum(",".join(inputs) + "->" + term, *arrays, optimize=True)))
    return tuple(gradients)


register("matmul", matmul_forward, matmul_backward)
register("linear", linear_forward, linear_backward)
register("einsum", einsum_forward, einsum_backward)
