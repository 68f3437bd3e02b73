"""Values of the wrong kind, each made from the right one that it replaces."""

from __future__ import annotations

import datetime
import decimal
import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from material import real

import minitransformer as mt


class RaisingArray:
    """Breaks when NumPy looks at it."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("no array for you")


class OnTheGPU:
    """As a CuPy array looks to NumPy users."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (2, 3), "typestr": "<f4", "data": (0, False), "version": 3}


def array_of(right: Any) -> np.ndarray:
    """The array in what is replaced, or some array."""
    if isinstance(right, mt.Tensor):
        return right.data
    return right if isinstance(right, np.ndarray) else real(2, 3)


def like(right: Any, array: np.ndarray) -> Any:
    """`array`, as a Tensor if it replaces one."""
    if not isinstance(right, mt.Tensor):
        return array
    return type(right)(array, requires_grad=right.requires_grad and array.dtype.kind in "fc")


def cast(kind: str) -> Callable[[Any], np.ndarray]:
    def change(right: Any) -> np.ndarray:
        array = array_of(right)
        with np.errstate(all="ignore"):
            return (array.real if kind in ("M8[D]", "m8[s]") else array).astype(kind)

    return change


def changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any], Any]:
    return lambda right: like(right, change(array_of(right)))


def written(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = np.array(array, np.float32)
        array.reshape(-1)[-1:] = value
        return array

    return change


def structured(right: Any) -> np.ndarray:
    array = array_of(right)
    return np.zeros(array.shape, [("a", "f4"), ("b", "i4")])


def every_other(array: np.ndarray) -> np.ndarray:
    """Strides of twice the size along every axis."""
    wide = np.zeros([2 * n for n in array.shape], array.dtype)
    view = wide[(..., *(slice(None, None, 2) for _ in array.shape))]
    view[...] = array
    return view


def reversed_twice(array: np.ndarray) -> np.ndarray:
    """Negative strides along every axis."""
    turn = tuple(slice(None, None, -1) for _ in array.shape)
    return array[turn].copy()[turn]


def unaligned(array: np.ndarray) -> np.ndarray:
    memory = bytearray(array.nbytes + 1)
    view = np.frombuffer(memory, np.uint8, array.nbytes, 1).view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("S"))


# Layouts that mean the same numbers: a call must give the same result.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": np.array,
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "every other": every_other,
    "negative strides": reversed_twice,
    "middle of a larger one": lambda a: np.pad(a, 2)[tuple(slice(2, 2 + n) for n in a.shape)],
    "axes swapped": lambda a: np.ascontiguousarray(a.T).T,
    "unaligned": unaligned,
    "other byte order": swapped,
    "subclass": lambda a: a.copy().view(type("Subclass", (np.ndarray,), {})),
    "big-endian and read-only": lambda a: read_only(swapped(a)),
    "zero strides": lambda a: np.broadcast_to(a[:1], a.shape) if a.ndim else a.copy(),  # rows all like the first
}


def loop() -> list[Any]:
    """A list that holds itself."""
    own: list[Any] = []
    own.append(own)
    return own


# From simple to odd: Hypothesis shrinks towards the first.
WRONG: dict[str, Callable[[Any], Any]] = {
    "None": lambda right: None,
    "True": lambda right: True,
    "False": lambda right: False,
    "0": lambda right: 0,
    "1": lambda right: 1,
    "2": lambda right: 2,
    "-1": lambda right: -1,
    "7": lambda right: 7,
    "0.5": lambda right: 0.5,
    "2.0": lambda right: 2.0,
    "-0.5": lambda right: -0.5,
    "1e-300": lambda right: 1e-300,
    "1e300": lambda right: 1e300,
    "2**31": lambda right: 2**31,
    "2**63": lambda right: 2**63,
    "-2**63": lambda right: -(2**63),
    "10**30": lambda right: 10**30,
    "10**400": lambda right: 10**400,
    "NaN": lambda right: math.nan,
    "inf": lambda right: math.inf,
    "-inf": lambda right: -math.inf,
    "1j": lambda right: 1j,
    "empty string": lambda right: "",
    "string": lambda right: "float32",
    "device": lambda right: "cuda:0",
    "surrogate": lambda right: "\ud800",
    "NUL": lambda right: "a\0b",
    "bytes": lambda right: b"bytes",
    "bytearray": lambda right: bytearray(8),
    "memoryview": lambda right: memoryview(bytes(8)),
    "empty tuple": lambda right: (),
    "empty list": lambda right: [],
    "list": lambda right: [1, 2],
    "list of floats": lambda right: [0.5, 1.5],
    "list of huge": lambda right: [10**30, 1],
    "ragged": lambda right: [[1.0, 2.0], [3.0]],
    "ragged arrays": lambda right: [real(2), real(3)],
    "list of None": lambda right: [None, None],
    "list of strings": lambda right: ["a", "b"],
    "list of itself": lambda right: loop(),
    "deep list": lambda right: [[[[[[[[[[[[[[[[[[1.0]]]]]]]]]]]]]]]]]],
    "tuple of arrays": lambda right: (real(2), real(2)),
    "original in a list": lambda right: [right],
    "dict": lambda right: {"a": 1},
    "empty dict": lambda right: {},
    "set": lambda right: {1, 2},
    "range": lambda right: range(3),
    "generator": lambda right: (i for i in range(3)),
    "slice": lambda right: slice(None),
    "Ellipsis": lambda right: ...,
    "NotImplemented": lambda right: NotImplemented,
    "function": lambda right: real,
    "function of anything": lambda right: lambda *args: 1.0,
    "function of arrays": lambda right: lambda *args: np.zeros((7, 7, 7)),
    "function of strings": lambda right: lambda *args: "text",
    "type": lambda right: float,
    "object": lambda right: object(),
    "module": lambda right: np,
    "dtype": lambda right: np.dtype(np.int8),
    "Decimal": lambda right: decimal.Decimal("0.5"),
    "Fraction": lambda right: fractions.Fraction(1, 2),
    "date": lambda right: datetime.date(2020, 1, 1),
    "raising __array__": lambda right: RaisingArray(),
    "on a GPU": lambda right: OnTheGPU(),
    "mask": lambda right: mt.masks.causal(),
    "module of nn": lambda right: mt.nn.Dropout(0.5),
    "float16 number": lambda right: np.float16(0.5),
    "float32 number": lambda right: np.float32(0.5),
    "float64 number": lambda right: np.float64(2.0),
    "longdouble number": lambda right: np.longdouble(2.0),
    "int8 number": lambda right: np.int8(2),
    "int64 number": lambda right: np.int64(-1),
    "uint64 number": lambda right: np.uint64(2**64 - 1),
    "bool number": lambda right: np.bool_(True),
    "complex number": lambda right: np.complex64(1j),
    "datetime number": lambda right: np.datetime64("2020-01-01"),
    "timedelta number": lambda right: np.timedelta64(2, "s"),
    "string number": lambda right: np.str_("text"),
    "NaN number": lambda right: np.float32(np.nan),
    "0-d": lambda right: array_of(right).reshape(-1)[:1].reshape(()) if array_of(right).size else np.float32(1),
    "0-d integer": lambda right: np.array(2),
    "0-d Tensor": lambda right: mt.tensor(1.0),
    "integer Tensor": lambda right: mt.tensor([1, 2]),
    "bool Tensor": lambda right: mt.tensor([True, False]),
    "complex Tensor": lambda right: mt.Tensor(array_of(right).astype(np.complex128)),
    "Tensor without gradient": lambda right: mt.Tensor(array_of(right)),
    "Tensor with history": lambda right: mt.Tensor(array_of(right).astype(np.float64), requires_grad=True) * 2,
    "Parameter": lambda right: mt.Parameter(array_of(right).astype(np.float32)),
    "float16": cast("float16"),
    "float32": cast("float32"),
    "float64": cast("float64"),
    "longdouble": cast("longdouble"),
    "complex64": cast("complex64"),
    "complex128": cast("complex128"),
    "int8": cast("int8"),
    "int64": cast("int64"),
    "uint8": cast("uint8"),
    "uint64": cast("uint64"),
    "bools": cast("bool"),
    "objects": cast("object"),
    "strings": cast("U4"),
    "byte strings": cast("S4"),
    "datetimes": cast("M8[D]"),
    "timedeltas": cast("m8[s]"),
    "structured": structured,
    "huge integers": lambda right: np.full(array_of(right).shape, 2**63 - 1),
    "negative integers": lambda right: np.full(array_of(right).shape, -1),
    "unsigned huge": lambda right: np.full(array_of(right).shape, 2**64 - 1, np.uint64),
    "NaN inside": changed(written(math.nan)),
    "inf inside": changed(written(math.inf)),
    "-inf everywhere": changed(lambda a: np.full(a.shape, -np.inf, np.float32)),
    "masked": lambda right: np.ma.masked_array(array_of(right), mask=False),
    "matrix": lambda right: np.asmatrix(array_of(right).reshape(1, -1)),
    "recarray": lambda right: structured(right).view(np.recarray),
    "empty": lambda right: like(right, np.empty(0, array_of(right).dtype)),
    "first axis empty": changed(lambda a: a[:0] if a.ndim else a),
    "last axis empty": changed(lambda a: a[..., :0] if a.ndim else a),
    "first axis 1": changed(lambda a: a[:1] if a.ndim else a),
    "last axis 1": changed(lambda a: a[..., :1] if a.ndim else a),
    "first axis longer": changed(lambda a: np.concatenate([a, a[:1]]) if a.ndim else a),
    "last axis longer": changed(lambda a: np.concatenate([a, a[..., :1]], -1) if a.ndim else a),
    "one axis less": changed(lambda a: a[0] if a.ndim and len(a) else a),
    "one axis more": changed(lambda a: a[None]),
    "64 axes": changed(lambda a: a.reshape((1,) * (64 - a.ndim) + a.shape)),
    "flattened": changed(lambda a: a.reshape(-1)),
    "transposed": changed(lambda a: a.T),
    **{name: changed(change) for name, change in LAYOUTS.items()},
    "overlapping": changed(lambda a: np.lib.stride_tricks.as_strided(a, a.shape, (0,) * a.ndim, writeable=False)),
}
