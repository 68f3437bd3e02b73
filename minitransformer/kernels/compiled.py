"""The one way to compile a kernel: Numba, with named types, once, and kept on disk in a folder of our own.

    @kernel(lambda T: float64(T[::1]))
    def sum_of_squares(x): ...

serves contiguous vectors of float32 and of float64 and refuses everything else, so that a call never
compiles by surprise. Kernels are module-level functions of this folder; what they call is either another
kernel, or a plain `numba.njit` function of this folder, which is compiled into them.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core import config, sigutils
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from minitransformer.errors import DTypeError
from minitransformer.kernels import FAMILIES, announcers
from minitransformer.kernels.store import folder_of, key_of, read_checked, write_checked

DTYPES = (numba.float32, numba.float64)

_PACKAGE = __name__.rpartition(".")[0]
# Settings of Numba that change the code it makes.
_OPTIONS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")

_LLVMLITE = version("llvmlite")

_kernels: list[Any] = []  # every dispatcher made here


def kernel(signature: Callable[[Any], Any], fastmath: frozenset[str] = frozenset()) -> Callable[[Any], Any]:
    """Compile the decorated function with `signature(T)` for T in `DTYPES`, each at the first call that needs it.

    No lock of Python's is held while it runs (nogil), and division follows NumPy. `fastmath` names LLVM's
    flags, none by default; those that forbid NaN or infinity have no place here. Arguments must have the
    types of the signature exactly, else `DTypeError`: callers normalise their arrays.
    """
    signatures = tuple(signature(dtype) for dtype in DTYPES)

    def compiled(function: Any) -> Any:
        if function.__closure__ or not function.__module__.startswith(f"{_PACKAGE}."):
            raise AssertionError(f"{function.__qualname__} is no module-level function of {_PACKAGE}")
        dispatcher: Any = numba.njit(nogil=True, error_model="numpy", fastmath=set(fastmath))(function)
        if hasattr(dispatcher, "_cache"):  # under NUMBA_DISABLE_JIT it is the plain function
            dispatcher._cache = _KernelCache(function, signatures)
            _kernels.append(dispatcher)
        return dispatcher

    return compiled


class _KernelCache(_Cache):
    """What Numba asks for a compiled function before it compiles, and hands one to afterwards."""

    def __init__(self, function: Any, signatures: tuple[Any, ...]) -> None:
        self.name = f"{function.__module__.removeprefix(f'{_PACKAGE}.')}.{function.__name__}"
        self.signatures = signatures

    @property
    def cache_path(self) -> str | None:
        folder = kernel_folder()
        return None if folder is None else str(folder)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        self._refuse_other_types(sig)
        file = self._file(sig)
        data = None if file is None else read_checked(file)
        if data is None:
            for announce in announcers:
                announce(self.name)
            return None
        target_context.refresh()
        # A pickle, but one that this user wrote in a folder closed to all others: see store.py.
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, sig: Any, data: Any) -> None:
        file = self._file(sig)
        # Addresses in this process mean nothing to another.
        if file is not None and not data.lifted and not data.library.has_dynamic_globals:
            write_checked(file, dumps(data._reduce()))

    def enable(self) -> None:
        """Always on."""

    def disable(self) -> None:
        """Always on."""

    def flush(self) -> None:
        """Nothing here is ever stale."""

    def _refuse_other_types(self, sig: Any) -> None:
        args, _ = sigutils.normalize_signature(sig)
        if not any(args == served.args for served in self.signatures):
            expected = " or ".join(", ".join(map(str, served.args)) for served in self.signatures)
            raise DTypeError(
                f"kernels.{self.name}",
                f"got {', '.join(map(str, args))}, expected {expected}",
                "Normalise the arguments before the call",
            )

    def _file(self, sig: Any) -> Path | None:
        folder = kernel_folder()
        args, _ = sigutils.normalize_signature(sig)
        types = hashlib.sha256(str(args).encode()).hexdigest()[:16]
        return None if folder is None else folder / f"{self.name}-{types}.kernel"


def processor() -> tuple[str, str, list[str]]:
    """What the compiler knows of this machine: its triple, the processor's name in LLVM, and its features."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, sorted(f[1:] for f in features.split(",") if f.startswith("+"))


def kernel_key() -> str | None:
    """The key of kernels of these sources, versions, options and processor; None if the sources have changed."""
    return key_of(
        [
            f"numba {numba.__version__} llvmlite {_LLVMLITE} numpy {np.__version__} python {sys.version}",
            *map(str, processor()),
            *(f"{name} {getattr(config, name)}" for name in _OPTIONS),
        ]
    )


def kernel_folder() -> Path | None:
    """Where those kernels are kept; None if nowhere."""
    key = kernel_key()
    return None if key is None else folder_of(key)


class Job(NamedTuple):
    """One kernel for one dtype."""

    dispatcher: Any
    signature: Any

    @property
    def name(self) -> str:
        """Family, module, function and dtype: `optimizer.loops.adam float32`."""
        dtype = DTYPES[self.dispatcher._cache.signatures.index(self.signature)]
        return f"{self.dispatcher._cache.name} {dtype}"

    def run(self) -> bool:
        """Have it ready to be called; whether it had to be compiled for that."""
        before = sum(self.dispatcher.stats.cache_misses.values())
        self.dispatcher.compile(self.signature)
        return sum(self.dispatcher.stats.cache_misses.values()) > before


def all_kernels() -> Iterator[Job]:
    """Every kernel of every family, for every dtype."""
    for family, implementations in FAMILIES.items():
        if "cpu" in implementations:
            import_module(f"{_PACKAGE}.{family}.cpu")
    for dispatcher in _kernels:
        for signature in dispatcher._cache.signatures:
            yield Job(dispatcher, signature)
