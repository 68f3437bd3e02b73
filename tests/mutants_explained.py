"""Mutants that no test can kill, because they change nothing that is promised: (file, before, after) -> why."""

from __future__ import annotations

ROWS = "rows are (N, C), whose last axis is axis 1"

EXPLAINED: dict[tuple[str, str, str], str] = {}
