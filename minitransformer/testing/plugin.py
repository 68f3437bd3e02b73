"""What the pytest plugin does once it is asked to: the table of all gradchecks of a session."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from minitransformer.files import json_bytes, write_bytes
from minitransformer.gradients import GradcheckReport
from minitransformer.gradients.check import observers

_COLUMNS = ("test", "name", "method", "mode", "compared", "worst", "passed")


class GradcheckTable:
    """Collects the report of every gradcheck that runs in a session, and writes them to a file at its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.test = ""  # empty while fixtures of the session and modules are made
        self.rows: list[dict[str, Any]] = []

    def add(self, report: GradcheckReport) -> None:
        values = (self.test, report.name, report.method, report.mode, report.compared, report.worst, report.ok)
        self.rows.append(dict(zip(_COLUMNS, values, strict=True)))

    def pytest_sessionstart(self) -> None:
        observers.append(self.add)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid

    @pytest.hookimpl(tryfirst=True)  # the summary of the terminal comes with the last one
    def pytest_sessionfinish(self) -> None:
        observers.remove(self.add)
        self.test = ""
        if self.path.suffix == ".json":
            # JSON has no infinity
            rows = [{**row, "worst": row["worst"] if math.isfinite(row["worst"]) else None} for row in self.rows]
            data = json_bytes(str(self.path), {"gradchecks": rows}, indent=2)
        else:
            data = self.text().encode()
        write_bytes(self.path, data)

    def text(self) -> str:
        """The table: what was checked and how, and the worst error as a part of what was allowed."""
        cells = [_COLUMNS, *((*map(str, list(r.values())[:5]), f"{r['worst']:.3g}", _word(r)) for r in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in cells]
        return "\n".join([*lines, self.summary(), ""])

    def summary(self) -> str:
        failed = sum(not row["passed"] for row in self.rows)
        return f"gradchecks: {len(self.rows)}, of which {failed} failed"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(f"{self.summary()}; table in {self.path}")


def _word(row: dict[str, Any]) -> str:
    return "yes" if row["passed"] else "NO"
