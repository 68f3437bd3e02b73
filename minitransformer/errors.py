"""The error types and their one message form: `op: what is wrong, expected, got. What to do.`

Every error names the operation that refused, what it was given beside what it expected, and the way
out. Each type also derives from the built-in exception a Python programmer would try to catch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType


class MiniTransformerError(Exception):
    """Base of all errors raised on purpose by this package.

    `op` is the operation or object that refused, `problem` what is wrong (expected and got
    included), `fix` one sentence that says what to do.
    """

    def __init__(self, op: str, problem: str, fix: str) -> None:
        super().__init__(op, problem, fix)
        self.op, self.problem, self.fix = op, problem, fix

    def __str__(self) -> str:
        # A command to copy stands alone: a period would become part of it.
        end = "" if self.fix.endswith((".", "?", "!")) or self.fix.startswith("Run: ") else "."
        return f"{self.op}: {self.problem}. {self.fix}{end}"


class ShapeError(MiniTransformerError, ValueError):
    """Shapes that do not fit each other."""


class DTypeError(MiniTransformerError, TypeError):
    """An array or argument of the wrong kind."""


class DeviceError(MiniTransformerError, ValueError):
    """Arrays on different devices, or a device that is not there."""


class MaskError(MiniTransformerError, ValueError):
    """A mask whose meaning is ambiguous or reversed."""


class RangeError(MiniTransformerError, IndexError):
    """An index, token id or length out of range."""


class ConfigError(MiniTransformerError, ValueError):
    """A setting that makes no sense, alone or with the others."""


class GradientError(MiniTransformerError, RuntimeError):
    """A backward pass that cannot be made, or would be wrong."""


class NonFiniteError(MiniTransformerError, ArithmeticError):
    """A loss, gradient or parameter that is NaN or infinite."""


class DataError(MiniTransformerError, ValueError):
    """A corpus, file or text that cannot be used."""


class CheckpointError(MiniTransformerError, ValueError):
    """A checkpoint or run folder that cannot be read, written or continued."""


class AllocationError(MiniTransformerError, MemoryError):
    """An array larger than the memory that can be had."""


class MissingExtraError(MiniTransformerError, ImportError):
    """An optional dependency that is not installed."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise `MissingExtraError` that names the pip line of its extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            purpose,
            f"needs the package {module!r}, which is not installed",
            f'Run: pip install "minitransformer[{extra}]"',
        ) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint `Did you mean 'x'?`, or the sorted list of known names if none is close."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."
