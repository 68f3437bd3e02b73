"""The programs in examples/ run, are short, and leave nothing behind."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("program", EXAMPLES, ids=lambda path: path.stem)
def test_smoke(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(program.read_text(encoding="utf-8").splitlines()) < 100
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [program.name, "--smoke"])
    runpy.run_path(str(program), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == []
