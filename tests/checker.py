"""The gradient check of the op tests: `gradcheck` in both precisions, and what ops promise beyond it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import minitransformer as mt
from minitransformer.autograd import OPS
from minitransformer.gradients import Function, gradcheck, manners
from minitransformer.gradients.function import Problem, names_of


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
        outs, saved = forward(name, given.inputs, given.static)
        assert isinstance(saved, tuple) and hasattr(saved, "_fields"), f"{name}: saved is no named tuple"
        count = len(backward(name, tuple(np.ones_like(out) for out in outs), saved))
        wanted = tuple(i for i, x in enumerate(given.inputs) if _is_float(x) and i < count)
        for dtype in (np.float64, np.float32):
            function = _function(name, given, wanted, dtype)
            inputs = tuple(given.inputs[i].astype(dtype) for i in wanted)
            if given.empty or not any(out.size for out in outs):
                _check_empty(function, inputs, given)
            else:
                gradcheck(function, inputs)
        _check_autograd(name, given, wanted)


def _function(name: str, given: Case, wanted: tuple[int, ...], dtype: Any) -> Function:
    """The op as a function of its differentiable inputs; its other floats come in `dtype` too."""

    def complete(xs: tuple[np.ndarray, ...]) -> tuple[Any, ...]:
        inputs = [_cast(x, dtype) for x in given.inputs]
        for i, x in zip(wanted, xs, strict=True):
            inputs[i] = x
        return tuple(inputs)

    def value(*xs: np.ndarray) -> tuple[np.ndarray, ...]:
        is_complex = any(x.dtype.kind == "c" for x in xs)
        return forward(name, complete(xs), given.static | given.on_complex if is_complex else given.static)[0]

    def pull(*xs: np.ndarray) -> Any:
        outs, saved = forward(name, complete(xs), given.static)
        return outs, lambda douts: [g for i, g in enumerate(backward(name, tuple(douts), saved)) if i in wanted]

    names = names_of(OPS[name].forward, len(given.inputs))
    return Function(name, tuple(names[i] for i in wanted), value, pull)


def _check_empty(function: Function, inputs: tuple[np.ndarray, ...], given: Case) -> None:
    """Without numbers on both sides: gradients of the right shape and dtype, 0, and the manners."""
    outs, pullback = function.pull(*inputs)
    assert given.empty or any(x.size for x in inputs), f"{function.name}: nothing to compare"
    assert not any(x.size for x in inputs) or not any(out.size for out in outs), f"{function.name}: not empty"
    douts = [np.ones_like(out) for out in outs]
    for x, g in zip(inputs, pullback(douts), strict=True):
        assert g is not None and (g.shape, g.dtype) == (x.shape, x.dtype), f"{function.name}: gradient of another kind"
        assert not g.any(), f"{function.name}: a gradient out of nothing"
    problem = Problem(function, inputs, tuple(range(len(inputs))))
    run = manners.Run(inputs, outs, douts, pullback(douts))
    assert list(manners.complaints(problem, douts, run, 1e-12, 1e-12)) == []


def _check_autograd(name: str, given: Case, wanted: tuple[int, ...]) -> None:
    """Through Tensors: the same bits as the pair itself."""
    outs, saved = forward(name, given.inputs, given.static)
    rng = np.random.default_rng(7)
    douts = tuple(rng.standard_normal(out.shape).astype(out.dtype) for out in outs)
    expected = backward(name, douts, saved)
    inputs = [mt.Tensor(x, requires_grad=True) if i in wanted else x for i, x in enumerate(given.inputs)]
    result = OPS[name](*inputs, **given.static)
    tensors = result if isinstance(result, tuple) else (result,)
    assert [t.data.tobytes() for t in tensors] == [out.tobytes() for out in outs], f"{name}: Tensors' outputs differ"
    if wanted:
        total = sum(((t * d).sum() for t, d in zip(tensors, douts, strict=True)), start=mt.Tensor(0.0))
        for i, g in zip(wanted, mt.grad(total, [inputs[i] for i in wanted]), strict=True):
            assert g.tobytes() == expected[i].tobytes(), f"{name}: Tensors' gradients differ"  # type: ignore[union-attr]


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
