"""Faults at real system calls: a training that is killed or refused at any of them is resumed to the bit."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from stopped import cli, go_on, outcome, train_arguments
from traced import ENVIRONMENT, Call, calls, traced, under, why_not

SEED = 20
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"needs strace: {why_not()}")


class Whole(NamedTuple):
    """A run that nothing happened to, and the calls that it made on its folder."""

    text: Path
    outcome: dict[str, str]
    trace: list[Call]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    text = folder / "text.txt"
    text.write_text("to be, or not to be\n" * 20, encoding="utf-8")
    assert cli(*train_arguments(text, folder / "here"))[0] == 0  # also compiles what the traced ones will load
    ended = traced(train_arguments(text, folder / "traced"), folder / "log")
    assert (ended.returncode, ended.stderr.count("Traceback")) == (0, 0), ended.stderr
    expected = outcome(folder / "traced")
    assert outcome(folder / "here") == expected
    return Whole(text, expected, [call for call in calls(folder / "log") if under(call, folder / "traced")])


def test_names_are_only_given_to_what_is_on_the_disk(whole: Whole) -> None:
    """Of every rename: the file, or all in the folder, was synced before it, and the folder of its name right after."""
    unsynced: set[Path] = set()  # files written to, and folders in which names were made
    moved: set[Path] = set()  # folders that a rename into is not synced of
    renames = 0
    for call in whole.trace:
        first = call.paths[0]
        if call.name in ("fsync", "fdatasync"):
            unsynced.discard(first)
            moved.discard(first)
        elif call.name.startswith("rename"):
            source, target = call.paths
            assert moved == set(), call.text
            assert not [path for path in unsynced if path == source or source in path.parents], call.text
            moved.add(target.parent)
            renames += 1
        elif call.name.startswith(("unlink", "rmdir")) and "ENOENT" not in call.text:
            assert moved == set(), call.text  # or the old would be gone before the new is there for good
            unsynced.discard(first)
        elif call.name.startswith("mkdir") or "O_CREAT" in call.text:
            unsynced |= {first.parent} | ({first} if call.name.startswith("mkdir") else set())
        elif "write" in call.name or "truncate" in call.name:
            unsynced.add(first)
    assert moved == set()
    assert renames >= 10
    assert {call.name for call in whole.trace} >= {"write", "fsync", "openat"}


@pytest.mark.parametrize("number", [8, pytest.param(200, marks=pytest.mark.thorough)])
def test_a_fault_at_any_system_call_can_be_resumed_to_the_bit(number: int, whole: Whole, tmp_path: Path) -> None:
    trace = [call for call in whole.trace if call.changes]
    assert len(trace) > 200
    plans = random.Random(SEED).sample([(call, fault) for call in trace for fault in FAULTS], number)

    def struck(index: int) -> subprocess.CompletedProcess[str]:
        call, fault = plans[index]
        inject = ("-e", f"inject={call.name}:{fault}:when={call.nth}")
        return traced(train_arguments(whole.text, tmp_path / str(index)), tmp_path / f"{index}.log", *inject)

    with ThreadPoolExecutor(2) as pool:
        all_ended = list(pool.map(struck, range(number)))
    counts: Counter[str] = Counter()
    for index, ((call, fault), ended) in enumerate(zip(plans, all_ended, strict=True)):
        run, log = tmp_path / str(index), tmp_path / f"{index}.log"
        last = calls(log)[-1] if "SIGKILL" in fault else next(c for c in calls(log) if "(INJECTED)" in c.text)
        hit = (last.name, last.nth) == (call.name, call.nth) and under(last, run)
        counts[f"{fault.partition('=')[2]}{'' if hit else ' elsewhere'}"] += 1
        if hit and "SIGKILL" in fault:
            assert ended.returncode == -9, ended.stderr
        elif hit:
            refusals = re.findall(r"^minitransformer: .*", ended.stderr, re.MULTILINE)
            assert (ended.returncode, len(refusals)) == (2, 1), (call.text, ended.stderr)
            assert ended.stderr.endswith(f"{refusals[0]}\n")
            assert "Traceback" not in ended.stderr
            reason = "No space left on device" if "ENOSPC" in fault else "Input/output error"
            assert str(run) in refusals[0] and reason in refusals[0]
        assert go_on(run, whole.text) == 0, (call.text, fault)
        assert outcome(run) == whole.outcome, (call.text, fault)
    print(f"seed {SEED}: {number} faults at {len(trace)} calls: {dict(sorted(counts.items()))}")
    assert sum(count for name, count in counts.items() if "elsewhere" not in name) >= 0.9 * number


def test_a_full_disk_behind_the_messages_leaves_a_run_to_resume(whole: Whole, tmp_path: Path) -> None:
    """As with `2> said` on that disk: before the run is made, in the middle, and after its end."""
    refusal = "minitransformer: output: cannot be written: No space left on device. Check where it goes."

    def status(nth: int) -> int:
        said = tmp_path / f"{nth}.txt"
        full = ["-P", str(said), "-e", f"inject=write:error=ENOSPC:when={nth}"]  # counts the writes to that path
        arguments = train_arguments(whole.text, tmp_path / f"{nth}")
        with said.open("w") as file:
            return traced(arguments, tmp_path / f"{nth}.log", *full, messages=file.fileno()).returncode

    times = (1, 9, 17)  # stderr is not buffered: text and newline are two writes
    with ThreadPoolExecutor(2) as pool:
        statuses = list(pool.map(status, times))
    assert statuses == [2, 2, 2]
    for nth in times:
        assert (tmp_path / f"{nth}.txt").read_text(encoding="utf-8").splitlines()[nth // 2 :] == [refusal]
        assert go_on(tmp_path / f"{nth}", whole.text) == 0
        assert outcome(tmp_path / f"{nth}") == whole.outcome


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_too_full_for_the_refusal_itself(whole: Whole, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minitransformer", *train_arguments(whole.text, tmp_path / "run")]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=full, check=False)
    assert ended.returncode == 2
    assert go_on(tmp_path / "run", whole.text) == 0
