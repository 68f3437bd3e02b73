"""The files of bad ops: every op comes back as it was, nothing foreign is read, and `inspect` shows them."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitransformer as mt
import minitransformer.functional as F
from minitransformer.autograd import OPS, Op
from minitransformer.cli import main
from minitransformer.diagnose import BadOp, first_bad_op, load, report, save, shrunk
from minitransformer.errors import CheckpointError, DataError, NonFiniteError
from minitransformer.testing.calls import CALLS
from minitransformer.training import Callback
from tests.tiny import trained


def call_of(name: str, backward: bool) -> BadOp:
    """A drawn call of an op, as a watch would keep it."""
    rng = np.random.default_rng(3)
    inputs, static = CALLS[name](rng)
    bad = BadOp(OPS[name], "a.b", tuple(inputs), static, (), (), {0: "parameter w"}, ())
    if backward:
        bad = bad._replace(douts=tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in bad.run().results))  # type: ignore[union-attr]
    return bad.run()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return a == b and isinstance(a.item() if isinstance(a, np.generic) else a, type(b))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_op_comes_back_and_runs_to_the_same_bits(name: str, backward: bool, tmp_path: Path) -> None:
    bad = call_of(name, backward)
    save(tmp_path / "bad.npz", bad, {"step": 3, "input_ids": np.arange(4)})
    again, context = load(tmp_path / "bad.npz")
    assert again.op is bad.op
    assert all(same(a, b) for a, b in zip(shrunk(bad)[1:], again[1:], strict=True))
    assert same(again.run().results, again.results)
    assert same(context, {"found": str(bad), "step": 3, "input_ids": np.arange(4)})
    assert report(again, context).startswith(str(bad))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("kept") / "bad.npz"
    x = mt.tensor(np.array([[1, 200]], np.float32), requires_grad=True)
    bad = first_bad_op(lambda: x.exp().sum(), [x])
    assert bad is not None
    save(path, bad)
    return path.read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        load(path)
    return str(error.value).removeprefix(f"{path}: ")


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cuts=st.booleans())
def test_damage_is_refused_or_does_no_harm(
    position: float, bit: int, cuts: bool, kept: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    damaged = bytearray(kept)
    if cuts:
        del damaged[int(position * len(kept)) :]
    else:
        damaged[int(position * len(kept))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        bad, context = load(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ")
        return
    # Zip archives have bytes that mean nothing: dates, attributes, versions.
    path.write_bytes(kept)
    expected, expected_context = load(path)
    assert same(tuple(bad[1:]), tuple(expected[1:]))
    assert same(context, expected_context)


def archive(**members: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, data in members.items():
            if isinstance(data, np.ndarray):
                array = io.BytesIO()
                np.lib.format.write_array(array, data)
                data = array.getvalue()
            target.writestr(f"{name}.npy", data)
    return file.getvalue()


def with_json(kept: bytes, **changes: Any) -> bytes:
    with np.load(io.BytesIO(kept)) as arrays:
        members = {name: arrays[name] for name in arrays.files}
    content = {**json.loads(members.pop("json").tobytes()), **changes}
    return archive(json=np.frombuffer(json.dumps(content).encode(), np.uint8), **members)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_foreign_files_are_refused(kept: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.npz"
    assert with_json(kept) and load_bytes(path, with_json(kept)).op.name == "exp"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    pickled = np.array([Bomb()], object)
    unlike = "is no bad op that minitransformer left, or is damaged ("
    for data, begin in (
        (b"", unlike),
        (pickle.dumps(Bomb()), unlike),
        (archive(), unlike),
        (archive(json=np.zeros(3)), unlike),
        (archive(json=pickled), unlike),
        (archive(json=header.getvalue()), unlike + "json.npy has another size than it says)"),
        (with_json(kept, inputs=["array", "nowhere"]), unlike),
        (with_json(kept, inputs="x"), unlike + "inputs is a str)"),
        (with_json(kept, inputs=["tuple", ["x"]]), unlike),
        (with_json(kept, static=["tuple", []]), unlike + "static is a tuple)"),
        (with_json(kept, names={"one": "w"}), unlike),
        (with_json(kept, more=1), unlike),
        (with_json(kept, context=3), unlike),
        (with_json(kept, minitransformer_bad_op=2), "has format 2, expected 1. Read it with another version."),
        (with_json(kept, op="expp"), "holds the op 'expp', which is not registered. Did you mean 'exp'?"),
        (with_json(kept, op="__import__"), "holds the op '__import__', which is not registered. Known: "),
        (with_json(kept, op=["list", []]), unlike),
    ):
        assert refusal(path, data).startswith(begin), data[:80]
    assert not Path("exploded").exists()


def load_bytes(path: Path, data: bytes) -> BadOp:
    path.write_bytes(data)
    return load(path)[0]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitransformer.diagnose.archive._LARGEST", 1000)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("json.npy", bytes(1001))
    assert refusal(tmp_path / "bad.npz", file.getvalue()).startswith(
        "is no bad op that minitransformer left, or is damaged (more than 1000 bytes). Pass such a .npz file."
    )


def test_functions_leave_their_name_only(tmp_path: Path) -> None:
    def halve(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return score / 0 * 0

    q = mt.tensor(np.ones((1, 1, 2, 2), np.float32), requires_grad=True)
    bad = first_bad_op(lambda: F.flex_attention(q, q, q, halve).sum(), [q])
    assert bad is not None
    save(tmp_path / "bad.npz", bad)
    text = report(*load(tmp_path / "bad.npz"))
    assert "score_mod=<test_functions_leave_their_name_only.<locals>.halve, not in the file>" in text
    assert text.endswith("comes out:\n  not run: the call has a function of yours, and no file holds code")


def test_an_op_that_is_not_registered_can_be_kept_but_not_inspected(tmp_path: Path) -> None:
    op = Op("mine", lambda x: (x / 0, None), lambda dout, saved: (dout,))
    x = mt.tensor(np.ones(3), requires_grad=True)
    bad = first_bad_op(lambda: op(x).sum(), [x])
    assert bad is not None
    save(tmp_path / "bad.npz", bad)
    with pytest.raises(DataError, match="holds the op 'mine', which is not registered"):
        load(tmp_path / "bad.npz")


# --- from training to inspect ----------------------------------------------------------------------------


class Spoil(Callback):
    """Makes a weight so large after a step that its product overflows."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Any, record: dict[str, Any], timing: dict[str, Any]) -> None:
        if record["step"] == self.step:
            weight = trainer.model.blocks[0].ffn.up.weight
            weight.data = weight.data * np.float32(1e38)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_training_leaves_the_op_and_inspect_shows_it(
    threads: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError) as error:
        trained([Spoil(4)], out_dir=run, judged=False, threads=threads)
    message = str(error.value)
    assert message.startswith(
        "train: the gradient of wte.weight is not finite at step 5: the backward of gelu in blocks.0.ffn makes nan "
        "from finite numbers (dout: float32 (2, 8, 64) from "
    )
    assert "; rows 0 to 1 of the batch. See it with `minitransformer inspect" in message
    path = run / "bad-op-step-5.npz"
    assert path.stat().st_size < 10_000
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    assert text.splitlines()[0] in message
    assert "\nstep: 5\n" in text
    assert "\nbatch: rows 0 to 1\n" in text
    assert "\ninput_ids: int64 (2, 8) from " in text
    assert re.search(r"\n  reference float32: .*(inf|nan); first at ", text)
    assert re.search(r"\n  reference float64: ", text)
    assert re.search(r"dx\[0, 0, 0\] is nan though its value is .*: .* overflows float32$", text)


def test_inspect_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("hello", encoding="utf-8")
    for path, message in (
        ("nothing.npz", "files: the bad op is missing, expected at "),
        (".", "files: the bad op is a folder, expected a file: "),
        ("text.npz", f"{tmp_path / 'text.npz'}: is no bad op that minitransformer left, or is damaged (File is not"),
    ):
        assert main(["inspect", str(tmp_path / path)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"minitransformer: {message}")


def test_a_folder_that_cannot_be_written_is_an_error_of_its_own(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(kept)
    bad, _ = load(tmp_path / "bad.npz")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path / "nowhere" / "bad.npz", bad)
