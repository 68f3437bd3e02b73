"""Functions of other frameworks as functions of arrays, for `gradcheck`.

Each adapter takes a function of the framework's own tensors, which returns one of them or a tuple, and gives a
`minitransformer.gradients.Function`: float arrays become tensors that require a gradient, integer and bool arrays
tensors that do not, everything else is passed on as it is. Raises `MissingExtraError` where the framework is not
installed, `DTypeError` when the function returns anything but float tensors, and `GradientError` when nothing it
returns depends on a float input, as far as the framework can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minitransformer.errors import DTypeError, GradientError, require
from minitransformer.gradients import Function
from minitransformer.gradients.function import Arrays, Pullback, names_of

Gradients = Sequence["np.ndarray | None"]


def torch(fn: Callable[..., Any]) -> Function:
    """A function of torch tensors, or a torch module, differentiated by torch.

    Whatever it draws at random, it draws from seed 0 in every run; torch's own generator is left as it was.
    """
    package = require("torch", extra="peers", purpose="adapters.torch")

    def run(inputs: Arrays, differentiate: bool) -> tuple[list[Any], Sequence[Any]]:
        arguments = [package.tensor(np.array(x)) if isinstance(x, np.ndarray) else x for x in inputs]
        for x, given in zip(arguments, inputs, strict=True):
            if _is_float(given):
                x.requires_grad_(differentiate)
        with package.random.fork_rng(devices=[]), package.set_grad_enabled(differentiate):
            package.manual_seed(0)
            outs = _outputs(fn, fn(*arguments), package.Tensor)
        for out in outs:
            _check_float(fn, out.is_floating_point(), out.dtype)
        return arguments, outs

    def value(*inputs: Any) -> Arrays:
        return tuple(out.numpy().copy() for out in run(inputs, False)[1])

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        arguments, outs = run(inputs, True)
        positions = [i for i, x in enumerate(inputs) if _is_float(x)]
        _check_dependence(fn, any(out.requires_grad for out in outs))

        def pullback(douts: Sequence[np.ndarray]) -> Gradients:
            pairs = [(o, package.tensor(np.array(d))) for o, d in zip(outs, douts, strict=True) if o.requires_grad]
            found = package.autograd.grad(
                [o for o, _ in pairs],
                [arguments[i] for i in positions],
                [d for _, d in pairs],
                retain_graph=True,
                materialize_grads=True,  # zeros for an input that is not used
            )
            return _placed(len(inputs), positions, [g.numpy().copy() for g in found])

        return tuple(out.detach().numpy().copy() for out in outs), pullback

    return _function(fn, value, pull)


def jax(fn: Callable[..., Any]) -> Function:
    """A function of JAX arrays, differentiated by `jax.vjp`, with float64 left as float64."""
    package = require("jax", extra="peers", purpose="adapters.jax")

    def run(inputs: Arrays) -> Arrays:
        arguments = [package.numpy.asarray(x) if isinstance(x, np.ndarray) else x for x in inputs]
        outs = _outputs(fn, fn(*arguments), package.Array)
        for out in outs:
            _check_float(fn, np.issubdtype(out.dtype, np.floating), out.dtype)
        return tuple(outs)

    def value(*inputs: Any) -> Arrays:
        with package.enable_x64(True):
            return tuple(np.array(out) for out in run(inputs))

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        positions = [i for i, x in enumerate(inputs) if _is_float(x)]

        def of_floats(*floats: Any) -> Arrays:
            together = list(inputs)
            for position, x in zip(positions, floats, strict=True):
                together[position] = x
            return run(tuple(together))

        with package.enable_x64(True):
            outs, back = package.vjp(of_floats, *(package.numpy.asarray(inputs[i]) for i in positions))

        def pullback(douts: Sequence[np.ndarray]) -> Gradients:
            with package.enable_x64(True):
                found = back(tuple(package.numpy.asarray(d) for d in douts))
            return _placed(len(inputs), positions, [np.array(g) for g in found])

        return tuple(np.array(out) for out in outs), pullback

    return _function(fn, value, pull)


def autograd(fn: Callable[..., Any]) -> Function:
    """A function written with `autograd.numpy`, differentiated by HIPS autograd."""
    package = require("autograd", extra="peers", purpose="adapters.autograd")
    boxed = package.tracer.isbox

    def run(*inputs: Any) -> list[Any]:
        outs = _outputs(fn, fn(*inputs), object)
        for out in outs:
            array = out._value if boxed(out) else out
            if not isinstance(array, (np.ndarray, np.generic, float)):
                raise _wrong_output(fn, array)
            _check_float(fn, np.asarray(array).dtype.kind == "f", np.asarray(array).dtype)
        return outs

    def value(*inputs: Any) -> Arrays:
        return tuple(np.array(out) for out in run(*inputs))

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        positions = [i for i, x in enumerate(inputs) if _is_float(x)]

        def of_all(*arguments: Any) -> Any:
            outs = run(*arguments)
            _check_dependence(fn, any(map(boxed, outs)))
            return package.builtins.tuple(outs)  # autograd differentiates its own kind of tuple, and ignores Python's

        back, outs = package.make_vjp(of_all, argnum=tuple(positions))(*inputs)

        def pullback(douts: Sequence[np.ndarray]) -> Gradients:
            found = back(tuple(np.array(d)[()] for d in douts))
            return _placed(len(inputs), positions, [np.array(g) for g in found])

        return tuple(np.array(out) for out in outs), pullback

    return _function(fn, value, pull)


def mygrad(fn: Callable[..., Any]) -> Function:
    """A function of MyGrad tensors, differentiated by MyGrad; it runs again for every backward, as MyGrad must."""
    package = require("mygrad", extra="peers", purpose="adapters.mygrad")

    def run(inputs: Arrays) -> tuple[list[Any], list[Any]]:
        arguments = [package.tensor(np.array(x), constant=False) if _is_float(x) else x for x in inputs]
        outs = _outputs(fn, fn(*arguments), package.Tensor)
        for out in outs:
            _check_float(fn, out.dtype.kind == "f", out.dtype)
        return arguments, outs

    def value(*inputs: Any) -> Arrays:
        with package.no_autodiff:
            return tuple(np.array(out.data) for out in run(inputs)[1])

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        positions = [i for i, x in enumerate(inputs) if _is_float(x)]
        values = value(*inputs)

        def pullback(douts: Sequence[np.ndarray]) -> Gradients:
            arguments, outs = run(inputs)
            loss = sum((out * d).sum() for out, d in zip(outs, douts, strict=True))
            loss.backward()
            found = [arguments[i].grad for i in positions]
            _check_dependence(fn, any(g is not None for g in found))
            pairs = zip(positions, found, strict=True)
            filled = [np.zeros_like(inputs[i]) if g is None else np.array(g) for i, g in pairs]
            return _placed(len(inputs), positions, filled)

        return values, pullback

    return _function(fn, value, pull)


def _function(fn: Any, value: Callable[..., Arrays], pull: Callable[..., tuple[Arrays, Pullback]]) -> Function:
    # Their tensors own their numbers: there are no writes and aliases to look for, and no complex step.
    return Function(_name(fn), names_of(fn, 99), value, pull, takes_complex=False, in_place=False)


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def _outputs(fn: Any, result: Any, kind: type) -> list[Any]:
    outs = list(result) if isinstance(result, (tuple, list)) else [result]
    for out in outs:
        if not isinstance(out, kind):
            raise _wrong_output(fn, out)
    return outs


def _wrong_output(fn: Any, out: Any) -> DTypeError:
    problem = f"{_name(fn)} returned a {type(out).__name__}, expected tensors of its framework"
    return DTypeError("gradcheck", problem, "Return the output, or a tuple of outputs, unconverted")


def _check_float(fn: Any, is_float: bool, dtype: Any) -> None:
    if not is_float:
        raise DTypeError("gradcheck", f"{_name(fn)} returned {dtype}, expected floats", "Return what has a gradient")


def _check_dependence(fn: Any, depends: bool) -> None:
    if not depends:
        problem = f"no output of {_name(fn)} depends on a float input"
        raise GradientError("gradcheck", problem, "Look for what detaches it: conversions to NumPy, constants")


def _placed(count: int, positions: Sequence[int], found: Sequence[np.ndarray]) -> Gradients:
    gradients: list[np.ndarray | None] = [None] * count
    for position, g in zip(positions, found, strict=True):
        gradients[position] = g
    return gradients
