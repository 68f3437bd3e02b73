"""Does our suite catch the zoo? python tests/zoo.py runs, for each bug, the tests that must fail with it.

One process a bug, two at a time. Every test that a bug names has to fail while the bug is installed; that they
pass without it is what the suite itself shows. With --page it writes the exercises into docs/bug_zoo.md instead.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import NamedTuple

from minitransformer.testing import bugs

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "bug_zoo.md"
MARK = "<!-- From here on written by: python tests/zoo.py --page -->\n"


class Verdict(NamedTuple):
    """What became of one bug: `passed` are tests that should have failed, `trouble` says why none ran."""

    name: str
    failed: int
    passed: list[str]
    trouble: str
    seconds: float

    @property
    def caught(self) -> bool:
        return not self.passed and not self.trouble

    def __str__(self) -> str:
        tests = f"{self.failed} test{'s' * (self.failed != 1)}"
        what = f"caught by {tests}" if self.caught else f"SURVIVED {', '.join(self.passed)}{self.trouble}"
        return f"{self.name:36} {self.seconds:5.1f} s  {what}"


def outcomes(report: Path) -> dict[str, bool]:
    """Test -> whether it failed, from pytest's XML."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        found[test] = case.find("failure") is not None  # an error outside the test itself, or a skip, is no catch
    return found


def verdict(name: str) -> Verdict:
    """Run the tests that must catch the bug, in a process of their own."""
    began = monotonic()
    wanted = bugs.get(name).caught_by
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", f"--install-bug={name}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *wanted, *options],
            cwd=ROOT,
            env={**os.environ, "MT_PROFILE": "mt-fail-fast"},
            capture_output=True,
            text=True,
        )
        found = outcomes(report) if done.returncode in (0, 1) else {}
    trouble = "" if found else f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-600:]}"
    passed = [test for test in wanted if not any(f and of(test, t) for t, f in found.items())]
    return Verdict(name, sum(found.values()), [] if trouble else passed, trouble, monotonic() - began)


def of(test: str, case: str) -> bool:
    """Whether `case` is `test`, or one of its parametrised cases."""
    return case == test or case.startswith(f"{test}[")


def exercises() -> str:
    """The part of the page that comes from the zoo."""
    lines = []
    family = ""
    for bug in map(bugs.get, bugs.names()):
        module = inspect.getmodule(bug.patches[0].wrong)
        if module.__name__ != family:
            family = module.__name__
            lines += [f"### {module.__doc__.partition('.')[0].removeprefix('Wrong ').capitalize()}", ""]
        lines += [f"#### `{bug.name}`", "", bug.story, "", "```py"]
        for _, attribute, wrong in bug.patches:
            source = inspect.getsource(wrong)
            lines += [f"# {attribute}", source[source.index("def ") :].rstrip(), "", ""]
        lines[-2:] = ["```", "", f"*Exercise.* {bug.exercise}", "", "<details><summary>Solution</summary>", ""]
        lines += [bug.solution, "", "Caught here by:", ""]
        lines += [*(f"- `{test}`" for test in bug.caught_by), "", "</details>", ""]
    return "\n".join(lines[:-1]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="bugs, all if none are given")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    parser.add_argument("--page", action="store_true", help="write the exercises into docs/bug_zoo.md")
    given = parser.parse_args()
    if given.page:
        PAGE.write_text(
            PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n" + exercises(), encoding="utf-8"
        )
        return 0
    began = monotonic()
    with ThreadPoolExecutor(given.jobs) as pool:
        verdicts = []
        for one in pool.map(verdict, given.names or bugs.names()):
            verdicts.append(one)
            print(one, flush=True)
    caught = sum(v.caught for v in verdicts)
    print(f"{caught} of {len(verdicts)} bugs caught, {monotonic() - began:.0f} s")
    return 0 if caught == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
