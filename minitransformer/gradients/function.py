"""What can be checked: functions with a claimed derivative, of whatever kind, seen as functions of arrays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from minitransformer import random
from minitransformer.autograd import Op, Parameter, Tensor, grad, no_grad
from minitransformer.errors import DTypeError, GradientError
from minitransformer.nn.module import Module

Arrays = tuple[Any, ...]
Pullback = Callable[[Sequence[np.ndarray]], Sequence["np.ndarray | None"]]


class Function(NamedTuple):
    """A function of arrays and its claimed derivative.

    `value(*inputs)` returns the tuple of its outputs. `pull(*inputs)` returns them with the pullback, which
    turns gradients of all outputs into gradients of the inputs, one for each or for the first ones, None for
    those that have none; it may be called more than once. `names` are those of the inputs. `takes_complex`
    says whether `value` may be tried with complex inputs, `in_place` whether arrays are handed through, so
    that writes and aliases can be looked for.
    """

    name: str
    names: tuple[str, ...]
    value: Callable[..., Arrays]
    pull: Callable[..., tuple[Arrays, Pullback]]
    takes_complex: bool = True
    in_place: bool = True


class Problem(NamedTuple):
    """A function at its inputs, of which those at the positions `wanted` are to be differentiated."""

    function: Function
    inputs: Arrays
    wanted: tuple[int, ...]


def problem_of(fn: Any, inputs: Any) -> Problem:
    """`fn` at `inputs`, whatever it is: see `gradcheck`. `DTypeError` or `GradientError` for what cannot be checked."""
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if isinstance(fn, Function):
        function, arrays = fn, given
    elif isinstance(fn, Module):
        function, arrays = _of_module(fn, given)
    elif isinstance(fn, tuple) and len(fn) == 2 and all(map(callable, fn)):
        function, arrays = _of_pair(*fn), given
    elif isinstance(_unwrapped(fn), Op):
        function, arrays = _of_op(fn), given
    elif callable(fn):
        function, arrays = _of_tensors(fn, given), given
    else:
        raise DTypeError(
            "gradcheck",
            f"got a {type(fn).__name__}, expected a function, Module, Op, or a pair (forward, backward)",
            "Wrap it in a function of Tensors",
        )
    values = tuple(_plain(x) for x in arrays)
    floats = [i for i, x in enumerate(values) if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    asked = [i for i, x in enumerate(given) if isinstance(x, Tensor) and x.requires_grad]
    # Parameters of a module come behind its inputs and are always wanted.
    wanted = [i for i in floats if not asked or i in asked or (isinstance(fn, Module) and i >= len(given))]
    for i in wanted:
        if values[i].dtype not in (np.float32, np.float64):
            problem = f"an input is {values[i].dtype}, expected float32 or float64"
            raise DTypeError("gradcheck", problem, "Convert it with array.astype(...)")
    if not wanted:
        raise GradientError(
            "gradcheck",
            f"none of the {len(values)} inputs of {function.name} can be differentiated, expected a float array",
            "Pass a float32 or float64 array, or a Tensor that requires a gradient",
        )
    return Problem(function, values, tuple(wanted))


def copies(values: Sequence[Any]) -> list[Any]:
    """New arrays for arrays: a function that writes into what it is given is to spoil nothing but its own."""
    return [x.copy() if isinstance(x, np.ndarray) else x for x in values]


def _plain(x: Any) -> Any:
    return x.data if isinstance(x, Tensor) else x


def _unwrapped(fn: Any) -> Any:
    return fn.func if isinstance(fn, functools.partial) and not fn.args else fn


def names_of(fn: Any, count: int) -> tuple[str, ...]:
    """The names of the first `count` positional parameters; x0, x1, ... where Python does not know them."""
    names: list[str] = []
    if type(fn) is FunctionType and not vars(fn) and fn.__code__.co_argcount >= count:  # as below, in no time
        return fn.__code__.co_varnames[:count]
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            names.extend(f"{parameter.name}[{i}]" for i in range(count - len(names)))
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    names.extend(f"x{i}" for i in range(len(names), count))
    return tuple(names[:count])


def _of_op(fn: Any) -> Function:
    op, static = _unwrapped(fn), getattr(fn, "keywords", {})

    def forward(*inputs: Any) -> tuple[Arrays, Any]:
        with np.errstate(all="ignore"):
            out, saved = op.forward(*inputs, **static)
        return tuple(np.asarray(x) for x in (out if op.many else (out,))), saved

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        outs, saved = forward(*inputs)

        def pullback(douts: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
            with np.errstate(all="ignore"):
                return op.backward(tuple(douts) if op.many else douts[0], saved)

        return outs, pullback

    return Function(op.name, names_of(op.forward, 99), lambda *inputs: forward(*inputs)[0], pull)


def _of_pair(forward: Any, backward: Any) -> Function:
    """forward(*arrays) -> (out, saved), backward(dout, saved) -> gradients, as every op is written."""
    name = getattr(forward, "__name__", type(forward).__name__)

    def run(*inputs: Any) -> tuple[Arrays, Any, bool]:
        result = forward(*inputs)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise DTypeError(
                "gradcheck", f"{name} returned no pair (out, saved)", "Return the output and what backward needs"
            )
        many = isinstance(result[0], tuple)
        return tuple(np.asarray(x) for x in (result[0] if many else (result[0],))), result[1], many

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        outs, saved, many = run(*inputs)

        def pullback(douts: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
            gradients = backward(tuple(douts) if many else douts[0], saved)
            return gradients if isinstance(gradients, (tuple, list)) else (gradients,)

        return outs, pullback

    return Function(name, names_of(forward, 99), lambda *inputs: run(*inputs)[0], pull)


def _of_tensors(fn: Callable[..., Any], given: Arrays) -> Function:
    """A function of Tensors; float arrays are passed to it as Tensors, everything else as it is."""
    name = getattr(fn, "__name__", type(fn).__name__)

    def run(inputs: Sequence[Any], requires_grad: bool) -> tuple[list[Any], tuple[Tensor, ...]]:
        arguments = [
            Tensor(x, requires_grad=requires_grad) if isinstance(x, np.ndarray) and x.dtype.kind in "fc" else x
            for x in inputs
        ]
        with random.scope(0, 0):  # dropout draws the same mask in every run
            return arguments, outputs_of(name, fn(*arguments))

    def value(*inputs: Any) -> Arrays:
        with no_grad():
            return tuple(t.data for t in run(inputs, False)[1])

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        arguments, outs = run(inputs, True)
        leaves = [x for x in arguments if isinstance(x, Tensor)]
        positions = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        return tuple(t.data for t in outs), _pullback(name, outs, leaves, positions, len(arguments))

    return Function(name, names_of(fn, len(given)), value, pull)


def _of_module(module: Module, given: Arrays) -> tuple[Function, Arrays]:
    """The module as a function of its inputs and of every parameter that requires a gradient."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    inner = _of_tensors(module, given)

    def value(*inputs: Any) -> Arrays:
        with holding(parameters, inputs[len(given) :]):
            return inner.value(*inputs[: len(given)])

    def pull(*inputs: Any) -> tuple[Arrays, Pullback]:
        with holding(parameters, inputs[len(given) :]):
            arguments = [
                Tensor(x, requires_grad=True) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
                for x in inputs[: len(given)]
            ]
            with random.scope(0, 0):
                outs = outputs_of(inner.name, module(*arguments))
        leaves = [*(x for x in arguments if isinstance(x, Tensor)), *parameters]
        positions = [i for i, x in enumerate(arguments) if isinstance(x, Tensor)]
        positions += range(len(given), len(inputs))
        back = _pullback(inner.name, outs, leaves, positions, len(inputs))

        def pullback(douts: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
            with holding(parameters, inputs[len(given) :]):  # a gradient has the dtype that its leaf has then
                return back(douts)

        return tuple(t.data for t in outs), pullback

    names = (*names_of(module.forward, len(given)), *(n for n, _ in named))
    function = Function(inner.name, names, value, pull)
    return function, (*given, *(p.data for p in parameters))


@contextmanager
def holding(parameters: Sequence[Parameter], arrays: Sequence[np.ndarray]) -> Iterator[None]:
    """The parameters look into `arrays` inside; afterwards they and their `.grad` are as before."""
    before = [(p.data, p.grad) for p in parameters]
    try:
        for p, array in zip(parameters, arrays, strict=True):
            p.rebind(array)
        yield
    finally:
        for p, (array, gradient) in zip(parameters, before, strict=True):
            p.rebind(array)
            p.grad = gradient


def outputs_of(name: str, result: Any) -> tuple[Tensor, ...]:
    """The Tensors that a function returned; `DTypeError` or `GradientError` for anything else."""
    outs = result if isinstance(result, (tuple, list)) else (result,)
    for out in outs:
        if not isinstance(out, Tensor):
            raise DTypeError(
                "gradcheck",
                f"{name} returned a {type(out).__name__}, expected a Tensor or a tuple of Tensors",
                "Return the loss, or the outputs to be differentiated",
            )
        if out.dtype.kind not in "fc":
            raise DTypeError("gradcheck", f"{name} returned {out.dtype}, expected floats", "Return what has a gradient")
    return tuple(outs)


def _pullback(
    name: str, outs: Sequence[Tensor], leaves: Sequence[Tensor], positions: Sequence[int], count: int
) -> Pullback:
    if not any(out.requires_grad for out in outs):
        raise GradientError(
            "gradcheck",
            f"no output of {name} depends on an input that requires a gradient",
            "Look for detach(), .data, .numpy() or no_grad() inside",
        )

    def pullback(douts: Sequence[np.ndarray]) -> Sequence[np.ndarray | None]:
        gradients: list[np.ndarray | None] = [None] * count
        for out, dout in zip(outs, douts, strict=True):
            if out.requires_grad:
                for position, g in zip(positions, grad(out, leaves, dout, retain_graph=True), strict=True):
                    before = gradients[position]
                    gradients[position] = g if before is None else before + g
        return gradients

    return pullback
