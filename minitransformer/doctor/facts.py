"""What a report on this machine and installation says, as plain data that JSON can hold.

What cannot be found out is None, and `unknown` says why.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from minitransformer.kernels import FAMILIES, compiled, store
from minitransformer.memory import available_memory, total_memory
from minitransformer.threads import available_cores, blas_libraries, get_num_threads, numba_pool
from minitransformer.version import __version__

REQUIRED = ("numpy", "numba", "llvmlite", "safetensors", "tqdm", "threadpoolctl")
OPTIONAL = ("torch", "scipy", "matplotlib", "hypothesis", "pytest", "tbb", "numba-cuda", "cupy-cuda12x", "cupy-cuda13x")
# What the GPU needs, and the packages that are it.
_CUDA_PACKAGES = {"numba-cuda": ("numba-cuda",), "CuPy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}
_PREFIXES = ("OMP_", "OPENBLAS_", "NUMBA_", "MKL_")
_SIMD = (
    *("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16"),
    *("amx-tile", "neon", "fullfp16", "dotprod", "bf16", "sve", "sve2"),
)

Unknown = dict[str, str]  # dotted name of a fact -> why it is not known


def gather() -> dict[str, Any]:
    """Versions, processor, memory, libraries, threads, cache and GPU of this process, from where it runs now."""
    unknown: Unknown = {}
    # The variables first: libraries that are loaded on the way may set some.
    environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_PREFIXES)}
    return {
        "versions": {"minitransformer": __version__, "python": platform.python_version(), **_versions(unknown)},
        "platform": {"system": platform.platform(terse=True), "machine": platform.machine()},
        "processor": _processor(unknown),
        "memory": _memory(unknown),
        "disk": _disk(unknown),
        "blas": blas_libraries(),
        "threads": {"training": get_num_threads(), "numba": numba_pool()},
        "environment": environment,
        "cache": cache_facts(),
        "cuda": _cuda(),
        "unknown": unknown,
    }


def _versions(unknown: Unknown) -> dict[str, str | None]:
    """Of what we need, and of what is there besides; nothing is imported for that."""
    found: dict[str, str | None] = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found[name] = installed_version(name)
        except PackageNotFoundError:
            if name in REQUIRED:
                found[name] = None
                unknown[f"versions.{name}"] = "it is not installed, or without its metadata"
    return found


def _processor(unknown: Unknown) -> dict[str, Any]:
    triple, llvm_name, features = compiled.processor()
    name = _processor_name()
    if name is None:
        unknown["processor.name"] = "this system does not name it"
    return {
        "name": name,
        "llvm_name": llvm_name,
        "triple": triple,
        "simd": [feature for feature in _SIMD if feature in features],
        "cores_available": available_cores(),
        "cores_present": os.cpu_count(),
    }


def _processor_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _memory(unknown: Unknown) -> dict[str, int | None]:
    memory = {"total_bytes": total_memory(), "available_bytes": available_memory()}
    for name, value in memory.items():
        if value is None:
            unknown[f"memory.{name}"] = "this system does not say"
    return memory


def _disk(unknown: Unknown) -> dict[str, Any]:
    folder = Path.cwd()
    try:
        return {"folder": str(folder), "free_bytes": shutil.disk_usage(folder).free}
    except OSError as error:
        unknown["disk.free_bytes"] = f"{error.strerror}"
        return {"folder": str(folder), "free_bytes": None}


def cache_facts() -> dict[str, Any]:
    """The folder of the compiled kernels, what is wrong with it (or None), and what it holds for this version."""
    key = compiled.kernel_key()
    if key is None:
        problem: str | None = "the sources of the kernels cannot be read, or were edited since they were imported"
    else:
        problem = store.refusal(key)
    folder = store.cache_root()
    files = [] if problem or key is None else sorted((folder / key).glob("*.kernel"))
    if problem is None and key is not None and not os.access(folder / key, os.W_OK):
        problem = f"{folder / key} can only be read, so what is compiled is not kept. Make it writable"
    return {
        "folder": str(folder),
        "problem": problem,
        "kernels": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _cuda() -> dict[str, Any]:
    """The first GPU, the kernel families that run on it, and what is in the way, with the line that mends it."""
    found: dict[str, Any] = {
        **dict.fromkeys(("device", "capability", "driver", "problem", "install")),
        "families": [family for family, implementations in FAMILIES.items() if "cuda" in implementations],
    }
    found |= _gpu()
    missing = [name for name, packages in _CUDA_PACKAGES.items() if not any(map(_is_installed, packages))]
    extra = "cuda" if found["device"] is None or _takes_cuda_13(found) else "cuda12"
    install = f'pip install "minitransformer[{extra}]"'
    if found["device"] and int(found["driver"].partition(".")[0]) < 12:
        found["problem"] = f"its driver is for CUDA {found['driver']}, expected one of r525 or newer, for CUDA 12"
    elif missing:
        found["problem"] = found["problem"] or f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not installed"
        found["install"] = install
    elif extra == "cuda12" and _is_installed("cupy-cuda13x"):
        found["problem"] = "cupy-cuda13x needs a driver for CUDA 13 (r580) and compute capability 7.5"
        found["install"] = f"pip uninstall cupy-cuda13x && {install}"
    return found


def _is_installed(package: str) -> bool:
    try:
        installed_version(package)
    except PackageNotFoundError:
        return False
    return True


def _takes_cuda_13(gpu: dict[str, Any]) -> bool:
    numbers = (tuple(map(int, gpu[name].split("."))) for name in ("driver", "capability"))
    return all(number >= least for number, least in zip(numbers, ((13, 0), (7, 5)), strict=True))


def _gpu() -> dict[str, str]:
    """The first GPU, asked of NVIDIA's driver itself: that needs no package."""
    try:
        library = _driver_library()
    except OSError:
        return {"problem": "no driver of NVIDIA is installed"}
    number = ctypes.c_int()

    def got(function: str, *args: Any) -> int:
        error = getattr(library, function)(ctypes.byref(number), *args)
        return 0 if error else number.value

    version = got("cuDriverGetVersion")
    driver = {"driver": f"{version // 1000}.{version % 1000 // 10}"}
    if error := library.cuInit(0):
        return {**driver, "problem": f"the driver finds no GPU that can be used (error {error})"}
    if not got("cuDeviceGetCount"):
        return {**driver, "problem": "the driver finds no GPU"}
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGetName(name, len(name), 0)
    major, minor = (got("cuDeviceGetAttribute", attribute, 0) for attribute in (75, 76))  # of compute capability
    return {**driver, "device": name.value.decode(errors="replace"), "capability": f"{major}.{minor}"}


def _driver_library() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
