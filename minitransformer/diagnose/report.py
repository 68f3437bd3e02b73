"""What `minitransformer inspect FILE.npz` prints: what went in, what comes out of every backend, where it breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from minitransformer import kernels
from minitransformer.diagnose.archive import Foreign
from minitransformer.diagnose.bad_op import REFUSALS, BadOp, is_finite, range_text
from minitransformer.kernels.attention.problem import Problem
from minitransformer.random import DrawKey

_SHOWN = 16  # arrays of up to so many elements are shown whole


def report(bad: BadOp, context: Mapping[str, Any]) -> str:
    """Several lines of text about `bad`; runs it again on every backend, in its own dtype and in float64."""
    lines = [str(context.get("found", bad))]
    for name, value in context.items():
        if name != "found":
            lines.append(f"{name}: {range_text(value) if isinstance(value, np.ndarray) else value}")
    lines += ["", "went in, cut down to little that still goes wrong:"]
    lines += [f"  {name}: {_shown(x)}" for name, x in bad.named()]
    lines += [f"  {name} = {_shown(value)}" for name, value in bad.static.items()]
    lines += ["", "comes out:", *(f"  {line}" for line in _runs(bad))]
    return "\n".join(lines)


def _shown(x: Any) -> str:
    if isinstance(x, np.ndarray):
        if x.size > _SHOWN:
            return range_text(x)
        whole = np.array2string(x, separator=", ", prefix="    ")
        return f"{range_text(x)}{' ' if x.ndim < 2 else chr(10) + '    '}{whole}"
    if isinstance(x, (Problem, DrawKey)):
        defaults = x._field_defaults
        parts = [
            f"{name}={_shown(value)}"
            for name, value in x._asdict().items()
            if name not in defaults or isinstance(value, np.ndarray) or value != defaults[name]
        ]
        return f"{type(x).__name__}({', '.join(parts)})"
    return repr(x)


def _runs(bad: BadOp) -> Iterator[str]:
    """A line for each backend and dtype, and what the comparison says."""
    if any(isinstance(value, Foreign) for value in _leaves(bad.static)):
        yield "not run: the call has a function of yours, and no file holds code"
        return
    floats = {x.dtype for x in bad.given if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    dtypes = sorted({*floats, np.dtype(np.float64)}, key=lambda dtype: dtype.itemsize)
    exact = None
    for backend in _backends(bad):
        for dtype in dtypes:
            served = backend or "numpy"
            try:
                again = bad.run(backend, dtype)
            except REFUSALS as error:
                yield f"{served} {dtype}: does not run: {error}"
                continue
            for name, x in again.named_results():
                yield f"{served} {dtype}: {name}: {range_text(x)}{_first(name, x)}"
            if exact is None and dtype == np.float64:
                exact = again
    if exact is not None:
        yield from _verdict(bad, exact)


def _backends(bad: BadOp) -> list[str | None]:
    """The implementations of the kernels it calls, the reference first; [None] if it calls none."""
    with kernels.families_used() as families, suppress(*REFUSALS):
        bad.run()
    names = {name for family in families for name in kernels.host_implementations(family)}
    return [*sorted(names, key=lambda name: (name != "reference", name))] or [None]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _first(name: str, x: np.ndarray) -> str:
    """Where the first value that is not finite stands."""
    if is_finite(x):
        return ""
    return f"; first at {name}{_index(np.argwhere(~np.isfinite(x))[0])}"


def _index(index: Any) -> str:
    return f"[{', '.join(map(str, index))}]"


def _verdict(bad: BadOp, exact: BadOp) -> Iterator[str]:
    """What float64 says of the first value that is not finite."""
    for (name, x), (_, y) in zip(bad.named_results(), exact.named_results(), strict=True):
        if is_finite(x):
            continue
        where = tuple(np.argwhere(~np.isfinite(x))[0])
        largest = float(np.finfo(x.dtype).max)
        value = y[where]
        at = f"{name}{_index(where)}"
        if not np.isfinite(value):
            yield f"{at} is {x[where]}, in float64 too: it has no finite value at these inputs"
        elif abs(value) > largest:
            yield f"{at} is {x[where]}: its value, {value:.4g}, exceeds the largest {x.dtype}, {largest:.4g}"
        else:
            yield f"{at} is {x[where]} though its value is {value:.4g}: something on the way to it overflows {x.dtype}"
        return
