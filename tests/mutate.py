"""Run the tests against many small mistakes in the ops and kernels: python tests/mutate.py --count 500 --seed 1

Each mutant is a copy of the package with one mistake (mutations.py) and a kernel cache of its own. The tests
that go with its file run against it, the likeliest first, until one fails: the mutant is killed. One that
survives shows a test that is missing, or changes nothing: mutants_explained.py says why, one by one. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MT_PROFILE="mt-fail-fast")

import hypothesis  # noqa: F401  (imported once here rather than once in each child)
import numba  # noqa: F401
import numpy  # noqa: F401
import pytest
import threadpoolctl  # noqa: F401
from mutant_stages import STAGES, Stage, of_ops
from mutants_explained import EXPLAINED
from mutations import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "minitransformer",
    "minitransformer_pytest.py",
    "tests",
    "docs",
    "README.md",
    "setup.cfg",
    "pyproject.toml",
)


def stages_of(file: str, mutant: Mutant) -> list[Stage]:
    """The tests to run: of an op's forward or backward, its lines of the gradient table first."""
    own = re.fullmatch(r"(\w+)_(?:forward|backward)", mutant.function)
    return [*([of_ops(f"test_op[{own[1]}-")] if own else []), *STAGES[file]]


# No numbers are made there: they keep compiled kernels on disk, or refuse arrays, and have tests of their own.
NO_NUMBERS = {"kernels/compiled.py", "kernels/store.py", "kernels/entrance.py"}
# How many elements are looked at together, in any number of which the sum is the same to rounding.
SPEED = frozenset({"CHUNK", "LANES", "_CHUNK", "_SMALL"})

# Plugins that the parent has imported stay as they are.
UNREWRITTEN = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


class Task(NamedTuple):
    stages: list[Stage]
    file: str = ""
    mutant: Mutant | None = None  # None is the package as it is, which must pass


# Caught; survived, and why that is right is known; survived, which is a missing test; the tests did not run.
VERDICTS = ("killed", "timeout", "explained", "survived", "broken")
CAUGHT = VERDICTS[:2]


class Result(NamedTuple):
    task: Task
    verdict: str  # one of VERDICTS
    by: str  # the test that failed, or why none can
    seconds: float


def all_tasks(package: Path, only: str) -> list[Task]:
    files = sorted(
        p.relative_to(package).as_posix() for part in ("ops", "kernels") for p in (package / part).rglob("*.py")
    )
    tasks = []
    for file in files:
        source = (package / file).read_text(encoding="utf-8")
        found = list(mutants(source, SPEED)) if file not in NO_NUMBERS and only in file else []
        if found and file not in STAGES:
            raise SystemExit(f"{file} has no tests in STAGES, expected a line for each op and kernel")
        tasks += [Task(stages_of(file, mutant), file, mutant) for mutant in found]
    return tasks


def as_it_is(tasks: list[Task]) -> list[Task]:
    """Each stage of `tasks` once, without a mutant."""
    stages = {tuple(stage) for task in tasks for stage in STAGES[task.file]}
    return [Task([list(stage)]) for stage in sorted(stages)]


class Failures:
    """A pytest plugin that writes down the first test that failed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(f"{report.nodeid} ({report.when})", encoding="utf-8")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(f"{report.nodeid} (collection)", encoding="utf-8")


class Copy:
    """A folder with a copy of the project, in which one child at a time runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.package = folder, folder / "minitransformer"
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name)
            else:
                shutil.copy(source, folder / name)
        self.pid = 0

    def start(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic()
        if task.mutant is not None:
            self.right = (self.package / task.file).read_text(encoding="utf-8")
            self._write(task.mutant.source)
        for name in ("failure", "output"):
            (self.folder / name).unlink(missing_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run()

    def _write(self, source: str) -> None:
        path = self.package / self.task.file
        path.write_text(source, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()  # one of the same second and size would be taken for that of the mutant

    def _run(self) -> None:
        """In the child: never returns."""
        os.setpgid(0, 0)
        with (self.folder / "output").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(self.folder)
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
        os.environ["PYTHONPATH"] = str(self.folder)
        sys.path[:] = [str(self.folder), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests"))]
        sys.dont_write_bytecode = self.task.mutant is not None
        code = 3
        try:
            for stage in self.task.stages:
                arguments = [*stage, "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", *UNREWRITTEN]
                code = pytest.main(arguments, plugins=[Failures(self.folder / "failure")])
                if code == pytest.ExitCode.NO_TESTS_COLLECTED and "-k" in stage:
                    code = 0
                if code:
                    break
        finally:  # whatever happens, the parent's way out is not this one's
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def result(self, timeout: float) -> Result | None:
        """What became of the child; None while it runs."""
        seconds = time.monotonic() - self.began
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and seconds < timeout:
            return None
        if pid == 0:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        failure = self.folder / "failure"
        by = failure.read_text(encoding="utf-8") if failure.exists() else ""
        if pid == 0:
            verdict = "timeout"
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            verdict = "survived"
        elif os.WIFSIGNALED(status) or by:
            verdict = "killed"
        else:
            verdict = "broken"
            by = (self.folder / "output").read_text(encoding="utf-8", errors="replace")[-2000:]
        self.pid = 0
        if self.task.mutant is not None:
            self._write(self.right)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        if verdict == "survived" and (mutant := self.task.mutant) is not None:
            by = EXPLAINED.get((self.task.file, mutant.before, mutant.after), "")
            verdict = "explained" if by else verdict
        return Result(self.task, verdict, by, seconds)


def run(copies: list[Copy], tasks: list[Task], timeout: float) -> Iterator[Result]:
    """The results as they come; each copy takes the next task when it is free."""
    waiting = list(reversed(tasks))
    while waiting or any(copy.pid for copy in copies):
        for copy in copies:
            if copy.pid:
                if (result := copy.result(timeout)) is not None:
                    yield result
            elif waiting:
                copy.start(waiting.pop())
        time.sleep(0.02)


def as_json(task: Task) -> dict[str, Any]:
    assert task.mutant is not None
    return {"file": task.file, **{k: v for k, v in task.mutant._asdict().items() if k != "source"}}


def named(record: dict[str, Any]) -> tuple[str, ...]:
    """What tells a mutant, wherever its line has moved to."""
    return record["file"], record["function"], record["before"], record["after"]


def shown(record: dict[str, Any]) -> str:
    what = "{verdict:9} {seconds:5.1f} s  {file}:{line} {kind}: `{before}` -> `{after}`".format(**record)
    return what + (f"  by {record['by']}" if record["by"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="how many mutants, drawn from all that there are")
    parser.add_argument("--seed", type=int, default=1, help="which ones are drawn")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants of files with this in their path")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a mutant counts as caught")
    parser.add_argument("--json", type=Path, help="write the results into this file, after those it holds")
    parser.add_argument("--again", type=Path, metavar="JSON", help="the mutants that survived there, and no others")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    given = parser.parse_args()
    tasks = all_tasks(ROOT / "minitransformer", given.only)
    records = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else []
    if given.again:
        again = {named(r) for r in json.loads(given.again.read_text(encoding="utf-8")) if r["verdict"] not in CAUGHT}
        tasks = [t for t in tasks if named(as_json(t)) in again]
    drawn = random.Random(given.seed).sample(tasks, min(given.count, len(tasks)))
    print(f"{len(drawn)} of {len(tasks)} mutants, seed {given.seed}")
    known = {named(record) for record in records}
    drawn = [task for task in drawn if named(as_json(task)) not in known]
    if given.list:
        for task in drawn:
            print(f"{task.file} {task.mutant}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [Copy(Path(folder, str(i))) for i in range(given.jobs)]
        for result in run(copies, as_it_is(drawn), 4 * given.timeout):
            if result.verdict != "survived":
                print(f"without a mutant, {' '.join(result.task.stages[0])} does not pass: {result.by}")
                return 2
        for result in run(copies, drawn, given.timeout):
            outcome = {"verdict": result.verdict, "by": result.by, "seconds": round(result.seconds, 2)}
            records.append({**as_json(result.task), **outcome})
            print(f"{len(records):4} {shown(records[-1])}", flush=True)
            if given.json:
                given.json.write_text(json.dumps(records, indent=1), encoding="utf-8")
    counts = {verdict: sum(r["verdict"] == verdict for r in records) for verdict in VERDICTS}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), f"of {len(records)}")
    for record in records:
        if record["verdict"] not in CAUGHT:
            print(shown(record))
    return 1 if counts["survived"] or counts["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
