"""Runs on disk: what `last` and `best` name comes back, every change is noticed, nothing is overwritten."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from minitransformer.checkpoint import RunFolder, next_run_folder
from minitransformer.errors import CheckpointError
from minitransformer.files import sealed


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"seed": 1, "betas": (0.9, 0.999)})


def contents(run: RunFolder, which: Any) -> tuple[int, dict[str, bytes]]:
    checkpoint = run.load(which)
    files = {p.name: p.read_bytes() for p in checkpoint.folder.iterdir() if p.name != "manifest.json"}
    return checkpoint.step, files


def test_a_run_comes_back(run: RunFolder) -> None:
    run.save(10, {"model.safetensors": b"ten", "state.json": b""}, best=True)
    run.save(20, {"model.safetensors": b"twenty"}, best=False)
    again = RunFolder.open(run.path)
    assert again.description == {"seed": 1, "betas": [0.9, 0.999]}
    assert contents(again, "last") == (20, {"model.safetensors": b"twenty"})
    assert contents(again, "best") == (10, {"model.safetensors": b"ten", "state.json": b""})
    assert again.load().folder == run.path / "checkpoints" / "step-00000020"


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.binary(max_size=3)), min_size=1, max_size=6))
def test_only_what_last_and_best_name_is_kept(saves: list[tuple[int, bool, bytes]]) -> None:
    """Steps may repeat and go back, as they do after a resume."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(folder, {})
        best = None
        for step, is_best, data in saves:
            run.save(step, {"f": data}, best=is_best)
            best = (step, {"f": data}) if is_best else best
            assert contents(run, "last") == (step, {"f": data})
            if best:
                assert contents(run, "best") == best
        named = {run.load("last").folder} | ({run.load("best").folder} if best else set())
        assert set((run.path / "checkpoints").iterdir()) == named
        pointers = {"last.json", "best.json"} if best else {"last.json"}
        assert {p.name for p in run.path.iterdir()} == {"run.json", "checkpoints", *pointers}


def test_files_of_others_in_the_folder_stay(run: RunFolder) -> None:
    strangers = [run.path / "step-00000001", run.path / "checkpoints" / "notes", run.path / ".x.tmp"]
    for stranger in strangers:
        stranger.parent.mkdir(exist_ok=True)
        stranger.write_text("mine")
    run.save(1, {"f": b""}, best=True)
    assert all(stranger.read_text() == "mine" for stranger in strangers)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_create_refuses_an_existing_run_and_says_how_to_resume(tmp_path: Path) -> None:
    for name, quote in [("run", ""), ("my run", "'")]:
        path = tmp_path / name
        RunFolder.create(path, {}).save(1, {"f": b"kept"}, best=True)
        before = tree(tmp_path)
        with pytest.raises(CheckpointError) as caught:
            RunFolder.create(path, {"seed": 2})
        command = f"minitransformer resume {quote}{path}{quote}"
        assert str(caught.value) == (f"run: {path} already holds a run. Use `{command}`, or name another folder.")
        assert tree(tmp_path) == before


def test_create_refuses_files_and_folders_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="thesis is a folder with other files in it, expected nothing"):
        RunFolder.create(tmp_path / "thesis", {})
    with pytest.raises(CheckpointError, match="file is a file, expected nothing"):
        RunFolder.create(tmp_path / "file", {})
    with pytest.raises(CheckpointError, match=r"below could not be written \(File exists\)"):
        RunFolder.create(tmp_path / "file" / "below", {})
    with pytest.raises(CheckpointError, match="cannot be written as JSON"):
        RunFolder.create(tmp_path / "new", {"loss": float("inf")})
    assert tree(tmp_path) == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", {})


def test_of_two_processes_that_create_one_run_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def overtaken(path: Path, *args: Any, **kwargs: Any) -> None:
        real(path, *args, **kwargs)  # the other process was faster
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", overtaken)
    with pytest.raises(CheckpointError, match=r"could not be written \(File exists\)"):
        RunFolder.create(tmp_path / "run", {})


def test_open_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        RunFolder.open(tmp_path)
    assert str(caught.value) == (
        f"run: {tmp_path} holds no training run, looked for {tmp_path / 'run.json'}. "
        "Check the path, or start a run with `minitransformer train`."
    )


def test_the_format_is_kept_with_the_run(run: RunFolder) -> None:
    assert json.loads((run.path / "run.json").read_text())["format"] == 1


def test_a_newer_format_is_refused_by_name(run: RunFolder) -> None:
    (run.path / "run.json").write_text('{"format": 2, "anything": "else"}')
    with pytest.raises(CheckpointError, match="has run format 2, this version of minitransformer reads up to 1"):
        RunFolder.open(run.path)


@pytest.mark.parametrize("version", [0, -1, None, "1", 1.0, True, [1]])
def test_an_older_or_unknown_format_is_refused_by_name(run: RunFolder, version: Any) -> None:
    (run.path / "run.json").write_bytes(sealed("run.json", {"format": version, "description": {}}))
    with pytest.raises(CheckpointError) as caught:
        RunFolder.open(run.path)
    assert str(caught.value) == (
        f"run: {run.path} has run format {version!r}, this version of minitransformer reads format 1. "
        "Go on with the version that wrote it, or start another run."
    )


def test_load_says_what_is_missing(run: RunFolder) -> None:
    assert not run.has_checkpoint()
    with pytest.raises(CheckpointError) as caught:
        run.load()
    assert str(caught.value) == (
        f"run: {run.path} was stopped before its first checkpoint. "
        f"Use `minitransformer resume {run.path}` to start it again."
    )
    run.save(1, {"f": b"one"}, best=True)
    (run.path / "last.json").unlink()
    assert run.has_checkpoint()
    with pytest.raises(CheckpointError, match=r"the pointer to the last checkpoint is missing, expected at .*Use `cp"):
        run.load()


def test_a_run_that_lost_its_pointers_is_not_one_that_never_saved(run: RunFolder) -> None:
    run.save(0, {"f": b"start"}, best=False)
    (run.path / "last.json").unlink()
    assert not run.has_checkpoint()  # of step 0, which can be made again
    run.save(12, {"f": b"two"}, best=True)
    for which in ("last", "best"):
        (run.path / f"{which}.json").unlink()
    for ask in (run.has_checkpoint, run.load):
        with pytest.raises(CheckpointError) as caught:
            ask()
        assert str(caught.value) == (
            f"run: last.json and best.json of {run.path} are missing, and there are checkpoints, such as "
            "step-00000012. Restore one of them from a copy; "
            f"`minitransformer generate {run.path / 'checkpoints' / 'step-00000012'}` shows whether that model is "
            "worth it."
        )


def test_best_is_never_behind_last(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two: the step that was the best is made again from the older `last`."""
    run.save(1, {"f": b"one"}, best=True)
    real, written = Path.replace, []

    def replace(path: Path, target: Path) -> None:
        written.append(target.name)
        real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    run.save(2, {"f": b"two"}, best=True)
    assert written == ["best.json", "last.json"]


@pytest.mark.parametrize(
    ("step", "name"),
    [(-1, "f"), (1.0, "f"), (True, "f"), (10**13, "f"), (1, "a/b"), (1, ""), (1, ".."), (1, ".f"), (1, "c:f")],
)
def test_save_refuses_bad_steps_and_names(run: RunFolder, step: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"a step is an integer of|is no name for a file"):
        run.save(step, {name: b""}, best=True)
    with pytest.raises(CheckpointError, match=r"'manifest\.json' is no name for a file of a checkpoint"):
        run.save(1, {"manifest.json": b""}, best=True)
    assert [p.name for p in run.path.iterdir()] == ["run.json"]


@given(st.data())
def test_every_change_of_every_file_is_noticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder, "run"), {"n_layer": 2})
        run.save(1, {"model.safetensors": bytes(64), "state.json": b'{"a": 1}'}, best=True)
        run.save(2, {"model.safetensors": b"two"}, best=False)
        path = data.draw(st.sampled_from(sorted(p for p in run.path.rglob("*") if p.is_file())), "file")
        old = path.read_bytes()
        offset = data.draw(st.integers(0, len(old) - 1), "offset")
        flip = data.draw(st.integers(0, 255), "flip, or 0 to cut off")
        path.write_bytes(old[:offset] + (bytes([old[offset] ^ flip]) + old[offset + 1 :] if flip else b""))
        with pytest.raises(CheckpointError) as caught:
            RunFolder.open(run.path).load("last")
            run.load("best")
        assert path.name in str(caught.value) or "run format" in str(caught.value)


@pytest.mark.parametrize(("which", "other", "step"), [("last", "best", 1), ("best", "last", 2)])
def test_damage_names_the_file_the_digests_and_the_way_out(run: RunFolder, which: Any, other: Any, step: int) -> None:
    run.save(1, {"f": b"one"}, best=True)
    run.save(2, {"f": b"two"}, best=False)
    intact = contents(run, other)
    path = run.load(which).folder / "f"
    expected, got = (hashlib.sha256(b).hexdigest()[:12] for b in (path.read_bytes(), b"0n3"))
    path.write_bytes(b"0n3")
    with pytest.raises(CheckpointError) as caught:
        run.load(which)
    command = f"cp {run.path / other}.json {run.path / which}.json"
    assert str(caught.value) == (
        f"checkpoint: {path} is damaged: expected SHA-256 {expected}, got {got}. "
        f"Use `{command}` to take the {other} one (step {step}), which is intact."
    )
    subprocess.run(command.split(), check=True)
    assert contents(run, which) == intact
    (run.load(other).folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="is missing, expected at"):
        run.load(which)


def test_a_damaged_pointer_costs_no_checkpoint(run: RunFolder) -> None:
    run.save(1, {"f": b"best"}, best=True)
    good = (run.path / "best.json").read_bytes()
    (run.path / "best.json").write_bytes(b"torn")
    run.save(1, {"f": b"last"}, best=False)
    run.save(2, {"f": b"last"}, best=False)
    (run.path / "best.json").write_bytes(good)
    assert contents(run, "best") == (1, {"f": b"best"})


@given(st.text() | st.sampled_from(["..", "/a/b.txt", "C:\\x y", "/", "runs/../..", "café.txt"]))
def test_the_next_run_folder_is_new_and_stays_under_its_parent(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2, 3):
            path = next_run_folder(folder, name)
            assert path.parent == Path(folder) and not path.exists()
            assert re.fullmatch(rf"[\w.-]+-{n}", path.name) and not path.name.startswith((".", "-"))
            RunFolder.create(path, {})


@pytest.mark.parametrize(
    ("name", "folder"),
    [("python-docs", "python-docs-1"), ("~/my books/war & peace.txt", "war-peace.txt-1"), ("..", "run-1")],
)
def test_the_name_of_the_next_run_folder(name: str, folder: str, tmp_path: Path) -> None:
    assert next_run_folder(tmp_path / "runs", name) == tmp_path / "runs" / folder
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / folder).symlink_to("nowhere")
    assert next_run_folder(tmp_path / "runs", name).name == folder.replace("-1", "-2")
