"""Every kernel for a GPU compiles without one, in the registers and shared memory that a GPU has."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from numba import float32, int64

from minitransformer import kernels
from minitransformer.errors import MissingExtraError
from minitransformer.kernels import FAMILIES
from minitransformer.kernels.gpu.kernel import Kernel
from minitransformer.kernels.gpu.resources import Resources, compile_kernel

needs_compilers = pytest.mark.cuda
STATIC_SHARED = 48 * 1024 - 1024  # what a kernel may declare, less what the driver may take for itself
REGISTERS = 64 * 1024  # of a multiprocessor: a block that wants more cannot be launched


@cache
def kernels_of(family: str) -> dict[str, Kernel]:
    """By name, each kernel once: configurations of other names may be the same."""
    implementation = import_module(f"minitransformer.kernels.{family}.cuda")
    distinct: dict[int, tuple[str, Kernel]] = {}
    for name, kernel in getattr(implementation, "configurations", lambda: ())():
        distinct.setdefault(id(kernel), (name, kernel))
    return dict(distinct.values())


def families() -> list[str]:
    return [family for family, names in FAMILIES.items() if "cuda" in names]


def cases() -> Iterator[Any]:
    """All of them; of those that exist for many widths, and take long, one width in float32 if not thorough."""
    for family in families():
        for name in kernels_of(family):
            quick = "width" not in name or "width 64 float32" in name
            yield pytest.param(family, name, id=f"{family}: {name}", marks=[] if quick else [pytest.mark.thorough])


def check(kernel: Kernel, capability: tuple[int, int]) -> Resources:
    used = compile_kernel(kernel, capability)
    assert (used.spilled, used.stack) == (0, 0)
    assert used.shared <= STATIC_SHARED
    assert 0 < used.registers <= kernel.registers
    warps = -(-kernel.threads // 32)
    assert kernel.threads <= 1024 and warps * 32 * (-(-used.registers // 8) * 8) <= REGISTERS
    return used


def wide_share(ptx: str) -> float:
    """Of the bytes of floats that loops of a product load from shared memory, those in loads of 16 bytes."""
    loaded = wide = 0
    for block in re.split(r"^\$L\w+:|\bbra\b.*$", ptx, flags=re.M):  # code without a jump
        if len(re.findall(r"\bfma\.rn\.f\d\d\b", block)) >= 32:
            for vector, bits in re.findall(r"\bld\.shared(?:\.v(\d))?\.f(\d\d)\b", block):
                size = int(vector or 1) * int(bits) // 8
                loaded += size
                wide += size if size == 16 else 0
    return wide / loaded if loaded else 0.0


@needs_compilers
@pytest.mark.parametrize(("family", "name"), list(cases()))
def test_every_kernel_fits_a_hopper(family: str, name: str) -> None:
    used = check(kernels_of(family)[name], (9, 0))
    if "width" in name and "width 16" not in name:  # so narrow a tile has no 16 bytes for each thread
        assert wide_share(used.ptx) > 0.6


@needs_compilers
@pytest.mark.parametrize("family", families())
def test_an_ampere_too(family: str) -> None:
    for kernel in list(kernels_of(family).values())[:2]:
        check(kernel, (8, 0))


@pytest.mark.parametrize("family", families())
def test_every_file_that_makes_kernels_names_them(family: str) -> None:
    files = list((Path(kernels.__file__).parent / family).glob("cuda*.py"))
    makes = [file for file in files if re.search(r"\bKernel\(", file.read_text(encoding="utf-8"))]
    assert bool(makes) == bool(kernels_of(family))


# --- the gate itself -------------------------------------------------------------------------------------


def test_wide_loads_are_told_from_others() -> None:
    fma, jump = "fma.rn.f32 %f1, %f2, %f3, %f1;\n" * 32, "@%p1 bra $L__BB0_2;\n"
    wide, wide64, pair, one = (f"ld.shared.{kind} {{%f4}}, [%r1];\n" for kind in ("v4.f32", "v2.f64", "v2.f32", "f32"))
    assert wide_share(fma + 2 * wide) == wide_share(fma + 2 * wide64) == 1
    assert wide_share(fma + wide + pair + 2 * one) == 0.5
    assert wide_share(fma + one + jump + 9 * wide + "$L__BB0_2:\n" + wide) == 0  # those are of no product
    assert wide_share(fma + jump + wide) == 0


def greedy(cuda: Any) -> Any:
    def kernel(x: Any, out: Any, n: Any) -> None:
        own = cuda.local.array(64, float32)
        for i in range(n):
            own[i] = x[i]
        for i in range(n):
            out[i] = own[n - i]

    return kernel


def spilling(cuda: Any) -> Any:
    def kernel(x: Any, out: Any, n: Any) -> None:
        a, b, c, d = x[0], x[1], x[2], x[3]
        e, f, g, h = x[4], x[5], x[6], x[7]
        p, q, r, s = x[8], x[9], x[10], x[11]
        t, u, v, w = x[12], x[13], x[14], x[15]
        for i in range(n):
            a, b, c, d = b * a + x[i], c * b + x[i], d * c + x[i], e * d + x[i]
            e, f, g, h = f * e + x[i], g * f + x[i], h * g + x[i], p * h + x[i]
            p, q, r, s = q * p + x[i], r * q + x[i], s * r + x[i], t * s + x[i]
            t, u, v, w = u * t + x[i], v * u + x[i], w * v + x[i], a * w + x[i]
        out[0] = a + b + c + d + e + f + g + h + p + q + r + s + t + u + v + w

    return kernel


def roomy(cuda: Any) -> Any:
    def kernel(x: Any, out: Any, n: Any) -> None:
        tile = cuda.shared.array(12 * 1024, float32)
        tile[n] = x[n]
        cuda.syncthreads()
        out[n] = tile[n + 1]

    return kernel


@needs_compilers
@pytest.mark.parametrize(
    ("build", "registers", "complaint"),
    [(greedy, 255, r"\(0, 256\)"), (spilling, 16, r"== \(0, 0\)"), (roomy, 255, "49152 <= 48128")],
)
def test_what_does_not_fit_is_found(build: Any, registers: int, complaint: str) -> None:
    kernel = Kernel(build, (float32[::1], float32[::1], int64), 32, registers)
    with pytest.raises(AssertionError, match=complaint):
        check(kernel, (9, 0))


def test_without_compilers_the_error_has_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    with pytest.raises(MissingExtraError, match=r'not installed\. Run: pip install "minitransformer\[cuda\]"$'):
        compile_kernel(Kernel(greedy, (float32[::1], float32[::1], int64), 32))
