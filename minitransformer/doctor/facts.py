"""What a report on this machine and installation says, as plain data that JSON can hold.

What cannot be found out is None, and `unknown` says why.
"""

from __future__ import annotations

import os
import platform
import shutil
from importlib import import_module
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
INSTALL_CUDA = 'pip install "numba-cuda[cu13]"'
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
    """The GPU that numba-cuda finds, and the kernel families that would use it; or what is in the way."""
    found: dict[str, Any] = {
        "device": None,
        "driver": None,
        "problem": None,
        "install": None,
        "families": [family for family, implementations in FAMILIES.items() if "cuda" in implementations],
    }
    try:
        installed_version("numba-cuda")
    except PackageNotFoundError:
        return {**found, "problem": "numba-cuda is not installed", "install": INSTALL_CUDA}
    try:
        cuda, driver = import_module("numba.cuda"), import_module("numba.cuda.cudadrv.driver")
    except ImportError as error:
        return {**found, "problem": f"numba-cuda cannot be imported ({error})", "install": INSTALL_CUDA}
    if not cuda.is_available():
        return {**found, "problem": f"numba-cuda finds no GPU ({cuda.cuda_error() or 'its driver names none'})"}
    try:
        device, version = cuda.get_current_device(), driver.driver.get_version()
    except driver.CudaDriverError as error:
        return {**found, "problem": f"the GPU does not answer ({error})"}
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    capability = ".".join(map(str, device.compute_capability))
    return {**found, "device": f"{name}, compute capability {capability}", "driver": ".".join(map(str, version))}
