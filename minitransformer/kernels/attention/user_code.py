"""Users' `score_mod` as machine code: a function of a tile of scores, which the kernels call by its address.

The kernels are compiled and kept on disk once for all users' functions. A user's function about one score is
compiled into a small one that goes over the rows of a tile, the queries of a key side by side, so that LLVM can put
queries into lanes; Numba takes 0.3 to 1 s for it, once a process. What Numba cannot compile, or would compile to
something else than Python does, is served by the reference, with a warning.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import extending, types
from numba.core import errors
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype

from minitransformer.errors import MiniTransformerError
from minitransformer.kernels.attention.mods import STEP, Cells, derivative_at, name_of, scores_at
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.user_source import ONLY_COMPILED, Unfit, key_of, translated
from minitransformer.kernels.simd import REGISTER_BITS

intrinsic: Any = extending.intrinsic  # untyped: what it makes has other arguments than what it is given

_MOST = 64  # compiled functions that are remembered
_TRIED = 64  # cells at which compiled code is compared with Python
# A compiler that is fed with what it does not know fails in more ways than it names.
FAILURES = (
    errors.NumbaError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)

Result = TypeVar("Result")


class TileCode(NamedTuple):
    """What a kernel needs of a user's function. `alive` holds what must live as long as the call."""

    address: int
    buffers: np.ndarray  # int64: of each buffer its address and its shape
    failed: np.ndarray  # (1,) int64: not 0 if the function raised
    alive: tuple[Any, ...]

    def slopes_at(self, scores: np.ndarray, cells: Cells) -> np.ndarray:
        """The derivative at `scores` of chosen cells."""
        return _run(self.address, scores, cells, self.buffers)[1]


class Refusal:
    """Why a function is not compiled."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason, self.told = name, reason, False

    def served(self, result: Result) -> Result:
        """`result`, which the reference computed; says so once."""
        if not self.told:
            self.told = True
            warnings.warn(
                f"flex_attention: {self.name} is not compiled, so attention runs many times slower in NumPy "
                f"({self.reason}). Write it as plain arithmetic of single numbers, with arrays passed in buffers; "
                "if only its derivative cannot be compiled, give score_mod_grad",
                RuntimeWarning,
                stacklevel=2,
            )
        return result


class _Compiled(NamedTuple):
    address: int
    library: Any  # the code lives as long as this


_known: OrderedDict[Any, _Compiled | Refusal] = OrderedDict()
_lock = threading.RLock()  # for a function that itself calls attention


def tile_code(problem: Problem, shape: tuple[int, ...], dtype: np.dtype, slopes: bool) -> TileCode | Refusal | None:
    """The code of `problem.score_mod` for scores (B, H, T, S) of `dtype`; None where there is nothing to change.

    With `slopes` it also writes the derivative: of `score_mod_grad`, or by complex step.
    """
    if problem.score_mod is None or 0 in shape:
        return None
    buffers = tuple(np.require(x, x.dtype.newbyteorder("="), ["C", "A"]) for x in problem.buffers)
    numbers = np.array([n for x in buffers for n in (x.ctypes.data, *x.shape)], np.int64)
    mods = (problem.score_mod, problem.score_mod_grad) if slopes else (problem.score_mod,)
    try:
        key = dtype, slopes, tuple((x.dtype, x.ndim) for x in buffers), tuple(map(key_of, mods))
    except Unfit as error:
        # Without a key there is nothing to remember the warning by, except the place where it is given.
        return Refusal(name_of(problem.score_mod), str(error))
    with _lock:
        found = _known.pop(key, None)
        if found is None:
            found = _compiled(problem._replace(buffers=buffers), shape, dtype, slopes, numbers)
        _known[key] = found
        while len(_known) > _MOST:
            _known.popitem(last=False)
    if isinstance(found, Refusal):
        return found
    return TileCode(found.address, numbers, np.zeros(1, np.int64), (found.library, buffers))


def _compiled(
    problem: Problem, shape: tuple[int, ...], dtype: np.dtype, slopes: bool, numbers: np.ndarray
) -> _Compiled | Refusal:
    mod: Any = problem.score_mod
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.NumbaWarning)
            code = _build(problem, dtype, slopes)
    except FAILURES as error:
        return Refusal(name_of(mod), in_one_line(error))
    cells = np.unravel_index(np.linspace(0, np.prod(shape) - 1, _TRIED).astype(np.int64), shape)
    x = (4 * np.sin(np.arange(1.0, _TRIED + 1))).astype(dtype)
    try:
        expected = [scores_at(mod, x, cells, problem.buffers)]
        if problem.score_mod_grad is not None and slopes:
            expected.append(scores_at(problem.score_mod_grad, x, cells, problem.buffers))
        elif slopes:
            expected.append(derivative_at(mod, x, cells, problem.buffers))
    except MiniTransformerError as error:
        return Refusal(name_of(mod), str(error))
    for ours, theirs in zip(_run(code.address, x, cells, numbers), expected, strict=False):
        if not np.allclose(ours, theirs, rtol=(rough := 2e4 * np.finfo(dtype).eps), atol=rough, equal_nan=True):
            return Refusal(name_of(mod), "Numba understands it otherwise than Python does")
    return code


_PROTOTYPE: Any = ctypes.CFUNCTYPE(
    ctypes.c_int32, *[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 6, ctypes.c_void_p
)  # a Numba function: status(result*, exception*, scores*, slopes*, b, h, t, queries, j, keys, buffers*)


def _run(address: int, x: np.ndarray, cells: Cells, buffers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and slopes that code makes of scores `x` at `cells`; NaN where it raises."""
    function, memory = _PROTOTYPE(address), np.zeros(2, np.int64)
    scores, slopes = x.copy(), np.ones_like(x)
    result, exception = memory.ctypes.data, memory.ctypes.data + 8
    for n, (b, h, t, s) in enumerate(zip(*(axis.tolist() for axis in cells), strict=True)):
        places = (y.ctypes.data + n * y.itemsize for y in (scores, slopes))
        if function(result, exception, *places, b, h, t, 1, s, 1, buffers.ctypes.data):
            scores[n] = slopes[n] = np.nan
    return scores, slopes


def in_one_line(error: BaseException) -> str:
    """The first two lines of a message that say something."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("Failed in nopython mode")]
    return " ".join(lines[:2])[:200] or type(error).__name__


# --- Numba -----------------------------------------------------------------------------------------------


def _build(problem: Problem, dtype: np.dtype, slopes: bool) -> _Compiled:
    """Compile for these dtypes and numbers of axes."""
    T, i = from_dtype(dtype), types.int64
    arrays = [types.Array(from_dtype(x.dtype), x.ndim, "C", readonly=True) for x in problem.buffers]
    given = [i, i, i, i, *(x if x.ndim else x.dtype for x in arrays)]
    f = _function(problem.score_mod, dtype, T, given)
    tile: Any
    if not slopes:
        tile = _changing(f, T, _reader(arrays))
    elif problem.score_mod_grad is not None:
        tile = _with_given_slopes(f, _function(problem.score_mod_grad, dtype, T, given), T, _reader(arrays))
    else:
        tile = _with_slopes(f, _function(problem.score_mod, dtype, types.complex128, given), T, _reader(arrays))
    x = types.CPointer(T)
    signature = i(x, x, i, i, i, i, i, i, types.CPointer(i))
    dispatcher = numba.njit(signature, error_model="numpy", nogil=True, **ONLY_COMPILED)(tile)
    compiled: Any = dispatcher.overloads[signature.args]
    name = compiled.fndesc.llvm_func_name
    return _Compiled(compiled.library.get_pointer_to_function(name), compiled)


def _function(mod: Any, dtype: np.dtype, T: Any, given: list[Any]) -> Any:
    """The user's function for scores of `dtype` that it gets as T. It must return a number."""
    f = translated(mod, dtype)
    f.get_call_template((T, *given), {})  # compiles it, with its defaults
    (compiled,) = f.overloads.values()
    result = compiled.signature.return_type
    real = (types.Integer, types.Float)
    expected = (*real, types.Complex) if isinstance(T, types.Complex) else real
    if not isinstance(result, expected):
        raise TypeError(f"to Numba its result is {result}, which is no real number")
    return f


@intrinsic
def _get(typingctx: Any, pointer: Any, n: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.gep(args[0], [args[1]]), align=pointer.dtype.bitwidth // 8)

    return pointer.dtype(pointer, types.intp), emit


@intrinsic
def _put(typingctx: Any, pointer: Any, n: Any, x: Any) -> Any:
    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[2], builder.gep(args[0], [args[1]]), align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, pointer.dtype), emit


def _reader(arrays: list[Any]) -> Any:
    """The function that makes of the addresses and shapes of buffers a tuple of them; one without axes is a number."""
    results = types.Tuple([x if x.ndim else x.dtype for x in arrays])

    @intrinsic
    def read(typingctx: Any, numbers: Any) -> Any:
        def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            at, values = 0, []

            def next_number() -> Any:
                nonlocal at
                at += 1
                return builder.load(builder.gep(args[0], [ir.Constant(ir.IntType(64), at - 1)]))

            for x in arrays:
                element = context.get_data_type(x.dtype)
                data = builder.inttoptr(next_number(), element.as_pointer())
                if not x.ndim:
                    values.append(context.unpack_value(builder, x.dtype, data))
                    continue
                size = context.get_constant(types.intp, context.get_abi_sizeof(element))
                shape = [next_number() for _ in range(x.ndim)]
                strides = [size]
                for n in reversed(shape[1:]):
                    strides.insert(0, builder.mul(strides[0], n))
                array = make_array(x)(context, builder)
                populate_array(array, data, shape, strides, size, None)
                values.append(array._getvalue())
            return context.make_tuple(builder, results, values)

        return results(numbers), emit

    return read


def _changing(f: Any, T: Any, read: Any) -> Callable[..., int]:
    W = 2 * REGISTER_BITS // T.bitwidth

    def tile(scores: Any, slopes: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any, numbers: Any) -> int:
        buffers = read(numbers)
        for i in range(keys):
            for q in range(queries):
                _put(scores, i * W + q, T(f(_get(scores, i * W + q), b, h, t + q, j + i, *buffers)))
        return 0

    return tile


def _with_given_slopes(f: Any, g: Any, T: Any, read: Any) -> Callable[..., int]:
    W = 2 * REGISTER_BITS // T.bitwidth

    def tile(scores: Any, slopes: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any, numbers: Any) -> int:
        buffers = read(numbers)
        for i in range(keys):
            for q in range(queries):
                _put(slopes, i * W + q, T(g(_get(scores, i * W + q), b, h, t + q, j + i, *buffers)))
            for q in range(queries):
                _put(scores, i * W + q, T(f(_get(scores, i * W + q), b, h, t + q, j + i, *buffers)))
        return 0

    return tile


def _with_slopes(f: Any, g: Any, T: Any, read: Any) -> Callable[..., int]:
    """`g` is `f` for complex numbers."""
    W, per_step = 2 * REGISTER_BITS // T.bitwidth, 1 / STEP

    def tile(scores: Any, slopes: Any, b: Any, h: Any, t: Any, queries: Any, j: Any, keys: Any, numbers: Any) -> int:
        buffers = read(numbers)
        for i in range(keys):
            for q in range(queries):
                slope = g(complex(_get(scores, i * W + q), STEP), b, h, t + q, j + i, *buffers).imag * per_step
                _put(slopes, i * W + q, T(slope))
            for q in range(queries):
                _put(scores, i * W + q, T(f(_get(scores, i * W + q), b, h, t + q, j + i, *buffers)))
        return 0

    return tile
