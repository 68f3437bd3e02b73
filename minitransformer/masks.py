"""Masks as objects: which query may attend to which key. `True` = may attend.

A mask is a rule, not a matrix: it is asked cell by cell through a `mask_mod(b, h, q, k)` made for given
sizes (B batch, H heads, T queries, S keys), the function that attention kernels compile. Masks combine
with `&`, `|` and `~`, print themselves as the expression that made them, and explain themselves: `show()`
draws the grid, `why(q, k)` names the rule that blocks a cell. They are immutable and own their arrays.

Rules that compare the positions of queries and keys need to know which key position is query q's own.
With T = S it is q. With T != S it must be said: `align="lower_right"` (q + S - T: the queries are the last
T positions, as with a KV cache) or `"upper_left"` (q, as torch's `is_causal`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from minitransformer.autograd import as_array
from minitransformer.errors import DTypeError, MaskError, RangeError, ShapeError
from minitransformer.kernels.attention.mods import evaluate_mask, evaluate_mask_at

Mod = Callable[[Any, Any, Any, Any], Any]
Sizes = tuple[int | None, int | None, int | None, int | None]  # B, H, T, S; None is any
Four = tuple[int, int, int, int]

_ANY: Sizes = (None, None, None, None)
_SHOWN = 64


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """A rule about B x H x T x S cells. `sizes` are those it was made for, None where any will do."""

    sizes: Sizes

    __array_ufunc__ = None  # `array & mask` asks the mask, which refuses

    def mask_mod(self, B: int, H: int, T: int, S: int) -> Mod:
        """The rule as a function (b, h, q, k) -> bool of integers or integer arrays, for these sizes.

        Raises `ShapeError` for sizes it was not made for, `MaskError` where T != S needs an `align`.
        """
        wanted = tuple(_integer(repr(self), name, n, 0) for name, n in zip("BHTS", (B, H, T, S), strict=True))
        for name, known, n in zip("BHTS", self.sizes, wanted, strict=True):
            if known not in (None, n):
                raise ShapeError(
                    repr(self), f"is made for {name}={known}, got {name}={n}", "Make the mask for these sizes"
                )
        return self._mod(*wanted)

    def _mod(self, B: int, H: int, T: int, S: int) -> Mod:
        raise NotImplementedError

    def dense(self, B: int, H: int, T: int, S: int) -> np.ndarray:
        """All cells: bool (B, H, T, S), a read-only view that takes memory only for axes that matter."""
        return evaluate_mask(self.mask_mod(B, H, T, S), B, H, T, S)

    def show(self, T: int | None = None, S: int | None = None, b: int = 0, h: int = 0) -> str:
        """The grid of one batch row and head as text: a row per query, `x` = may attend, `.` = blocked.

        T and S default to the sizes the mask knows, else to each other, else to 8. Cut at 64 x 64.
        """
        T = self.sizes[2] if T is None else T
        S = self.sizes[3] if S is None else S
        T, S = (8 if S is None else S) if T is None else T, (8 if T is None else T) if S is None else S
        batch, heads = self._around(b, h)
        mod = self.mask_mod(batch, heads, T, S)
        rows, columns = min(T, _SHOWN), min(S, _SHOWN)
        q, k = np.ogrid[:rows, :columns]
        allowed = np.broadcast_to(evaluate_mask_at(mod, b, h, q, k), (rows, columns))
        width = len(str(max(columns - 1, 0)))
        label = max(3, len(str(max(rows - 1, 0))))
        cut = f", first {rows} x {columns} cells" if (rows, columns) != (T, S) else ""
        lines = [f"{self!r}, T={T}, S={S}{cut}"]
        lines.append(" ".join([r"q\k".rjust(label), *(str(j).rjust(width) for j in range(columns))]))
        for i in range(rows):
            marks = (("x" if cell else ".").rjust(width) for cell in allowed[i])
            lines.append(" ".join([str(i).rjust(label), *marks]))
        return "\n".join(lines)

    def why(self, q: int, k: int, b: int = 0, h: int = 0) -> str:
        """ "allowed", or "blocked by ..." with the innermost rules that decide.

        Where all of several alternatives block, or several requirements do, all are named. A size that
        the mask does not know is taken as the other one (T = S) or just large enough for the cell.
        Raises `RangeError` for a cell outside the sizes it knows.
        """
        q, k = _integer("why", "q", q, 0), _integer("why", "k", k, 0)
        B, H = self._around(b, h)
        known_T, known_S = self.sizes[2:]
        T = max(k + 1 if known_S is None else known_S, q + 1) if known_T is None else known_T
        S = max(q + 1 if known_T is None else known_T, k + 1) if known_S is None else known_S
        for name, index, size in (("q", q, T), ("k", k, S)):
            if index >= size:
                raise RangeError(
                    "why", f"{name}={index} is outside the mask, expected 0 to {size - 1}", "Ask about a cell"
                )
        sizes, cell = (B, H, T, S), (b, h, q, k)
        if self._allows(sizes, cell):
            return "allowed"
        return "blocked by " + " and ".join(dict.fromkeys(self._blockers(sizes, cell, False)))

    def _around(self, b: int, h: int) -> tuple[int, int]:
        """The B and H of the mask, or just enough to hold row b and head h."""
        sizes = []
        for name, index, known in (("b", b, self.sizes[0]), ("h", h, self.sizes[1])):
            index = _integer(repr(self), name, index, 0)
            if known is not None and index >= known:
                raise RangeError(
                    repr(self), f"{name}={index} is outside, expected 0 to {known - 1}", "Ask about a cell"
                )
            sizes.append(index + 1 if known is None else known)
        return sizes[0], sizes[1]

    def _allows(self, sizes: Four, cell: Four) -> bool:
        return bool(evaluate_mask_at(self.mask_mod(*sizes), *cell))

    def _blockers(self, sizes: Four, cell: Four, negated: bool) -> list[str]:
        """The innermost rules through which this mask, or its complement if negated, blocks the cell."""
        return ["~" * negated + repr(self)]

    def __and__(self, other: Mask) -> Mask:
        return _combine("&", self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine("|", self, other)

    def __invert__(self) -> Mask:
        return _Complement(self.sizes, self)

    def __rand__(self, other: Any) -> Mask:
        return _combine("&", other, self)

    def __ror__(self, other: Any) -> Mask:
        return _combine("|", other, self)

    def __bool__(self) -> bool:
        raise DTypeError(
            repr(self), "a mask has no truth value", "Combine masks with & | ~, not and, or, not"
        )


@dataclass(frozen=True, eq=False, repr=False)
class _Rule(Mask):
    """One named rule: the text that made it, and what makes its function for given sizes."""

    text: str
    make: Callable[[int, int, int, int], Mod]

    def _mod(self, B: int, H: int, T: int, S: int) -> Mod:
        return self.make(B, H, T, S)

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False, repr=False)
class _Combination(Mask):
    """Several masks of which all (&) or any (|) must allow."""

    symbol: str
    parts: tuple[Mask, ...]

    def _mod(self, B: int, H: int, T: int, S: int) -> Mod:
        mods = [part.mask_mod(B, H, T, S) for part in self.parts]
        return reduce(_both if self.symbol == "&" else _either, mods)

    def _blockers(self, sizes: Four, cell: Four, negated: bool) -> list[str]:
        # By De Morgan, & and | alike: the parts that agree with the outcome are those that decide it.
        decisive = [part for part in self.parts if part._allows(sizes, cell) == negated]
        return [name for part in decisive for name in part._blockers(sizes, cell, negated)]

    def __repr__(self) -> str:
        return f" {self.symbol} ".join(map(_bracketed, self.parts))


@dataclass(frozen=True, eq=False, repr=False)
class _Complement(Mask):
    inner: Mask

    def _mod(self, B: int, H: int, T: int, S: int) -> Mod:
        mod = self.inner.mask_mod(B, H, T, S)
        return lambda b, h, q, k: mod(b, h, q, k) ^ True  # ~True is -2 for Python's bool

    def _blockers(self, sizes: Four, cell: Four, negated: bool) -> list[str]:
        return self.inner._blockers(sizes, cell, not negated)

    def __repr__(self) -> str:
        return f"~{_bracketed(self.inner)}"


@dataclass(frozen=True, eq=False, repr=False)
class _Bound(Mask):
    """A mask for given sizes only."""

    inner: Mask
    text: str

    def _mod(self, B: int, H: int, T: int, S: int) -> Mod:
        return self.inner.mask_mod(B, H, T, S)

    def _blockers(self, sizes: Four, cell: Four, negated: bool) -> list[str]:
        return self.inner._blockers(sizes, cell, negated)

    def __repr__(self) -> str:
        return self.text


def causal(align: str | None = None) -> Mask:
    """No query sees a later key: k <= own position."""
    _check_align("causal", align)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        shift = _shift("causal", align, T, S)
        return lambda b, h, q, k: k <= q + shift

    return _Rule(_ANY, f"causal({align!r})" if align else "causal()", make)


def window(left: int | None, right: int | None, align: str | None = None) -> Mask:
    """Keys from `left` before to `right` after the own position, both included; None is unbounded."""
    _check_align("window", align)
    left = None if left is None else _integer("window", "left", left, 0)
    right = None if right is None else _integer("window", "right", right, 0)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        shift = _shift("window", align, T, S)
        first = shift - (T + S if left is None else left)
        last = shift + (T + S if right is None else right)
        return lambda b, h, q, k: (k >= q + first) & (k <= q + last)

    return _Rule(_ANY, f"window(left={left}, right={right}{_aligned(align)})", make)


def padding(attention_mask: Any) -> Mask:
    """Real tokens may be attended: bool or 0/1 integers (B, S), 1 = real, as Hugging Face has them."""
    array = np.asarray(as_array("padding", attention_mask))
    if array.dtype.kind not in "biu":
        raise DTypeError(
            "padding",
            f"attention_mask has dtype {array.dtype}, expected bool or integers, 1 = real token",
            "Convert it: mask == 1 if 1 is real, mask == 0 if it is additive (0 and -inf)",
        )
    if array.ndim != 2:
        raise ShapeError("padding", f"attention_mask has shape {array.shape}, expected (B, S)", "Reshape it")
    if not np.isin(array, (0, 1)).all():
        raise MaskError(
            "padding", "attention_mask holds other values than 0 and 1", "Compare: input_ids != pad_id"
        )
    real = _own(array, bool)
    text = f"padding({_text(real.astype(int))})"
    return _Rule(
        (real.shape[0], None, None, real.shape[1]), text, lambda B, H, T, S: lambda b, h, q, k: real[b, k]
    )


def documents(ids: Any, align: str | None = None) -> Mask:
    """Packed documents: ids (S,) or (B, S), and a query attends to the keys with its own position's id.

    A query whose own position lies outside the keys (T > S) belongs to no document and attends to nothing.
    """
    _check_align("documents", align)
    given = _integers("documents", ids, (1, 2))
    rows = given.shape[0] if given.ndim == 2 else None
    # Renumbered from 0, so that -1 is free for queries without a document.
    names = np.unique(given, return_inverse=True)[1].reshape(-1, given.shape[-1])  # (B or 1, S)
    key_ids = _own(names, np.int64)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        own = np.arange(T) + _shift("documents", align, T, S)  # (T,)
        inside = (own >= 0) & (own < S)
        query_ids = np.full((len(key_ids), T), -1)  # (B or 1, T)
        query_ids[:, inside] = key_ids[:, own[inside]]
        if rows is None:
            return lambda b, h, q, k: query_ids[0, q] == key_ids[0, k]
        return lambda b, h, q, k: query_ids[b, q] == key_ids[b, k]

    return _Rule((rows, None, None, given.shape[-1]), f"documents({_text(given)}{_aligned(align)})", make)


def prefix(n: int) -> Mask:
    """The first n keys, visible to every query; n may exceed S. As in `causal() | prefix(n)`."""
    n = _integer("prefix", "n", n, 0)
    return _Rule(_ANY, f"prefix({n})", lambda B, H, T, S: lambda b, h, q, k: k < n)


def global_tokens(ids: Any, align: str | None = None) -> Mask:
    """Listed key positions attend everywhere and are attended by all; those past the end have no effect."""
    _check_align("global_tokens", align)
    given = _integers("global_tokens", ids, (1,))
    if (given < 0).any():
        raise RangeError(
            "global_tokens", f"got position {given.min()}, expected 0 or more", "Count from the first key"
        )

    def make(B: int, H: int, T: int, S: int) -> Mod:
        key_listed = np.zeros(S, bool)
        key_listed[given[given < S]] = True
        query_listed = np.isin(np.arange(T) + _shift("global_tokens", align, T, S), given[given < S])
        return lambda b, h, q, k: query_listed[q] | key_listed[k]

    return _Rule(_ANY, f"global_tokens({_text(given)}{_aligned(align)})", make)


def strided(block: int, stride: int, align: str | None = None) -> Mask:
    """The own block of `block` positions, and the last of every `stride` positions.

    k // block == p // block or k % stride == stride - 1, with p the own position: the fixed pattern of
    Sparse Transformers (Child et al. 2019). Not causal by itself: `causal() & strided(block, stride)`.
    """
    _check_align("strided", align)
    block, stride = _integer("strided", "block", block, 1), _integer("strided", "stride", stride, 1)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        shift = _shift("strided", align, T, S)
        return lambda b, h, q, k: (k // block == (q + shift) // block) | (k % stride == stride - 1)

    return _Rule(_ANY, f"strided(block={block}, stride={stride}{_aligned(align)})", make)


def dense(array: Any) -> Mask:
    """A bool array that broadcasts to (B, H, T, S). The one mask that holds a matrix."""
    given = np.asarray(as_array("dense", array))
    if given.dtype != bool:
        raise DTypeError(
            "dense",
            f"got dtype {given.dtype}, expected bool, True = may attend",
            "Convert it: array == 1 if 1 means attend, array == 0 if it is additive (0 and -inf)",
        )
    if given.ndim > 4:
        raise ShapeError(
            "dense", f"got shape {given.shape}, expected one that broadcasts to (B, H, T, S)", "Reshape it"
        )
    cells = _own(given.reshape((1,) * (4 - given.ndim) + given.shape), bool)
    one_b, one_h, one_q, one_k = (n == 1 for n in cells.shape)
    B, H, T, S = (None if n == 1 else n for n in cells.shape)

    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return cells[0 if one_b else b, 0 if one_h else h, 0 if one_q else q, 0 if one_k else k]

    return _Rule((B, H, T, S), f"dense({_text(given)})", lambda B, H, T, S: mod)


def from_function(mask_mod: Mod) -> Mask:
    """Your own rule: `mask_mod(b, h, q, k) -> bool` in plain Python about one cell, `if` and `and` included."""
    if not callable(mask_mod):
        raise DTypeError(
            "from_function",
            f"got a {type(mask_mod).__name__}, expected a function (b, h, q, k) -> bool",
            "Wrap arrays with masks.dense",
        )
    name = getattr(mask_mod, "__name__", type(mask_mod).__name__)
    return _Rule(_ANY, f"from_function({name})", lambda B, H, T, S: mask_mod)


def create_block_mask(mask_mod: Mod | Mask, B: int | None, H: int | None, T: int, S: int) -> Mask:
    """A function or mask bound to sizes (B or H None: any). Another size is a `ShapeError` from then on."""
    inner = mask_mod if isinstance(mask_mod, Mask) else from_function(mask_mod)
    asked = zip("BHTS", (B, H, T, S), strict=True)
    b, h, t, s = (
        None if n is None and name in "BH" else _integer("create_block_mask", name, n, 0) for name, n in asked
    )
    text = f"create_block_mask({inner!r}, B={b}, H={h}, T={t}, S={s})"
    bound = _Bound(_agree("create_block_mask", inner.sizes, (b, h, t, s)), inner, text)
    bound.mask_mod(*(1 if n is None else n for n in bound.sizes))  # ambiguous alignment is an error now
    return bound


def _both(first: Mod, second: Mod) -> Mod:
    return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)


def _either(first: Mod, second: Mod) -> Mod:
    return lambda b, h, q, k: first(b, h, q, k) | second(b, h, q, k)


def _combine(symbol: str, left: Any, right: Any) -> Mask:
    for side in (left, right):
        if not isinstance(side, Mask):
            raise DTypeError(
                f"mask {symbol} mask",
                f"got a {type(side).__name__}, expected a mask",
                "Wrap arrays with masks.dense and functions with masks.from_function",
            )
    nested = (
        side.parts if isinstance(side, _Combination) and side.symbol == symbol else (side,)
        for side in (left, right)
    )
    sizes = _agree(f"mask {symbol} mask", left.sizes, right.sizes)
    return _Combination(sizes, symbol, tuple(part for parts in nested for part in parts))


def _bracketed(mask: Mask) -> str:
    return f"({mask!r})" if isinstance(mask, _Combination) else repr(mask)


def _agree(op: str, left: Sizes, right: Sizes) -> Sizes:
    for name, m, n in zip("BHTS", left, right, strict=True):
        if m is not None and n is not None and m != n:
            raise ShapeError(
                op, f"one side is for {name}={m}, the other for {name}={n}", "Give both one size"
            )
    B, H, T, S = (n if m is None else m for m, n in zip(left, right, strict=True))
    return B, H, T, S


def _shift(op: str, align: str | None, T: int, S: int) -> int:
    """What to add to q to get its own position among the keys."""
    if T != S and align is None:
        raise MaskError(
            op,
            f"T={T} and S={S} differ, so the own position of a query is ambiguous",
            'Pass align="lower_right" (the last T positions, as with a KV cache) or "upper_left"',
        )
    return S - T if align == "lower_right" else 0


def _check_align(op: str, align: str | None) -> None:
    if align not in (None, "lower_right", "upper_left"):
        raise MaskError(
            op, f'align is {align!r}, expected None, "lower_right" or "upper_left"', "Name the corner"
        )


def _aligned(align: str | None) -> str:
    return f", align={align!r}" if align else ""


def _integer(op: str, name: str, value: Any, least: int) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise DTypeError(
            op, f"{name} is a {type(value).__name__}, expected an integer", "Pass an int"
        ) from None
    if number < least:
        raise RangeError(op, f"{name} is {number}, expected {least} or more", "Pass a larger number")
    return number


def _integers(op: str, values: Any, ndims: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(as_array(op, values))
    if array.size and array.dtype.kind not in "iu":
        raise DTypeError(op, f"ids have dtype {array.dtype}, expected integers", "Use array.astype(int)")
    if array.ndim not in ndims:
        expected = " or ".join("(S,)" if n == 1 else "(B, S)" for n in ndims)
        raise ShapeError(op, f"ids have shape {array.shape}, expected {expected}", "Reshape them")
    return _own(array, array.dtype if array.size else np.int64)


def _own(array: np.ndarray, dtype: Any) -> np.ndarray:
    copy = array.astype(dtype)
    copy.flags.writeable = False
    return copy


def _text(array: np.ndarray) -> str:
    return str(array.tolist()) if array.size <= 16 else f"<{array.dtype} array {array.shape}>"
