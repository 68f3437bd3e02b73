"""Damaged, foreign and forged files: refused by name, and never another model, nor another exception."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from stopped import Stop
from tiny import BLOCK, fresh_gpt, train_config

import minitransformer as mt
from minitransformer.checkpoint import RunFolder
from minitransformer.data import Corpus, load_tokenizer, prepare
from minitransformer.errors import CheckpointError, DataError
from minitransformer.files import json_bytes, sealed, sha256
from minitransformer.models import pretrained_folder

SEED = 30
STEPS = 7  # the last checkpoint; the best is that of step 4
LOGS = ("metrics.jsonl", "timings.jsonl")  # cut back to the step of a checkpoint, and read by nothing else
CORPUS = Corpus("mine", lambda: ["to be, or not to be\n" * 20])
Loaded = dict[str, Any]


def trainer(folder: Path, *callbacks: mt.Callback) -> mt.Trainer:
    data, judge = prepare(CORPUS, "char", BLOCK)
    config = train_config(out_dir=folder, max_steps=STEPS + len(callbacks), schedule="constant", eval_interval=4)
    return mt.Trainer(fresh_gpt(vocab_size=9), config, data, judge, callbacks)


def resumed(folder: Path) -> Loaded:
    """All that a run goes on from; it has no step left to do."""
    again = trainer(folder)
    result = again.train(resume=True)
    arrays, numbers = again.optimizer.state()
    moments = {name: array.tobytes() for name, array in arrays.items()}
    return {"steps": result.steps, "best": result.best_val_loss, **again.model.files(), **moments, **numbers}


def loaded(folder: Path) -> Loaded:
    return mt.from_pretrained(folder).files()


def tokens(folder: Path) -> Loaded:
    return load_tokenizer(pretrained_folder(folder)).to_json()


class Saved(NamedTuple):
    """A folder, the ways to load from it, and what each gives."""

    path: Path
    ways: tuple[Callable[[Path], Loaded], ...]
    expected: tuple[Loaded, ...]

    def files(self) -> list[Path]:
        return sorted(path for path in self.path.rglob("*") if path.is_file())

    def refusals(self) -> list[str]:
        """Of all ways to load, those that were refused; the others gave what they should."""
        found = []
        for way, expected in zip(self.ways, self.expected, strict=True):
            try:
                got = way(self.path)
            except (CheckpointError, DataError) as error:
                found.append(str(error))
            else:
                assert got == expected, f"{way.__name__} gives something else"
        return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Saved]]:
    """A run whose best checkpoint is not its last, and a saved model with its tokenizer."""
    run, model = tmp_path_factory.mktemp("saved") / "run", tmp_path_factory.mktemp("saved") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        trainer(run, Stop(STEPS, "interrupt")).train()
        assert [RunFolder.open(run).load(which).step for which in ("last", "best")] == [STEPS, 4]
        fresh_gpt(vocab_size=9).save_pretrained(model)
        load_tokenizer(pretrained_folder(run)).save(model)
        yield [
            Saved(path, ways, tuple(way(path) for way in ways))
            for path, ways in ((run, (resumed, loaded, tokens)), (model, (loaded, tokens)))
        ]


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Whatever is put in the place of the file inside, it is the old one again afterwards."""
    old = path.read_bytes()
    path.unlink()
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(old)


@pytest.mark.parametrize("number", [150, pytest.param(1000, marks=pytest.mark.thorough)])
def test_every_flipped_byte_and_every_cut_is_noticed(number: int, saved: list[Saved]) -> None:
    """A log decides nothing that is loaded: damaged, it is refused or the same is loaded."""
    draw = random.Random(SEED)
    places = [(place, path) for place in saved for path in place.files()]
    deciding = [place for place in places if place[1].name not in LOGS]
    assert Counter(path.name for _, path in places) == {
        **dict.fromkeys(("model.safetensors", "config.json", "tokenizer.json"), 3),
        **dict.fromkeys(("optimizer.safetensors", "trainer.json", "manifest.json"), 2),
        **dict.fromkeys(("run.json", "last.json", "best.json", *LOGS), 1),
    }
    counts: Counter[str] = Counter()
    for index in range(number + number // 10):
        place, path = draw.choice(deciding if index < number else [p for p in places if p not in deciding])
        data = bytearray(path.read_bytes())
        offset = draw.randrange(len(data))
        what = draw.choice(["flipped", "flipped", "flipped", "cut"])
        if what == "flipped":
            data[offset] ^= draw.randint(1, 255)
        else:
            del data[offset:]
        with replaced(path):
            path.write_bytes(data)
            refusals = place.refusals()
        assert refusals or path.name in LOGS, f"{path} {what} at {offset}"
        counts[f"{what} {'log' if path.name in LOGS else 'file'} {'noticed' if refusals else 'harmless'}"] += 1
    print(f"seed {SEED}: {dict(sorted(counts.items()))}")
    assert counts["flipped file noticed"] > counts["cut file noticed"] > number // 5


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has these")
@pytest.mark.parametrize("kind", ["a broken link", "a folder", "a pipe", "nothing"])
def test_what_is_no_file_is_refused_wherever_a_file_is_read(kind: str, saved: list[Saved], tmp_path: Path) -> None:
    """Without waiting at the pipe."""
    for place in saved:
        for path in place.files():
            if kind in ("nothing", "a broken link") and path.name in LOGS:
                continue  # a run before its first step has none
            with replaced(path):
                if kind == "a broken link":
                    path.symlink_to(tmp_path / "nowhere")
                elif kind == "a folder":
                    path.mkdir()
                elif kind == "a pipe":
                    os.mkfifo(path)
                refusals = place.refusals()
            assert refusals, path
            assert any(path.name in text for text in refusals), refusals


def test_a_pickle_is_refused_by_name(saved: list[Saved]) -> None:
    for place in saved:
        for path in place.files():
            if path.name != "model.safetensors":
                continue
            with replaced(path):
                path.write_bytes(b"\x80\x02}q\x00.")
                if place.path == path.parent:
                    assert [text for text in place.refusals() if "never unpickles" in text]
                assert place.refusals()


# --- forged: all checksums are right ---------------------------------------------------------------------

POINTERS: list[dict[str, Any]] = [
    {"folder": "../../elsewhere"},
    {"folder": "/etc"},
    {"folder": "step-00000007/../step-00000004"},
    {"folder": "step-7"},
    {"folder": "step-٠٠٠٠٠٠٠٧"},
    {"folder": ".step-00000007.tmp"},
    {"folder": 7},
    {"step": -1},
    {"step": 10**13},
    {"step": 10**90},
    {"step": True},
    {"step": 7.0},
    {"step": "7"},
    {"step": None},
    {"manifest_sha256": None},
    {"manifest_sha256": 7},
]


@pytest.mark.parametrize("change", POINTERS, ids=str)
def test_forged_pointers_are_refused(change: dict[str, Any], saved: list[Saved]) -> None:
    path = saved[0].path / "last.json"
    pointer = json.loads(path.read_text())
    del pointer["sha256"]
    with replaced(path):
        path.write_bytes(sealed("last.json", {**pointer, **change}))
        with pytest.raises(
            CheckpointError, match=r"last\.json names no checkpoint of this run|manifest\.json is damaged"
        ):
            RunFolder.open(saved[0].path).load("last")


ENTRY = {"size": 3, "sha256": sha256(b"out")}
MANIFESTS: list[Any] = [
    *({name: ENTRY} for name in ("../out", "../../out", "a/../../out", "", ".", "..", ".hidden", "a\0b", "c:out")),
    *({"trainer.json": entry} for entry in ({"size": 10**15}, {"size": -1}, {"size": "3"}, {"sha256": 5}, {}, None, 5)),
    *([], None, 5, "trainer.json", {"manifest.json": {"size": 1, "sha256": ""}}),
]


@pytest.mark.parametrize("files", [*MANIFESTS, "absolute"], ids=str)
def test_forged_manifests_are_refused(files: Any, saved: list[Saved], tmp_path: Path) -> None:
    shutil.copytree(saved[0].path, tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    step, folder = run.load("last")
    for place in (folder.parent, folder.parent.parent):
        (place / "out").write_bytes(b"out")  # there, and as the manifest says
    files = {str(folder.parent / "out"): ENTRY} if files == "absolute" else files
    manifest = json_bytes("it", {"step": step, "files": files})
    (folder / "manifest.json").write_bytes(manifest)
    pointer = {"step": step, "folder": folder.name, "manifest_sha256": sha256(manifest)}
    (run.path / "last.json").write_bytes(sealed("it", pointer))
    with pytest.raises(CheckpointError, match=r"manifest\.json is no list of the files beside it|\.json is damaged"):
        run.load("last")


@pytest.mark.parametrize("part", ["train", "model", "model_type", "data", "start"])
def test_a_description_without_a_part_is_refused(part: str, saved: list[Saved], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(saved[0].path, path)
    if part == "start":
        for entry in ("last.json", "best.json"):
            (path / entry).unlink()
        shutil.rmtree(path / "checkpoints")
    description = {name: value for name, value in RunFolder.open(path).description.items() if name != part}
    (path / "run.json").write_bytes(sealed("run.json", {"format": 1, "description": description}))
    with pytest.raises(mt.errors.ConfigError, match=r"^resume: "):
        resumed(path)


def test_a_newer_tokenizer_and_a_foreign_one_are_refused_by_name(saved: list[Saved]) -> None:
    path = saved[1].path / "tokenizer.json"
    for content, problem in {
        b'{"version": 2, "type": "wordpiece", "anything": "else"}': "has version 2, this minitransformer reads up to 1",
        b'{"version": "1.0", "model": {"type": "BPE"}}': "no tokenizer of this package",
    }.items():
        with replaced(path):
            path.write_bytes(content)
            assert [problem in text for text in saved[1].refusals()] == [True]


def test_weights_swapped_between_folders_are_told_from_their_own(saved: list[Saved], tmp_path: Path) -> None:
    """Each file is whole, and they do not belong together."""
    shutil.copytree(saved[1].path, tmp_path / "model")
    mt.manual_seed(0)
    other = mt.GPT(mt.GPTConfig(**{**fresh_gpt(vocab_size=9).config.__dict__, "n_head": 4}))
    assert np.shape(other.wte.weight.data) == (9, 16)
    (tmp_path / "model" / "model.safetensors").write_bytes(other.files()["model.safetensors"])
    with pytest.raises(CheckpointError, match=r"config\.json is not the config .*: n_head is 2 and was 4\. Restore it"):
        mt.from_pretrained(tmp_path / "model")
