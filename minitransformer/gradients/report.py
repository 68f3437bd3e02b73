"""What a gradient check found, in words: which argument, which element, by how much, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_ALIKE = 1e-3  # how well a pattern must fit; an error of a real mistake is of order 1
_LETTERS = {  # names of axes, by the name of the argument and the number of its axes
    **dict.fromkeys([("q", 4), ("query", 4)], "bhtd"),
    **dict.fromkeys([("k", 4), ("key", 4), ("v", 4), ("value", 4)], "bhsd"),
    ("x", 3): "btc",
}


class Mismatch(NamedTuple):
    """A wrong gradient: that of the argument `name`, as claimed and as it should be, for one upstream gradient.

    All arrays have the argument's shape. `wrong` marks the elements that differ by more than rounding, `hidden`
    those that were not compared: on a kink, or not looked at.
    """

    name: str
    analytic: np.ndarray
    numeric: np.ndarray
    wrong: np.ndarray
    hidden: np.ndarray

    def __str__(self) -> str:
        lines = [f"the gradient of {self.name} is wrong in {_share(int(self.wrong.sum()), int((~self.hidden).sum()))}"]
        error = np.where(self.wrong, abs(self.analytic - self.numeric), -1.0)
        error = np.where(np.isnan(error), math.inf, error)
        worst = index_of(int(error.argmax()), self.wrong.shape)
        a, n = float(self.analytic[worst]), float(self.numeric[worst])
        ratio = "" if not n else f", ratio {a / n:.6g}" if abs(a / n - 1) > 1e-3 else f", ratio 1 {a / n - 1:+.3g}"
        where = element(self.name, worst, self.analytic.shape)
        lines.append(f"  {where}: analytic {a:.9g}, numeric {n:.9g}{ratio}")
        lines += [f"  {pattern}" for pattern in patterns(self)]
        return "\n".join(lines)


def _share(count: int, total: int) -> str:
    return f"all {total} elements" if count == total > 1 else f"{count} of {total} element{'s' * (total > 1)}"


def element(name: str, index: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """An element of a gradient, with the names of its axes where they are known: `dk[b=0, h=1, s=3, d=0]`."""
    letters = _LETTERS.get((name, len(shape)))
    parts = [f"{letter}={i}" for letter, i in zip(letters, index, strict=True)] if letters else map(str, index)
    return f"d{name}[{', '.join(parts)}]"


def index_of(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the element at a flat position."""
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def patterns(mismatch: Mismatch) -> Iterator[str]:
    """What the error looks like, the likeliest first; nothing if it looks like nothing known."""
    a, n = (np.where(mismatch.hidden, 0.0, x) for x in (mismatch.analytic, mismatch.numeric))
    if not np.isfinite(a).all():
        yield "the analytic gradient is not finite"
        return
    if not a.any():
        yield "it is 0 everywhere: the backward lost this argument, or returns it as a constant"
        return
    factor = float((a * n).sum() / (n * n).sum()) if n.any() else math.inf
    if math.isfinite(factor) and _explains(factor * n, a, n):
        yield f"it is {_number(factor)} times the numeric one everywhere{_explain(factor, a.shape)}"
        return
    if a.ndim >= 2 and a.shape[-1] == a.shape[-2] and _explains(np.swapaxes(n, -1, -2), a, n):
        yield "it is the transpose of the numeric one"
        return
    if _explains(n.ravel()[::-1].reshape(n.shape), a, n):
        yield "it is the numeric one in reverse order"
        return
    for axis, size in enumerate(a.shape):
        for shift in (1, -1):
            if size > 2 and _explains(np.roll(n, shift, axis), a, n):
                yield f"it is the numeric one, moved by {shift} along {_axis(mismatch, axis)}"
                return
    yield from _by_axis(mismatch, a, n)


def _explains(candidate: np.ndarray, a: np.ndarray, n: np.ndarray) -> bool:
    """Whether a changed numeric gradient comes a hundred times closer to the analytic one than the numeric itself."""
    return bool(abs(a - candidate).max(initial=0.0) <= 0.01 * abs(a - n).max(initial=0.0))


def _by_axis(mismatch: Mismatch, a: np.ndarray, n: np.ndarray) -> Iterator[str]:
    """Whether whole slices are right, empty, or off by a factor of their own."""
    wrong, found = mismatch.wrong, False
    for axis, size in enumerate(a.shape):
        others = tuple(i for i in range(a.ndim) if i != axis)
        bad = wrong.any(axis=others) if others else wrong
        whole = (wrong | mismatch.hidden).all(axis=others) if others else wrong
        if size < 2 or bad.all() or not whole[bad].all():
            continue
        slices = [int(i) for i in np.flatnonzero(bad)]
        empty = not np.take(a, slices, axis).any()
        found = found or empty
        yield f"only at {_some(slices)} of {_axis(mismatch, axis)}{', where it is 0' if empty else ''}"
    if found:
        return
    for axis, size in enumerate(a.shape):
        factors = _factors(np.moveaxis(a, axis, 0).reshape(size, -1), np.moveaxis(n, axis, 0).reshape(size, -1))
        if size > 1 and factors is not None:
            listed = _some([_number(f) for f in factors])
            yield f"off by factors of their own along {_axis(mismatch, axis)}: {listed}"
            return
    lost, excess = wrong & (a == 0), wrong & (n == 0)
    if lost.any() and not (wrong & ~lost).any():
        yield f"it is 0 in {_share(int(lost.sum()), lost.size)} where it should not be"
    if excess.any() and not (wrong & ~excess).any():
        yield f"it is not 0 in {_share(int(excess.sum()), excess.size)} where it should be, as where a mask hides"


def _factors(a: np.ndarray, n: np.ndarray) -> np.ndarray | None:
    """One factor for each row, if that explains everything."""
    if a.shape[1] < 2 or not (n * n).sum(1).all():
        return None
    factors = (a * n).sum(1) / (n * n).sum(1)
    return factors if _explains(factors[:, None] * n, a, n) else None


def _number(x: float) -> str:
    return f"{x:.6g}" if not 1e-12 < abs(x - 1) < 1e-3 else f"1 {x - 1:+.3g}"


def _axis(mismatch: Mismatch, axis: int) -> str:
    letters = _LETTERS.get((mismatch.name, mismatch.analytic.ndim))
    return letters[axis] if letters else f"axis {axis}"


def _some(items: list[int] | list[str]) -> str:
    return ", ".join(map(str, items[:6])) + (", ..." if len(items) > 6 else "")


def _explain(factor: float, shape: tuple[int, ...]) -> str:
    """Where such a factor may come from."""
    if _near(factor, -1):
        return ": the sign"
    sources = {"2": 2.0, "1/2": 0.5}
    for axis, size in enumerate(shape):
        if size > 1:
            what = f"the size {size} of axis {axis}"
            sources |= {what: size, f"1 / {what}": 1 / size}
            sources |= {f"the root of {what}": math.sqrt(size), f"1 / the root of {what}": 1 / math.sqrt(size)}
    if math.prod(shape) > 1:
        count = math.prod(shape)
        sources |= {f"the number {count} of elements": count, f"1 / the number {count} of elements": 1 / count}
    found = [name for name, value in sources.items() if _near(abs(factor), value)]
    sign = "minus " if factor < 0 else ""
    return f": {sign}{' or '.join(found)}" if found else ""


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= _ALIKE * abs(b)


@dataclass
class GradcheckReport:
    """What `gradcheck` compared and found. True if all is well."""

    name: str
    method: str  # "complex" or "central"
    mode: str  # "full" or "directional"
    compared: int = 0  # numbers that were compared
    worst: float = 0.0  # the largest error among them, as a part of what was allowed
    kinks: int = 0  # elements left out, because the function has a kink there
    mismatches: list[Mismatch] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # everything else that is wrong
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong and something was compared."""
        return not self.mismatches and not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        how = {"complex": "complex step", "central": "central differences"}[self.method]
        left_out = f", {self.kinks} left out at kinks" if self.kinks else ""
        head = f"gradcheck of {self.name}: {'passed' if self.ok else 'FAILED'}"
        lines = [f"{head} ({how}, {self.mode}, {self.compared} numbers compared{left_out})"]
        lines += [str(mismatch) for mismatch in self.mismatches]
        lines += self.problems
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)
