"""A training that is killed, refused or robbed of unsynced data at any change of the disk is resumed to the bit.

The layer of `test_checkpoint_faults` under the whole command; `test_checkpoint_strace` does it at real system calls.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from faulty_disk import LOSSES, Disk, Kill
from stopped import cli, go_on, outcome, train_arguments

from minitransformer.checkpoint import RunFolder

SEED = 10


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("to be, or not to be\n" * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """How often an uninterrupted run changes the disk, and its outcome."""
    root = tmp_path_factory.mktemp("whole")
    assert cli(*train_arguments(text, root / "first"))[0] == 0  # what is compiled is cached: changes of other folders
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, root)
        assert cli(*train_arguments(text, root / "run"))[0] == 0
        disk.forget(lambda inode: True)
    return disk.count, outcome(root / "run")


@pytest.mark.parametrize("settings", [["--tokenizer", "byte"], ["--seed", "7", "--positions", "rope"]], ids=" ".join)
def test_a_run_killed_before_its_first_checkpoint_starts_over(settings: list[str], text: Path, tmp_path: Path) -> None:
    def kill(*_: object, **__: object) -> None:
        raise Kill

    assert cli(*train_arguments(text, tmp_path / "whole"), *settings)[0] == 0
    stopped = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save", kill)
        with pytest.raises(Kill):
            cli(*train_arguments(text, stopped), *settings)
    assert [path.name for path in stopped.iterdir()] == ["run.json"]
    status, _, err = cli("resume", str(stopped))
    assert (status, err.splitlines()[0]) == (0, f"{stopped}: from step 0 to 6, on {text}")
    assert outcome(stopped) == outcome(tmp_path / "whole")


def test_a_text_that_changed_before_the_first_checkpoint_is_refused(text: Path, tmp_path: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    mine, run = tmp_path / "mine.txt", tmp_path / "run"
    mine.write_bytes(text.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save", stop)
        assert cli(*train_arguments(mine, run))[0] == 130
    mine.write_text(text.read_text(encoding="utf-8").replace("not", "ton"), encoding="utf-8")
    status, _, err = cli("resume", str(run))
    assert status == 2
    assert f"corpus '{mine}': has changed since the run was started. Restore the text that" in err


@pytest.mark.parametrize("number", [3, pytest.param(60, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("fault", ["kill", "enospc", "full", *LOSSES])
def test_a_fault_at_any_change_of_the_disk_can_be_resumed_to_the_bit(
    fault: str, number: int, text: Path, whole: tuple[int, dict[str, str]], tmp_path: Path
) -> None:
    changes, expected = whole
    assert changes > 150
    for k in random.Random(f"{SEED} {fault}").sample(range(1, changes + 1), number):
        root = tmp_path / str(k)
        (root / "grave").mkdir(parents=True)
        run = root / "run"
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, root / "grave", "kill" if fault in LOSSES else fault, k)
            try:
                status, _, err = cli(*train_arguments(text, run))
            except Kill:
                assert disk.dead
            else:
                assert status == 2
                assert err.count("minitransformer: ") == 1
                assert err.splitlines()[-1].startswith("minitransformer: files: ")
                assert "(No space left on device). Check free space and permissions there;" in err
        if fault in LOSSES:
            disk.lose_power(root, LOSSES[fault])
        disk.forget(lambda inode: True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)
            assert go_on(run, text) == 0, k
        assert outcome(run) == expected, k
