"""A compiled kernel beside its reference: errors, NaN and infinity, manners, layouts, machine code."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from minitransformer.errors import DTypeError, ShapeError
from minitransformer.kernels.compiled import all_kernels


def is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"


def cast(args: tuple[Any, ...], dtype: Any) -> list[Any]:
    """Copies, floats in `dtype`. They are of float32 values, so every dtype sees the same numbers."""
    return [
        x.astype(np.float32).astype(dtype) if is_float(x) else np.copy(x) if isinstance(x, np.ndarray) else x
        for x in args
    ]


def outcome(function: Any, args: list[Any]) -> list[np.ndarray]:
    """What it returns, and what it made of the arrays of floats that it was given."""
    with np.errstate(all="ignore"):
        result = function(*args)
    results = result if isinstance(result, tuple) else (result,)
    return [*(np.asarray(r) for r in results), *(x for x in args if is_float(x))]


def check_errors(cpu: ModuleType, reference: ModuleType, name: str, args: tuple[Any, ...]) -> None:
    """No further from the exact result than twice the reference is, and some roundings."""
    exact = outcome(getattr(reference, name), cast(args, np.longdouble))
    for dtype in (np.float32, np.float64):
        ours, plain = (outcome(getattr(module, name), cast(args, dtype)) for module in (cpu, reference))
        again = outcome(getattr(cpu, name), cast(args, dtype))
        for nth, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
            where = f"{name}, {np.dtype(dtype)}, result {nth}"
            assert (a.shape, a.dtype) == (b.shape, b.dtype), where
            assert a.tobytes() == again[nth].tobytes(), f"{where}: other bits the second time"
            if a.dtype.kind != "f":
                np.testing.assert_array_equal(a, b, err_msg=where)
                continue
            scale = max(float(abs(c).max(initial=0)), 1.0)
            allowed = 2 * abs(b - c).max(initial=0) + 16 * np.finfo(dtype).eps * scale
            assert abs(a - c).max(initial=0) <= allowed, where


def check_special(cpu: ModuleType, reference: ModuleType, name: str, args: tuple[Any, ...]) -> None:
    """NaN and infinities where the reference has them."""
    for dtype in (np.float32, np.float64):
        ours, plain = (outcome(getattr(module, name), cast(args, dtype)) for module in (cpu, reference))
        for nth, (a, b) in enumerate(zip(ours, plain, strict=True)):
            if a.dtype.kind == "f":
                where = f"{name}, {np.dtype(dtype)}, result {nth}"
                np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=where)
                np.testing.assert_array_equal(a[np.isinf(a)], b[np.isinf(a)], err_msg=where)
                assert np.array_equal(np.isinf(a), np.isinf(b)), where


def check_layouts(cpu: ModuleType, name: str, args: tuple[Any, ...], written: tuple[int, ...]) -> None:
    """Arrays in any layout, and locked, give the same bits; what is written to must be as a kernel writes it."""
    function = getattr(cpu, name)
    expected = outcome(function, cast(args, np.float32))
    for layout in (_gaps, _locked, _columns, _unaligned):
        given = [
            x if i in written or not isinstance(x, np.ndarray) else layout(x)
            for i, x in enumerate(cast(args, np.float32))
        ]
        before = [np.copy(x) for i, x in enumerate(given) if is_float(x) and i not in written]
        got = outcome(function, given)
        for a, b in zip(got, expected, strict=True):
            assert a.tobytes() == b.tobytes(), f"{name}, {layout.__name__}"
        for x, y in zip((x for i, x in enumerate(given) if is_float(x) and i not in written), before, strict=True):
            assert x.tobytes() == y.tobytes(), f"{name} writes into what it was given"
    for i in written:
        for layout in (_gaps, _locked, _unaligned):
            given = cast(args, np.float32)
            given[i] = layout(given[i])
            with pytest.raises(ShapeError, match=rf"kernels.{name}: an array to write to has strides .* or is locked"):
                function(*given)


def check_refusals(cpu: ModuleType, name: str, args: tuple[Any, ...]) -> None:
    """Shapes that do not fit, and dtypes without a kernel."""
    function = getattr(cpu, name)
    given = cast(args, np.float32)
    arrays = [i for i, x in enumerate(given) if isinstance(x, np.ndarray)]
    for i in arrays if len(arrays) > 1 else ():
        wrong = list(given)
        wrong[i] = np.tile(given[i], [2] * given[i].ndim)
        with pytest.raises(ShapeError, match=rf"kernels.{name}: got arrays of shapes .*, expected "):
            function(*wrong)
    with pytest.raises(DTypeError, match=r"kernels\..*: got .*float16"):
        function(*(x.astype(np.float16) if is_float(x) else x for x in given))


def check_mixed(cpu: ModuleType, reference: ModuleType, name: str, args: tuple[Any, ...]) -> None:
    """Floats of two dtypes are the reference's."""
    floats = [i for i, x in enumerate(args) if is_float(x)]
    for i in floats[1:]:
        mixed = [cast(args, np.float32) for _ in range(2)]
        for given in mixed:
            given[i] = given[i].astype(np.float64)
        ours, plain = outcome(getattr(cpu, name), mixed[0]), outcome(getattr(reference, name), mixed[1])
        assert [(a.dtype, a.tobytes()) for a in ours] == [(b.dtype, b.tobytes()) for b in plain], name


def _gaps(x: np.ndarray) -> np.ndarray:
    wide = np.zeros((*x.shape, 3), x.dtype)
    wide[..., 1] = x
    return wide[..., 1]


def _locked(x: np.ndarray) -> np.ndarray:
    copy = x.copy()
    copy.flags.writeable = False
    return copy


def _columns(x: np.ndarray) -> np.ndarray:
    return np.asfortranarray(x)


def _unaligned(x: np.ndarray) -> np.ndarray:
    odd = np.zeros(x.nbytes + 1, np.uint8)[1:]
    out: np.ndarray = odd.view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def assembly(family: str, dtype: str = "float32") -> list[tuple[str, str]]:
    """Every kernel of a family with its code for a dtype, be that compiled here or loaded from disk."""
    found = []
    for job in all_kernels():
        if job.name.startswith(f"{family}.") and job.name.endswith(f" {dtype}"):
            job.run()
            library = job.dispatcher.overloads[job.signature.args].library
            # Numba's `inspect_asm` is for what was compiled here. A clone, because making code changes a module.
            module = library._get_module_for_linking().clone()
            found.append((job.name.split()[0], str(library._codegen._tm.emit_assembly(module))))
    return found


def machine_code(family: str) -> dict[str, tuple[int, list[str]]]:
    """By kernel: how many packed instructions there are, and which functions of the C library are named."""
    packed = re.compile(r"\bv?(?:div|mul|add|sub|max|fn?m(?:add|sub)[0-9]+|cmp[a-z_]*)ps\b")
    library = re.compile(r"\b(?:exp|exp2|expm1|tanh|erf|erfc|pow|fma|fmax)f?\b")
    return {name: (len(packed.findall(code)), library.findall(code)) for name, code in assembly(family)}
