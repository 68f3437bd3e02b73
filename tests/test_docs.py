"""The Python in README.md and in the docs runs, page by page, in an empty folder."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/getting_started.md",
    "docs/training.md",
    "docs/models/gpt.md",
    "docs/models/transformer.md",
    "docs/models/vision.md",
    "docs/models/captioner.md",
    "docs/models/bert.md",
    "docs/kernels.md",
    "docs/gpu.md",
    "docs/models/efficient_attention.md",
    "docs/not_finite.md",
    "docs/gradcheck.md",
    "docs/laws.md",
    "docs/testing_strategies.md",
    "docs/bug_zoo.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)  # our own text


def test_every_relative_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
