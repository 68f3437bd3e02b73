"""What a check of the self-test raises if it does not hold."""

from __future__ import annotations

from typing import Any

from minitransformer.errors import MiniTransformerError

REINSTALL = "Install again in a fresh environment: pip install --force-reinstall minitransformer numpy numba"


class CheckFailed(MiniTransformerError, RuntimeError):
    """A check of the self-test that did not hold."""


def expect(holds: Any, name: str, problem: str, fix: str) -> None:
    if not holds:
        raise CheckFailed(name, problem, fix)
