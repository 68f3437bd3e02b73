"""One call of an op that made, or was given, NaN or infinity: what it says, and running it again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np

from minitransformer import kernels
from minitransformer.autograd import Op
from minitransformer.errors import MiniTransformerError

# What an op raises for arrays and settings that do not fit each other: those of a file, or cut ones.
REFUSALS = (MiniTransformerError, ArithmeticError, LookupError, TypeError, ValueError)


class BadOp(NamedTuple):
    """A call of `op` in the module at path `layer` ("" outside of modules) with a result that is not finite.

    `inputs` and `static` are what its forward was given; `douts` are the upstream gradients if the fault
    is in its backward, else (). `results` are the outputs of that direction, the gradients of the inputs
    (None for those without) in backward. `names` says, by position, which inputs are parameters, `outside`
    which of `given` are not finite though no op made them so.
    """

    op: Op
    layer: str
    inputs: tuple[Any, ...]
    static: dict[str, Any]
    douts: tuple[np.ndarray, ...]
    results: tuple[np.ndarray | None, ...]
    names: dict[int, str]
    outside: tuple[int, ...]

    @property
    def given(self) -> tuple[Any, ...]:
        """Everything that its results were computed from."""
        return (*self.douts, *self.inputs)

    @property
    def blame(self) -> int:
        """0 to the call where the damage began, 1 if it made NaN of infinities, 2 if it passed on what it got.

        An infinite constant is no damage: it may be a mask.
        """
        parameters = {len(self.douts) + position for position in self.names}
        spoilt = any(i in parameters or i < len(self.douts) or has_nan(self.given[i]) for i in self.outside)
        if spoilt or all(is_finite(x) for x in self.given):
            return 0
        return 1 if has_nan(*self.results) and not has_nan(*self.given) else 2

    def __str__(self) -> str:
        """One line: what happened, where, and the ranges of all that went in."""
        what = "nan" if has_nan(*self.results) else "infinity"
        where = f"{'the backward of ' if self.douts else ''}{self.op.name}{f' in {self.layer}' if self.layer else ''}"
        if all(is_finite(x) for x in self.given):
            story = f"{where} makes {what} from finite numbers"
        elif self.outside and self.blame != 1:
            what = "nan" if has_nan(*(self.given[i] for i in self.outside)) else "infinity"
            sources = ", ".join(name for i, (name, _) in enumerate(self._all_named()) if i in self.outside)
            story = f"{where} is given {what} that no op made, in {sources}"
        else:
            story = f"{where} makes {what} of infinities"
        return f"{story} ({'; '.join(f'{name}: {range_text(x)}' for name, x in self.named())})"

    def named(self) -> list[tuple[str, Any]]:
        """The upstream gradients and inputs by name, without inputs left out."""
        return [(name, x) for name, x in self._all_named() if x is not None]

    def _all_named(self) -> Iterator[tuple[str, Any]]:
        for position, dout in enumerate(self.douts):
            yield "dout" if len(self.douts) == 1 else f"dout[{position}]", dout
        for position, (name, x) in enumerate(zip(input_names(self.op, len(self.inputs)), self.inputs, strict=True)):
            yield f"{name}, {self.names[position]}" if position in self.names else name, x

    def named_results(self) -> Iterator[tuple[str, np.ndarray]]:
        """The outputs, or the gradients, by name."""
        names = input_names(self.op, len(self.results)) if self.douts else range(len(self.results))
        for name, x in zip(names, self.results, strict=True):
            if x is not None:
                yield f"d{name}" if self.douts else "output" if len(self.results) == 1 else f"output[{name}]", x

    def run(self, backend: str | None = None, dtype: Any = None) -> BadOp:
        """The same call once more, served by `backend` and with its floats in `dtype`; with new `results`.

        Raises what the op raises for inputs that do not fit each other.
        """
        op = self.op
        inputs, douts = (tuple(_cast(x, dtype) for x in part) for part in (self.inputs, self.douts))
        served = kernels.use_backend(backend) if backend else nullcontext()
        with np.errstate(all="ignore"), served:
            out, saved = op.forward(*inputs, **self.static)
            results: tuple[Any, ...] = tuple(np.asarray(x) for x in (out if op.many else (out,)))
            if douts:
                for dout, x in zip(douts, results, strict=True):
                    if dout.shape != x.shape:
                        raise ValueError(f"an upstream gradient has shape {dout.shape}, the output {x.shape}")
                results = tuple(op.backward(douts if op.many else douts[0], saved))
        return self._replace(inputs=inputs, douts=douts, results=results)


def is_finite(x: Any) -> bool:
    """Whether an array or number holds neither NaN nor infinity; other things do not."""
    if isinstance(x, np.ndarray):
        return x.dtype.kind not in "fc" or bool(np.isfinite(x).all())
    return not isinstance(x, (float, complex)) or bool(np.isfinite(x))


def has_nan(*values: Any) -> bool:
    """Whether any of these arrays and numbers holds NaN; None does not."""
    return any(np.isnan(x).any() for x in values if x is not None and np.asarray(x).dtype.kind in "fc")


def _cast(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if dtype is not None and isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def input_names(op: Op, count: int) -> list[str]:
    """The names of the first `count` positional parameters of an op's forward."""
    names: list[str] = []
    for name, parameter in inspect.signature(op.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names.extend(f"{name}[{i}]" for i in range(count - len(names)))
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(name)
    return names[:count]


def range_text(x: Any) -> str:
    """Kind, shape and range of an array, and how much of it is not finite: `float32 (2, 3) from -1 to 4, 1 nan`."""
    if not isinstance(x, np.ndarray):
        return repr(x)
    text = f"{x.dtype} {x.shape}"
    if x.dtype.kind not in "iuf" or not x.size:
        return text
    finite = x[np.isfinite(x)]
    parts = [f"{text} from {finite.min():.4g} to {finite.max():.4g}" if finite.size else text]
    if x.dtype.kind == "f":
        counts = {"nan": np.isnan(x).sum(), "inf": (x == np.inf).sum(), "-inf": (x == -np.inf).sum()}
        parts += [f"{count} {name}" for name, count in counts.items() if count]
    return ", ".join(parts)
