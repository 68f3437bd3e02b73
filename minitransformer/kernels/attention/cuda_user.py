"""Users' `score_mod` on a GPU: compiled into the kernels, as one of their rules.

Whether Numba understands a function as Python does is found out on the host, by the code that `user_code` makes of
it. What does not pass is an error: nothing here would be served by the host unasked. Buffers are read as they are, so
an index beyond the end of one goes unseen.
"""

from __future__ import annotations

import cmath
import dis
import math
from types import ModuleType
from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import from_dtype

from minitransformer.errors import ConfigError
from minitransformer.kernels.attention.mods import STEP, cells_to_check, check_derivative, name_of
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.user_code import FAILURES, Refusal, in_one_line, tile_code
from minitransformer.kernels.attention.user_source import Unfit, key_of, rebuilt
from minitransformer.kernels.gpu import simulator
from minitransformer.kernels.gpu.arrays import contiguous, like, to_host

_SAMPLES = 64  # scores at which a derivative is compared with differences


class Mods:
    """A `score_mod`, its derivative if one is given, and the types of their buffers; equal if they compute the same."""

    def __init__(self, problem: Problem) -> None:
        self.score_mod, self.score_mod_grad = problem.score_mod, problem.score_mod_grad
        kinds = ((from_dtype(x.dtype), x.ndim) for x in problem.buffers)
        self.buffers = tuple(types.Array(T, ndim, "C", readonly=True) if ndim else T for T, ndim in kinds)
        self._key = key_of(self.score_mod), key_of(self.score_mod_grad), self.buffers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mods) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


_passed: set[Any] = set()


def mods_of(problem: Problem, q: Any, shape: tuple[int, ...], slopes: bool) -> tuple[Mods | None, tuple[Any, ...]]:
    """The functions of `problem`, for scores (B, H, T, S), and its buffers on the device of q.

    `ConfigError` if they cannot be compiled, `GradientError` if the derivative, which is needed if `slopes`, would be
    wrong, and whatever they raise themselves.
    """
    if problem.score_mod is None:
        return None, ()
    try:
        mods = Mods(problem)
        for mod in filter(None, (mods.score_mod, mods.score_mod_grad)):
            rebuilt(mod, _without_errors, {}, {})
        if (mods, q.dtype, slopes) not in _passed and 0 not in shape:
            _try(problem._replace(buffers=tuple(map(to_host, problem.buffers))), shape, q.dtype, slopes)
            _passed.add((mods, q.dtype, slopes))
    except Unfit as error:
        raise _refused(problem.score_mod, str(error)) from None
    return mods, tuple(contiguous(like(q, x)) if x.ndim else to_host(x).item() for x in problem.buffers)


def _without_errors(function: Any) -> Any:
    if any(i.opname == "RAISE_VARARGS" for i in dis.get_instructions(function)):
        raise Unfit("it raises errors, which nobody on a GPU can see")
    return function


def _try(problem: Problem, shape: tuple[int, ...], dtype: np.dtype, slopes: bool) -> None:
    code = tile_code(problem, shape, dtype, slopes)
    if isinstance(code, Refusal):
        raise _refused(problem.score_mod, code.reason)
    if slopes and problem.score_mod is not None and problem.score_mod_grad is None and code is not None:
        cells = tuple(axis[:_SAMPLES] for axis in cells_to_check(shape))
        scores = (4 * np.sin(np.arange(1.0, len(cells[0]) + 1))).astype(dtype)
        check_derivative(problem.score_mod, scores, cells, code.slopes_at, problem.buffers)


def _refused(mod: Any, reason: str) -> ConfigError:
    fix = (
        "Write it as plain arithmetic of single numbers, with arrays passed in buffers; if only its derivative cannot "
        "be compiled, give score_mod_grad; or move q, k and v to the CPU"
    )
    return ConfigError("flex_attention", f"{name_of(mod)} cannot be compiled for a GPU ({reason})", fix)


def change(cuda: Any, T: Any, mods: Mods) -> Any:
    """The device function (score, b, h, t, key, buffers) -> the changed score."""
    score_mod, integer = _compiled(cuda, mods.score_mod, math, T, mods), np.int64

    @cuda.jit(device=True, forceinline=True)
    def changed(x: Any, b: Any, h: Any, t: Any, key: Any, buffers: Any) -> Any:
        return T(score_mod(x, integer(b), integer(h), integer(t), integer(key), *buffers))

    return changed


def derivative(cuda: Any, T: Any, mods: Mods) -> Any:
    """The device function (score, b, h, t, key, buffers) -> the derivative of the changed score."""
    integer, step, per_step = np.int64, STEP, 1 / STEP
    if mods.score_mod_grad is not None:
        given = _compiled(cuda, mods.score_mod_grad, math, T, mods)

        @cuda.jit(device=True, forceinline=True)
        def slope(x: Any, b: Any, h: Any, t: Any, key: Any, buffers: Any) -> Any:
            return T(given(x, integer(b), integer(h), integer(t), integer(key), *buffers))

        return slope
    score_mod = _compiled(cuda, mods.score_mod, cmath, types.complex128, mods)

    @cuda.jit(device=True, forceinline=True)
    def complex_step(x: Any, b: Any, h: Any, t: Any, key: Any, buffers: Any) -> Any:
        stepped = score_mod(complex(x, step), integer(b), integer(h), integer(t), integer(key), *buffers)
        return T(stepped.imag * per_step)

    return complex_step


def _compiled(cuda: Any, mod: Any, library: ModuleType, T: Any, mods: Mods) -> Any:
    """`mod` of scores of type T as a device function; what numba.cuda lacks of NumPy is taken from math or cmath."""
    if cuda is simulator.cuda:
        return mod
    device = cuda.jit(device=True)
    exchanged: dict[Any, Any] = {np.exp: library.exp, np.sqrt: library.sqrt}
    exchanged |= {np.where: device(_where), np.clip: device(_clip)}
    numpy = ModuleType("numpy")
    vars(numpy).update({**vars(np), **{old.__name__: new for old, new in exchanged.items()}})
    function = rebuilt(mod, device, {np: numpy}, exchanged)
    try:
        function.compile_device((T, *[types.int64] * 4, *mods.buffers))
    except FAILURES as error:
        raise _refused(mod, in_one_line(error)) from error
    return function


def _where(condition: Any, x: Any, y: Any) -> Any:
    return x if condition else y


def _clip(x: Any, low: Any, high: Any) -> Any:
    return np.minimum(np.maximum(x, low), high)
