"""Checkpoints survive: whenever the process or the machine stops, the old or the new one is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_disk import LOSSES, Disk, Kill

from minitransformer.checkpoint import RunFolder
from minitransformer.errors import CheckpointError
from minitransformer.files import LogFile, write_bytes


def contents(run: RunFolder, which: Any) -> tuple[int, dict[str, bytes]]:
    checkpoint = run.load(which)
    files = {p.name: p.read_bytes() for p in checkpoint.folder.iterdir() if p.name != "manifest.json"}
    return checkpoint.step, files


FAULTS = ["kill", "enospc", "full", *LOSSES]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is synced is told by `Disk`; the disk below it loses no power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def crashes(template: Path, scratch: Path, fault: str, act: Callable[[Path], None]) -> Iterator[Path]:
    """A copy of `template` for every k, on which `act` met the fault at its k-th change of the disk."""
    k = 0
    while True:
        k += 1
        root = scratch / f"{fault} {k}" / "run"
        grave = scratch / f"{fault} {k}" / "grave"
        grave.mkdir(parents=True)
        if template.exists():
            shutil.copytree(template, root)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, grave, "kill" if fault in LOSSES else fault, k)
            try:
                act(root)
            except Kill:
                assert disk.dead
            except CheckpointError as error:
                assert "No space left on device" in str(error)
        if disk.count < k:
            assert k > 3
            return
        if fault in LOSSES:
            disk.lose_power(root.parent, LOSSES[fault])
        disk.forget(lambda inode: True)
        yield root


def saved(path: Path, *saves: tuple[int, bytes, bool]) -> None:
    run = RunFolder.open(path)
    for step, data, best in saves:
        run.save(step, {"model": data, "state": data * 2}, best=best)


def litter(path: Path) -> None:
    """What a run killed while saving step 3 leaves behind."""
    for folder in ("step-00000003", ".step-00000003.tmp"):
        (path / "checkpoints" / folder).mkdir(parents=True, exist_ok=True)
        (path / "checkpoints" / folder / "model").write_bytes(b"old")
    (path / ".last.json.1-1.tmp").write_bytes(b"{")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("before", "save"),
    [
        ([], (3, b"new", True)),
        ([(1, b"one", True)], (3, b"new", False)),
        ([(1, b"one", True), (2, b"two", False)], (3, b"new", True)),
        ([(1, b"one", True), (3, b"three", False)], (3, b"new", True)),
        ([(3, b"three", True)], (3, b"new", False)),
    ],
    ids=["first", "last moves", "both move", "same step again", "same step as best"],
)
def test_a_fault_at_any_moment_leaves_old_or_new(
    tmp_path: Path, fault: str, before: list[tuple[int, bytes, bool]], save: tuple[int, bytes, bool]
) -> None:
    template = tmp_path / "template"
    RunFolder.create(template, {})
    saved(template, *before)
    if not any(step == 3 for step, _, _ in before):
        litter(template)
    step, data, best = save
    new = (step, {"model": data, "state": data * 2})
    kept = RunFolder.open(template)
    possible = {
        "last": ([contents(kept, "last")] if before else []) + [new],
        "best": ([contents(kept, "best")] if before else []) + ([new] if best else []),
    }
    for root in crashes(template, tmp_path, fault, lambda path: saved(path, save)):
        run = RunFolder.open(root)
        for which, choices in possible.items():
            if before or (root / f"{which}.json").exists():
                assert contents(run, which) in choices
        # The next save goes through, and sweeps up.
        saved(root, (4, b"next", True))
        assert contents(run, "last") == contents(run, "best") == (4, {"model": b"next", "state": b"nextnext"})
        assert {p.name for p in root.iterdir()} == {"run.json", "last.json", "best.json", "checkpoints"}
        assert [p.name for p in (root / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_half_created_can_be_created_again(tmp_path: Path, fault: str) -> None:
    def create(path: Path) -> None:
        RunFolder.create(path, {"seed": 1})

    for root in crashes(tmp_path / "nothing", tmp_path, fault, create):
        if not (root / "run.json").exists():
            create(root)
        assert RunFolder.open(root).description == {"seed": 1}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_while_writing_or_cutting_a_file_leaves_old_or_new(tmp_path: Path, fault: str) -> None:
    template = tmp_path / "template"
    template.mkdir()
    old, new = b'{"step": 1}\n{"step": 2}\n{"st', b'{"step": 1}\n'
    (template / "log").write_bytes(old)
    (template / "file").write_bytes(b"old")

    def act(path: Path) -> None:
        write_bytes(path / "file", b"new")
        LogFile(path / "log").cut_back(1)

    for root in crashes(template, tmp_path, fault, act):
        assert (root / "file").read_bytes() in (b"old", b"new")
        assert (root / "log").read_bytes() in (old, new)
        if fault in ("enospc", "full"):
            assert {p.name for p in root.iterdir()} == {"file", "log"}


def test_what_was_saved_survives_a_loss_of_power_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runs" / "of-today" / "run"
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path)
        run = RunFolder.create(path, {"seed": 1})
        disk.lose_power(tmp_path, LOSSES["everything"])
        assert RunFolder.open(path).description == {"seed": 1}
        run.save(1, {"model": b"one"}, best=True)
        disk.lose_power(tmp_path, LOSSES["everything"])
    disk.forget(lambda inode: True)
    assert contents(run, "last") == contents(run, "best") == (1, {"model": b"one"})


def test_a_synced_log_survives_a_loss_of_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    log = LogFile(tmp_path / "run" / "log")
    with monkeypatch.context() as patch:
        disk = Disk(patch, tmp_path)
        log.append({"step": 1})
        log.sync()
    disk.lose_power(tmp_path, LOSSES["everything"])
    disk.forget(lambda inode: True)
    assert log.path.read_bytes() == b'{"step": 1}\n'


def test_a_full_disk_gets_its_space_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path, {})
    run.save(1, {"model": b"one"}, best=True)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with monkeypatch.context() as patch:
        Disk(patch, tmp_path, "full", 6)
        with pytest.raises(CheckpointError) as caught:
            run.save(2, {"model": b"two"}, best=True)
    assert str(caught.value) == (
        f"files: {tmp_path} could not be written (No space left on device). "
        "Check free space and permissions there; what was saved before is untouched."
    )
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
