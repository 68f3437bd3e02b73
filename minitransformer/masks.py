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

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from minitransformer.autograd import as_host
from minitransformer.checks import is_integer, shown
from minitransformer.errors import DTypeError, MaskError, RangeError, ShapeError
from minitransformer.kernels.attention.mods import evaluate_mask, evaluate_mask_at

Mod = Callable[[Any, Any, Any, Any], Any]
Sizes = tuple[int | None, int | None, int | None, int | None]  # B, H, T, S; None is any
Four = tuple[int, int, int, int]

_ANY: Sizes = (None, None, None, None)
_MOST = 2**48  # far more than memory, and sums of positions fit 64 bits
_CONVERT = "Convert it: mask == 1 if 1 means attend, mask == 0 if it is additive (0 and -inf)"


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """A rule about B x H x T x S cells, made by the functions of this module, or several combined.

    `sizes` are those it was made for (None: any), `text` the expression that made it, `make` gives its
    mask_mod for checked sizes; `symbol` and `parts` say what it was combined from.
    """

    sizes: Sizes
    text: str
    make: Callable[[int, int, int, int], Mod]
    symbol: str = ""
    parts: tuple[Mask, ...] = ()

    __array_ufunc__ = None  # so that `array & mask` asks the mask, which refuses

    def mask_mod(self, B: int, H: int, T: int, S: int) -> Mod:
        """The rule as a function (b, h, q, k) -> bool of integers or integer arrays, for these sizes.

        Raises `ShapeError` for sizes it was not made for, `MaskError` where T != S needs an `align`.
        """
        for name, known, n in zip("BHTS", self.sizes, (B, H, T, S), strict=True):
            if known not in (None, _integer(self.text, name, n, 0)):
                raise ShapeError(self.text, f"is made for {name}={known}, got {n}", "Make one for these sizes")
        return self.make(B, H, T, S)

    def dense(self, B: int, H: int, T: int, S: int) -> np.ndarray:
        """All cells: bool (B, H, T, S), a read-only view that takes memory only for axes that matter."""
        return evaluate_mask(self.mask_mod(B, H, T, S), B, H, T, S)

    def show(self, T: int | None = None, S: int | None = None, b: int = 0, h: int = 0) -> str:
        """The grid of one batch row and head as text: a line per query, `x` = may attend, `.` = blocked.

        T and S default to the sizes the mask knows, else to each other, else to 8. Cut at 64 x 64.
        """
        T, S = self.sizes[2] if T is None else T, self.sizes[3] if S is None else S
        T, S = (8 if S is None else S) if T is None else T, (8 if T is None else T) if S is None else S
        mod = self.mask_mod(*self._around(b, h), T, S)
        rows, columns = min(T, 64), min(S, 64)
        q, k = np.ogrid[:rows, :columns]
        allowed = np.broadcast_to(evaluate_mask_at(mod, b, h, q, k), (rows, columns))
        width = len(str(columns - 1)) if columns else 1
        cut = f", first {rows} x {columns} cells" if (rows, columns) != (T, S) else ""
        table = [["q\\k", *range(columns)], *([i, *np.where(allowed[i], "x", ".")] for i in range(rows))]
        lines = (" ".join([f"{first!s:>3}", *(f"{x!s:>{width}}" for x in rest)]) for first, *rest in table)
        return "\n".join([f"{self}, T={T}, S={S}{cut}", *lines])

    def why(self, q: int, k: int, b: int = 0, h: int = 0) -> str:
        """Either `allowed`, or `blocked by` and all innermost rules that decide.

        A size that the mask does not know is taken as the other one (T = S), or just large enough for
        the cell. Raises `RangeError` for a cell outside the sizes it knows.
        """
        T, S = self.sizes[2:]
        t, s = _inside(self.text, "q", q, T), _inside(self.text, "k", k, S)
        sizes = (*self._around(b, h), max(t, s) if T is None else T, max(t, s) if S is None else S)
        if self._allows(sizes, (b, h, q, k)):
            return "allowed"
        return "blocked by " + " and ".join(dict.fromkeys(self._blockers(sizes, (b, h, q, k), False)))

    def _around(self, b: int, h: int) -> tuple[int, int]:
        """The B and H of the mask, or just enough to hold row b and head h."""
        return _inside(self.text, "b", b, self.sizes[0]), _inside(self.text, "h", h, self.sizes[1])

    def _allows(self, sizes: Four, cell: Four) -> bool:
        return bool(evaluate_mask_at(self.mask_mod(*sizes), *cell))

    def _blockers(self, sizes: Four, cell: Four, negated: bool) -> list[str]:
        """The innermost rules through which this mask, or its complement if negated, blocks the cell."""
        if not self.parts:
            return ["~" * negated + self.text]
        if self.symbol == "~":
            return self.parts[0]._blockers(sizes, cell, not negated)
        # By De Morgan, & and | alike: the parts that agree with the outcome are those that decide it.
        decisive = [part for part in self.parts if part._allows(sizes, cell) == negated]
        return [name for part in decisive for name in part._blockers(sizes, cell, negated)]

    def __and__(self, other: Mask) -> Mask:
        return _combine("&", self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine("|", self, other)

    __rand__, __ror__ = __and__, __or__  # reached only by what is no mask, and refused

    def __invert__(self) -> Mask:
        def make(*sizes: int) -> Mod:
            mod = self.mask_mod(*sizes)
            return lambda b, h, q, k: mod(b, h, q, k) ^ True  # ~True is -2 for Python's bool

        return Mask(self.sizes, f"~{_operand(self)}", make, "~", (self,))

    def __bool__(self) -> bool:
        raise DTypeError(self.text, "a mask has no truth value", "Combine masks with & | ~, not and, or, not")

    def __repr__(self) -> str:
        return self.text


def causal(align: str | None = None) -> Mask:
    """No query sees a later key: k <= own position."""
    shift_of, aligned = _alignment("causal", align)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        shift = shift_of(T, S)
        return lambda b, h, q, k: k <= q + shift

    return Mask(_ANY, f"causal({aligned[2:]})", make)


def window(left: int | None, right: int | None, align: str | None = None) -> Mask:
    """Keys from `left` before to `right` after the own position, both included; None is unbounded."""
    shift_of, aligned = _alignment("window", align)
    left = None if left is None else _integer("window", "left", left, 0)
    right = None if right is None else _integer("window", "right", right, 0)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        shift = shift_of(T, S)
        first = shift - (T + S if left is None else left)
        last = shift + (T + S if right is None else right)
        return lambda b, h, q, k: (k >= q + first) & (k <= q + last)

    return Mask(_ANY, f"window(left={left}, right={right}{aligned})", make)


def padding(attention_mask: Any) -> Mask:
    """Real tokens may be attended: bool or 0/1 integers (B, S), 1 = real, as Hugging Face has them."""
    array = as_host("padding", attention_mask)
    if array.dtype.kind not in "biu":
        raise DTypeError("padding", f"got {array.dtype}, expected bool or integers, 1 = real token", _CONVERT)
    if array.ndim != 2:
        raise ShapeError("padding", f"attention_mask has shape {array.shape}, expected (B, S)", "Reshape it")
    if not np.isin(array, (0, 1)).all():
        raise MaskError("padding", "attention_mask has values beside 0 and 1", "Compare: ids != pad_id")
    real = _own(array, bool)
    sizes = (real.shape[0], None, None, real.shape[1])
    return Mask(sizes, f"padding({_text(real * 1)})", lambda B, H, T, S: lambda b, h, q, k: real[b, k])


def documents(ids: Any, align: str | None = None) -> Mask:
    """Packed documents: ids (S,) or (B, S), and a query attends to the keys with its own position's id.

    A query whose own position lies outside the keys (T > S) belongs to no document and attends to nothing.
    """
    shift_of, aligned = _alignment("documents", align)
    given = _integers("documents", ids, "(S,)", "(B, S)")
    # Renumbered from 0, so that -1 is free for queries without a document.
    key_ids = np.atleast_2d(np.unique(given, return_inverse=True)[1].reshape(given.shape))  # (B or 1, S)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        own = np.arange(T) + shift_of(T, S)  # (T,)
        inside = (own >= 0) & (own < S)
        query_ids = np.full((len(key_ids), T), -1)  # (B or 1, T)
        query_ids[:, inside] = key_ids[:, own[inside]]
        if given.ndim == 1:
            return lambda b, h, q, k: query_ids[0, q] == key_ids[0, k]
        return lambda b, h, q, k: query_ids[b, q] == key_ids[b, k]

    rows = len(given) if given.ndim == 2 else None
    return Mask((rows, None, None, given.shape[-1]), f"documents({_text(given)}{aligned})", make)


def prefix(n: int) -> Mask:
    """The first n keys, visible to every query; n may exceed S. As in `causal() | prefix(n)`."""
    n = _integer("prefix", "n", n, 0)
    return Mask(_ANY, f"prefix({n})", lambda B, H, T, S: lambda b, h, q, k: k < n)


def global_tokens(ids: Any, align: str | None = None) -> Mask:
    """Listed key positions attend everywhere and are attended by all; those past the end have no effect."""
    shift_of, aligned = _alignment("global_tokens", align)
    given = _integers("global_tokens", ids, "(n,)")
    if (given < 0).any():
        raise RangeError("global_tokens", f"got {given.min()}, expected 0 or more", "Count from the first key")

    def make(B: int, H: int, T: int, S: int) -> Mod:
        key_listed = np.zeros(S, bool)
        key_listed[given[given < S]] = True
        query_listed = np.isin(np.arange(T) + shift_of(T, S), given[given < S])
        return lambda b, h, q, k: query_listed[q] | key_listed[k]

    return Mask(_ANY, f"global_tokens({_text(given)}{aligned})", make)


def strided(block: int, stride: int, align: str | None = None) -> Mask:
    """The own block of `block` positions, and the last of every `stride` positions.

    k // block == p // block or k % stride == stride - 1, with p the own position: the fixed pattern of
    Sparse Transformers (Child et al. 2019). Not causal by itself: `causal() & strided(block, stride)`.
    """
    shift_of, aligned = _alignment("strided", align)
    block, stride = _integer("strided", "block", block, 1), _integer("strided", "stride", stride, 1)

    def make(B: int, H: int, T: int, S: int) -> Mod:
        shift = shift_of(T, S)
        return lambda b, h, q, k: (k // block == (q + shift) // block) | (k % stride == stride - 1)

    return Mask(_ANY, f"strided(block={block}, stride={stride}{aligned})", make)


def dense(array: Any) -> Mask:
    """A bool array that broadcasts to (B, H, T, S). The one mask that holds a matrix."""
    given = as_host("dense", array)
    if given.dtype != bool:
        raise DTypeError("dense", f"got {given.dtype}, expected bool, True = may attend", _CONVERT)
    if given.ndim > 4:
        raise ShapeError("dense", f"got shape {given.shape}, expected up to (B, H, T, S)", "Reshape it")
    cells = _own(given.reshape((1,) * (4 - given.ndim) + given.shape), bool)
    own_b, own_h, own_q, own_k = (n != 1 for n in cells.shape)
    B, H, T, S = (None if n == 1 else n for n in cells.shape)

    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return cells[b if own_b else 0, h if own_h else 0, q if own_q else 0, k if own_k else 0]

    return Mask((B, H, T, S), f"dense({_text(given)})", lambda B, H, T, S: mod)


def from_function(mask_mod: Mod) -> Mask:
    """Your own rule `mask_mod(b, h, q, k) -> bool`: plain Python about one cell, `if` and `and` included."""
    name = getattr(mask_mod, "__name__", type(mask_mod).__name__)
    if not callable(mask_mod):
        problem = f"got a {name}, expected a function (b, h, q, k) -> bool"
        raise DTypeError("from_function", problem, "Wrap arrays with masks.dense")
    return Mask(_ANY, f"from_function({name})", lambda B, H, T, S: mask_mod)


def create_block_mask(mask_mod: Mod | Mask, B: int | None, H: int | None, T: int, S: int) -> Mask:
    """A function or mask bound to sizes (B or H None: any). Another size is a `ShapeError` from then on."""
    inner = mask_mod if isinstance(mask_mod, Mask) else from_function(mask_mod)
    sizes = _agree("create_block_mask", inner.sizes, (B, H, T, S))
    text = f"create_block_mask({inner}, B={B}, H={H}, T={T}, S={S})"
    b, h = (1 if n is None else n for n in sizes[:2])
    inner.mask_mod(b, h, T, S)  # so that what is wrong with the sizes is an error now
    return Mask(sizes, text, inner.mask_mod, parts=(inner,))


def _combine(symbol: str, left: Any, right: Any) -> Mask:
    for side in (left, right):
        if not isinstance(side, Mask):
            fix = "Wrap arrays with masks.dense and functions with masks.from_function"
            raise DTypeError(f"mask {symbol} mask", f"got a {type(side).__name__}, expected a mask", fix)
    parts = sum((side.parts if side.symbol == symbol else (side,) for side in (left, right)), ())

    def join(f: Mod, g: Mod) -> Mod:
        if symbol == "&":
            return lambda b, h, q, k: f(b, h, q, k) & g(b, h, q, k)
        return lambda b, h, q, k: f(b, h, q, k) | g(b, h, q, k)

    def make(*sizes: int) -> Mod:
        return reduce(join, [part.mask_mod(*sizes) for part in parts])

    text = f" {symbol} ".join(map(_operand, parts))
    return Mask(_agree(f"mask {symbol} mask", left.sizes, right.sizes), text, make, symbol, parts)


def _operand(mask: Mask) -> str:
    return f"({mask})" if mask.symbol in ("&", "|") else mask.text


def _agree(op: str, left: Sizes, right: Sizes) -> Sizes:
    for name, m, n in zip("BHTS", left, right, strict=True):
        if m is not None and n is not None and m != n:
            raise ShapeError(op, f"got {name}={m} on one side, {name}={n} on the other", "Make them equal")
    B, H, T, S = (n if m is None else m for m, n in zip(left, right, strict=True))
    return B, H, T, S


def _alignment(op: str, align: str | None) -> tuple[Callable[[int, int], int], str]:
    """What to add to q to get its own position among the keys, as a function of (T, S); and for repr."""
    if align is not None and not (isinstance(align, str) and align in ("lower_right", "upper_left")):
        raise MaskError(op, f"got align={shown(align)}", 'Pass "lower_right" or "upper_left", or nothing if T = S')

    def shift_of(T: int, S: int) -> int:
        if T != S and align is None:
            problem = f"T={T} and S={S} differ, so the own position of a query is ambiguous"
            raise MaskError(op, problem, 'Pass align="lower_right" (as for a KV cache) or "upper_left"')
        return S - T if align == "lower_right" else 0

    return shift_of, f", align={align!r}" if align else ""


def _integer(op: str, name: str, value: Any, least: int) -> int:
    if not is_integer(value):
        raise DTypeError(op, f"{name} is a {type(value).__name__}, expected an integer", "Pass an int")
    if not least <= value < _MOST:
        raise RangeError(op, f"{name} is {shown(value)}, expected {least} or more, below 2**48", "Pass such a number")
    return int(value)


def _inside(op: str, name: str, index: Any, size: int | None) -> int:
    """The size, or if any will do the smallest that has the index; `RangeError` if it has it not."""
    if _integer(op, name, index, 0) >= (index + 1 if size is None else size):
        raise RangeError(op, f"{name} is {index}, expected less than {size}", "Ask about a cell of the mask")
    return index + 1 if size is None else size


def _integers(op: str, ids: Any, *shapes: str) -> np.ndarray:
    array = as_host(op, ids)
    if array.size and array.dtype.kind not in "iu":
        raise DTypeError(op, f"ids have dtype {array.dtype}, expected integers", "Use array.astype(int)")
    if not 1 <= array.ndim <= len(shapes):
        raise ShapeError(op, f"ids have shape {array.shape}, expected {' or '.join(shapes)}", "Reshape them")
    if array.dtype == np.uint64 and array.size and array.max() >= _MOST:
        raise RangeError(op, f"ids hold {array.max()}, expected less than 2**48", "Number them from 0")
    return _own(array, np.int64)


def _own(array: np.ndarray, dtype: Any) -> np.ndarray:
    copy = array.astype(dtype)
    copy.flags.writeable = False
    return copy


def _text(array: np.ndarray) -> str:
    return str(array.tolist()) if array.size <= 16 else f"<{array.dtype} array {array.shape}>"
