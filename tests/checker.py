"""The gradient check of the op tests: complex step against backward, and the manners an op must keep.

The complex step, Im f(x + ihv) / h, has no truncation error, so backward is held to rounding. On code
that drops the imaginary part it would silently give 0: one direction is compared with differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import minitransformer as mt
from minitransformer.autograd import OPS

STEP = 1e-20
DIRECTIONS = 3
TINY = 12  # inputs of up to so many elements get their whole Jacobian
DIFFERENCE = 1e-6


class Case(NamedTuple):
    """One call of an op: its inputs (arrays, numbers or None) and its static arguments.

    `on_complex` replaces static arguments in the complex run. `empty` says that there is no number to
    differentiate, which otherwise fails: a check that compared nothing is no check.
    """

    inputs: tuple[Any, ...]
    static: dict[str, Any]
    on_complex: dict[str, Any]
    empty: bool


def case(*inputs: Any, on_complex: dict[str, Any] | None = None, empty: bool = False, **static: Any) -> Case:
    """Float arrays are rounded to float32 values, so that the runs in both precisions see the same numbers."""
    rounded = tuple(x.astype(np.float32).astype(np.float64) if _is_float(x) else x for x in inputs)
    return Case(rounded, static, on_complex or {}, empty)


def check(name: str, given: Case) -> None:
    """Everything that an op promises about its forward and backward, at one call."""
    with np.errstate(all="ignore"):  # as autograd calls them
        run = Run(name, given)
        compared = run.check_derivatives()
        run.check_manners()
        run.check_layouts()
        run.check_backends()
        run.check_autograd()
    assert (compared == 0) == given.empty, f"{name}: {compared} derivatives compared, empty={given.empty}"


class Run:
    """One case, run once in float64 and once in float32."""

    def __init__(self, name: str, given: Case) -> None:
        self.name, self.static, self.on_complex = name, given.static, given.static | given.on_complex
        self.inputs = tuple(_locked(x) for x in given.inputs)
        self.outs, self.saved = forward(name, self.inputs, self.static)
        rng = np.random.default_rng(7)
        self.douts = tuple(_locked(rng.standard_normal(o.shape).astype(np.float32).astype(o.dtype)) for o in self.outs)
        self.gradients = backward(name, self.douts, self.saved)
        self.wanted = [i for i, x in enumerate(self.inputs) if _is_float(x) and i < len(self.gradients)]
        self.rng = rng

    def check_derivatives(self) -> int:
        inputs32 = tuple(_locked(_cast(x, np.float32)) for x in self.inputs)
        outs32, saved32 = forward(self.name, inputs32, self.static)
        douts32 = tuple(_locked(d.astype(o.dtype)) for d, o in zip(self.douts, outs32, strict=True))
        gradients32 = backward(self.name, douts32, saved32)
        compared = 0
        for i in self.wanted:
            x, dx, dx32 = self.inputs[i], self.gradients[i], gradients32[i]
            for g, given in ((dx, x), (dx32, inputs32[i])):
                assert g is not None, f"{self.name}: no gradient for input {i}"
                assert g.shape == given.shape, f"{self.name}: d{i} {g.shape}, input {given.shape}"
                assert g.dtype == given.dtype, f"{self.name}: d{i} is {g.dtype}, input {given.dtype}"
            for nth, v in enumerate(self._directions(x)):
                expected, size = self._complex_derivative(i, v)
                size += float(np.sum(abs(dx * v)))
                got, got32 = float(np.sum(dx * v)), float(np.sum(dx32.astype(np.float64) * v))
                where = f"{self.name}: input {i}, direction {nth}, {self.static}"
                assert np.isfinite(expected), f"{where}: complex step gives {expected}"
                assert abs(got - expected) <= 1e-12 * size + 1e-13, f"{where}: {got}, expected {expected}"
                assert abs(got32 - expected) <= 1e-5 * size + 1e-5, f"{where}: float32 {got32}, {expected}"
                if nth == 0:
                    difference, noise = self._difference(i, v)
                    assert abs(difference - expected) <= 1e-6 * size + noise, (
                        f"{where}: complex step {expected}, differences {difference}"
                    )
                compared += 1
        return compared

    def _directions(self, x: np.ndarray) -> Iterator[np.ndarray]:
        if not x.size:
            return
        for _ in range(DIRECTIONS):
            yield self.rng.standard_normal(x.shape)
        if x.size <= TINY:
            yield from np.eye(x.size).reshape(x.size, *x.shape)

    def _moved(self, i: int, value: Any) -> tuple[Any, ...]:
        return (*self.inputs[:i], np.asarray(value), *self.inputs[i + 1 :])

    def _complex_derivative(self, i: int, v: np.ndarray) -> tuple[float, float]:
        """<dout, J v> and the sum of the absolute values of its terms."""
        stepped, _ = forward(self.name, self._moved(i, self.inputs[i] + 1j * STEP * v), self.on_complex)
        terms = [d * (np.imag(o) / STEP) for d, o in zip(self.douts, stepped, strict=True)]
        return float(sum(t.sum() for t in terms)), float(sum(abs(t).sum() for t in terms))

    def _difference(self, i: int, v: np.ndarray) -> tuple[float, float]:
        """The central difference along v, and its rounding noise."""
        low, _ = forward(self.name, self._moved(i, self.inputs[i] - DIFFERENCE * v), self.static)
        high, _ = forward(self.name, self._moved(i, self.inputs[i] + DIFFERENCE * v), self.static)
        total = noise = 0.0
        for d, a, b, middle in zip(self.douts, low, high, self.outs, strict=True):
            finite = np.isfinite(middle)  # the log-sum-exp of an empty row stays -inf
            assert np.array_equal(a[~finite], b[~finite])
            total += float(np.sum((d * (b - a))[finite])) / (2 * DIFFERENCE)
            # cast to float32 rounds a thousand million times more coarsely
            eps = np.finfo(middle.dtype).eps
            noise += float(np.sum(abs(d * middle)[finite]) + 1) * 10 * eps / DIFFERENCE
        return total, noise

    def check_manners(self) -> None:
        """No write, no alias, the same bits twice, from one forward and from two."""
        inputs = tuple(x.copy() if isinstance(x, np.ndarray) else x for x in self.inputs)
        douts = tuple(d.copy() for d in self.douts)
        outs, saved = forward(self.name, inputs, self.static)
        assert isinstance(saved, tuple) and hasattr(saved, "_fields"), f"{self.name}: saved is no named tuple"
        first, second = backward(self.name, douts, saved), backward(self.name, douts, saved)
        _same_bits(self.name, inputs, self.inputs, "an input was written to")
        _same_bits(self.name, douts, self.douts, "an upstream gradient was written to")
        _same_bits(self.name, outs, self.outs, "two forwards differ")
        _same_bits(self.name, first, self.gradients, "backwards of two forwards differ")
        _same_bits(self.name, first, second, "two backwards of one forward differ")
        arrays = [g for g in (*first, *second) if isinstance(g, np.ndarray)]
        for nth, g in enumerate(arrays):
            for other in (*arrays[:nth], *douts, *outs, *inputs):
                if isinstance(other, np.ndarray):
                    assert not np.shares_memory(g, other), f"{self.name}: a gradient is a view"

    def check_layouts(self) -> None:
        """Strided and Fortran-ordered inputs and upstream gradients mean the same."""
        for layout in (_strided, _fortran):
            inputs = tuple(layout(x) if isinstance(x, np.ndarray) else x for x in self.inputs)
            outs, saved = forward(self.name, inputs, self.static)
            gradients = backward(self.name, tuple(layout(d) for d in self.douts), saved)
            _close(self.name, outs, self.outs, 1e-12)
            _close(self.name, gradients, self.gradients, 1e-12)

    def check_backends(self) -> None:
        """The forward that serves by default against the reference, which the complex step checked."""
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
            inputs = tuple(_cast(x, dtype) for x in self.inputs)
            outs, _ = forward(self.name, inputs, self.static)
            with mt.use_backend("reference"):
                reference, _ = forward(self.name, inputs, self.static)
            _close(self.name, outs, reference, tolerance)

    def check_autograd(self) -> None:
        """Through Tensors: the same bits as the pair itself."""
        inputs = [mt.Tensor(x, requires_grad=True) if i in self.wanted else x for i, x in enumerate(self.inputs)]
        out = OPS[self.name](*inputs, **self.static)
        outs = out if isinstance(out, tuple) else (out,)
        _same_bits(self.name, [o.data for o in outs], self.outs, "forward through Tensors differs")
        leaves = [inputs[i] for i in self.wanted]
        if leaves:
            total = sum(((o * d).sum() for o, d in zip(outs, self.douts, strict=True)), start=mt.Tensor(0.0))
            gradients = mt.grad(total, leaves)
            _same_bits(self.name, gradients, [self.gradients[i] for i in self.wanted], "Tensors' gradients differ")


def forward(name: str, inputs: tuple[Any, ...], static: dict[str, Any]) -> tuple[tuple[np.ndarray, ...], Any]:
    out, saved = OPS[name].forward(*inputs, **static)
    return tuple(np.asarray(o) for o in (out if OPS[name].many else (out,))), saved


def backward(name: str, douts: tuple[np.ndarray, ...], saved: Any) -> tuple[np.ndarray | None, ...]:
    gradients = OPS[name].backward(douts if OPS[name].many else douts[0], saved)
    return tuple(None if g is None else np.asarray(g) for g in gradients)


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def _cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if _is_float(x) else x


def _locked(x: Any) -> Any:
    """A read-only copy: writing to it raises, and ops must take it."""
    if isinstance(x, np.ndarray):
        x = x.copy()
        x.flags.writeable = False
    return x


def _strided(x: np.ndarray) -> np.ndarray:
    """The same numbers, backwards in memory with gaps."""
    if x.ndim == 0:
        return x
    buffer = np.full((*x.shape[:-1], 2 * x.shape[-1]), 77, x.dtype)
    view = buffer[..., ::-2]
    view[...] = x
    return view


def _fortran(x: np.ndarray) -> np.ndarray:
    return x.copy("F")


def _same_bits(name: str, got: Any, expected: Any, complaint: str) -> None:
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape, f"{name}: {complaint}"
            assert a.tobytes() == b.tobytes(), f"{name}: {complaint}"


def _close(name: str, got: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None), name
        if b is not None and b.size:
            assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype}"
            scale = np.max(abs(b), where=np.isfinite(b), initial=1.0)
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=name)
