"""No kernel reads or writes outside its arrays: every op and kernel on memory that ends at an unreadable page.

A read too far ends the whole process with SIGSEGV, and faulthandler names the test.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checker import backward, forward
from gradient_table import TABLE
from guarded import CONTIGUOUS, LAYOUTS, Layout, guarded, needs_guard_pages, unreadable
from hypothesis import given
from hypothesis import strategies as st
from kernel_calls import CALLS as KERNEL_CALLS

import minitransformer as mt
from minitransformer import kernels
from minitransformer.data.batches import TokenDataset
from minitransformer.errors import RangeError
from minitransformer.kernels.decode.step import Weights
from minitransformer.testing.calls import CALLS

pytestmark = needs_guard_pages

# Their sums may be added up in another order where rows lie elsewhere: by BLAS, einsum, or NumPy's own sums.
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def same(got: Any, expected: Any, where: str, *, exact: bool) -> None:
    """Equal in shape, dtype and every bit, or to the rounding of the coarser sums."""
    if not isinstance(expected, np.ndarray):
        assert got == expected or (got != got and expected != expected), where
        return
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), where
    if exact or expected.dtype.kind != "f":
        assert got.tobytes() == expected.tobytes(), where
    else:
        tolerance = 1e-12 if expected.dtype == np.float64 else 2e-5
        scale = np.max(abs(expected), where=np.isfinite(expected), initial=1.0)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale, err_msg=where)


def both_ways(name: str, inputs: Any, static: dict[str, Any], layout: Layout | None, writable: bool = False) -> Any:
    """Outputs and gradients of an op; in guarded memory what goes in, what is saved, and the upstream gradients."""

    def put(value: Any) -> Any:
        return value if layout is None else guarded(value, layout, writable)

    with np.errstate(all="ignore"):  # as autograd calls them
        outs, saved = forward(name, put(inputs), put(static))
        rng = np.random.default_rng(7)
        douts = tuple(np.asarray(rng.standard_normal(o.shape).astype(o.dtype)) for o in outs)
        return [*outs, *backward(name, put(douts), put(saved))]


def check_op(name: str, inputs: tuple[Any, ...], static: dict[str, Any], layout: Layout, where: str) -> None:
    for dtype in (np.float64, np.float32):
        cast = tuple(x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in inputs)
        expected = both_ways(name, cast, static, None)
        for writable in (False, True):
            got = both_ways(name, cast, static, layout, writable)
            for nth, (a, b) in enumerate(zip(got, expected, strict=True)):
                same(a, b, f"{where}: result {nth}", exact=layout in CONTIGUOUS.values())


@layouts
@pytest.mark.parametrize("name", TABLE)
def test_every_op_at_the_calls_of_the_gradient_table(name: str, layout: Layout) -> None:
    for nth, line in enumerate(TABLE[name]):
        check_op(name, line.inputs, line.static, layout, f"{name}, case {nth}")


@pytest.mark.parametrize("name", CALLS)
@given(st.integers(0, 2**32 - 1), st.sampled_from(list(LAYOUTS)))
def test_every_op_at_drawn_calls(name: str, seed: int, layout: str) -> None:
    inputs, static = CALLS[name](np.random.default_rng(seed))
    check_op(name, tuple(inputs), static, LAYOUTS[layout], f"{name}, seed {seed}, {layout}")


# --- kernels, called directly ----------------------------------------------------------------------------

KERNELS = [
    import_module(f"minitransformer.kernels.{f}.{name}")
    for f in kernels.FAMILIES
    for name in kernels.host_implementations(f)
]
kernel_modules = pytest.mark.parametrize(
    "kernel", KERNELS, ids=lambda m: m.__name__.removeprefix("minitransformer.kernels.")
)


def functions(kernel: ModuleType) -> dict[str, Any]:
    """What an implementation offers: what it lists, or its own public functions."""
    own = [
        name
        for name, value in vars(kernel).items()
        if callable(value) and not name.startswith("_") and not isinstance(value, type)
        if value.__module__ == kernel.__name__
    ]
    return {name: getattr(kernel, name) for name in getattr(kernel, "__all__", own)}


def calls_of(kernel: ModuleType) -> dict[str, Any]:
    return KERNEL_CALLS[kernel.__name__.split(".")[2]]


@kernel_modules
def test_every_kernel_has_calls(kernel: ModuleType) -> None:
    assert functions(kernel).keys() == calls_of(kernel).keys()


@pytest.mark.parametrize("layout", CONTIGUOUS.values(), ids=CONTIGUOUS)
@kernel_modules
def test_every_kernel(kernel: ModuleType, layout: Layout) -> None:
    """What a function only reads lies in memory that cannot be written."""
    for name, function in functions(kernel).items():
        for dtype in (np.float64, np.float32):
            calls = calls_of(kernel)[name](np.random.default_rng(3), dtype)
            after = deepcopy(calls)
            with np.errstate(all="ignore"):
                expected = [as_tuple(function(*args, **settings)) for args, settings in after]
                written = {
                    position
                    for (args, _), (changed, _) in zip(calls, after, strict=True)
                    for position, (x, y) in enumerate(zip(args, changed, strict=True))
                    if isinstance(x, np.ndarray) and x.tobytes() != y.tobytes()
                }
                for nth, (args, settings) in enumerate(calls):
                    there = [guarded(x, layout, position in written) for position, x in enumerate(args)]
                    got = as_tuple(function(*there, **settings))
                    for a, b in zip((*got, *there), (*expected[nth], *after[nth][0]), strict=True):
                        if not isinstance(b, (tuple, Weights)):  # those are read, and hold more arrays
                            same(a, b, f"{kernel.__name__}.{name}, call {nth}", exact=True)


def as_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("layout", CONTIGUOUS.values(), ids=CONTIGUOUS)
@pytest.mark.parametrize("size", [(1,), (0, 3), (3, 5), (40000,)])
@pytest.mark.parametrize("make", [mt.optim.SGD, mt.optim.Adam, mt.optim.AdamW])
def test_optimizers_over_flat_buffers(
    make: Any, size: tuple[int, ...], layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients that cannot be written, and every buffer that NumPy makes inside in guarded memory."""

    def trained(put: Layout) -> list[np.ndarray]:
        parameters = [mt.Parameter(np.arange(1.0, 1 + np.prod(shape)).reshape(shape)) for shape in (size, (2, 2))]
        with monkeypatch.context() as patch:
            patch.setattr(np, "empty", lambda shape, dtype: put(np.zeros(shape, dtype), True))
            patch.setattr(np, "zeros_like", lambda x: put(np.zeros(x.shape, x.dtype), True))
            optimizer = make(parameters, 0.1, weight_decay=0.1)
            for step in range(3):
                optimizer.step(put(np.cos(np.arange(optimizer.flat.data.size) + step), False))
        return [*(p.data for p in parameters), *optimizer.state()[0].values()]

    for a, b in zip(trained(layout), trained(lambda x, writable: x), strict=True):
        same(a, b, make.__name__, exact=True)


# --- indices ---------------------------------------------------------------------------------------------

V = 9  # rows of 1,024 numbers


@layouts
def test_ids_at_the_edges(layout: Layout) -> None:
    x = np.random.default_rng(0).standard_normal((V, 1024))
    ids = np.array([[0, V - 1, 0], [V - 1, 1, V - 2]])
    check_op("embedding", (x, ids), {}, layout, "embedding")
    check_op("cross_entropy", (x[:6], np.array([0, 1023, 0, 1023, -100, 1])), {}, layout, "cross_entropy")
    for index in (ids, np.array([-1, 0, -V]), (np.array([0, V - 1]), np.array([-1, 0])), V - 1, -V):
        check_op("getitem", (x,), {"index": index}, layout, f"getitem {index}")


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.int16])
@pytest.mark.parametrize("bad", [-1, V, -V - 1, 2**15 - 1])
def test_ids_beyond_the_edges_are_refused_before_anything_is_read(bad: int, dtype: Any) -> None:
    table, ids = unreadable((V, 1024), np.float32), np.array([0, bad, 1], dtype)
    with pytest.raises(RangeError):
        mt.functional.embedding(ids, mt.Tensor(table))
    with pytest.raises(RangeError):
        mt.functional.cross_entropy(mt.Tensor(unreadable((3, V), np.float32)), ids)
    if bad != -1:
        table = LAYOUTS["ends at a guard"](np.zeros((V, 1024)), False)  # NumPy refuses an index when it comes to it
        with pytest.raises(RangeError):
            mt.Tensor(table)[ids]


@pytest.mark.parametrize("layout", CONTIGUOUS.values(), ids=CONTIGUOUS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_tokens(layout: Layout, dtype: Any, tmp_path: Path) -> None:
    """Windows up to the last token, of an array and of a file that fills its last page."""
    tokens = np.random.default_rng(0).integers(0, 200, 4096).astype(dtype)
    tokens.tofile(tmp_path / "tokens")
    for block_size in (1, 5, 4095):
        plain = TokenDataset(tokens, block_size)
        for there in (layout(tokens, False), np.memmap(tmp_path / "tokens", dtype, mode="r")):
            dataset = TokenDataset(there, block_size)
            batches = [[d.batch(1, 2, 600), *d.sequential(7)] for d in (dataset, plain)]
            for a, b in zip(*batches, strict=True):
                for name in b:
                    same(a[name], b[name], name, exact=True)


# --- the guard itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "dies"),
    [
        ("end[-1] + start[0]", False),
        ("as_strided(end, (6,))[5]", True),
        ("as_strided(start, (2,), (-8,))[1]", True),
        ("as_strided(end, (1,), writeable=True)[0]", False),
        ("ctypes.memset(end.ctypes.data, 0, 1)", True),
        ("ctypes.memset(mine.ctypes.data, 0, 40)", False),
        ("unreadable((1,), float)[0]", True),
        ("as_strided(guarded.LAYOUTS['backwards, begins after a guard'](x, False), (6,))[5]", True),
    ],
)
def test_the_guard(access: str, dies: bool) -> None:
    program = f"""
import ctypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
import guarded
from guarded import unreadable
x = np.arange(5.0)
end, mine = (guarded.LAYOUTS["ends at a guard"](x, writable) for writable in (False, True))
start = guarded.LAYOUTS["begins after a guard"](x, False)
{access}
print("alive")
"""
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    expected = (-signal.SIGSEGV, "") if dies else (0, "alive\n")
    assert (child.returncode, child.stdout) == expected, child.stderr
