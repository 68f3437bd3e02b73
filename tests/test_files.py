"""Files: JSON that is refused rather than misread, and logs that are cut back to a checkpoint."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from minitransformer.errors import CheckpointError
from minitransformer.files import LogFile, read_json, write_bytes, write_json


def test_json_is_sorted_indented_and_ends_in_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": [1], "a": "é"})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": "\\u00e9",\n  "b": [\n    1\n  ]\n}\n'
    assert read_json(tmp_path / "x.json", "the file") == {"a": "é", "b": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), {1, 2}, b"bytes", {(1, 2): 3}])
def test_what_json_cannot_hold_is_refused_and_the_old_file_stays(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(CheckpointError, match=r"files: .*x\.json cannot be written as JSON"):
        write_json(path, {"a": value})
    assert read_json(path, "the file") == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [b"", b'{"a": 1', b"[1]", b"1", b"\xff{}", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000, b"{}{}"],
)
def test_what_is_no_json_object_is_refused_by_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the vocabulary is damaged or was not .*x\.json"):
        read_json(tmp_path / "x.json", "the vocabulary")


def test_what_cannot_be_read_or_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path / "gone.json", "the vocabulary")
    assert str(caught.value) == (
        f"files: the vocabulary is missing, expected at {tmp_path / 'gone.json'}. Check that path."
    )
    with pytest.raises(CheckpointError, match=r"the vocabulary could not be read: .* \(Is a directory\)"):
        read_json(tmp_path, "the vocabulary")
    with pytest.raises(CheckpointError, match=r"x could not be written \(No such file or directory\)"):
        write_bytes(tmp_path / "gone" / "x", b"")


RECORDS = st.fixed_dictionaries({"step": st.integers(0, 9)}, optional={"loss": st.floats(0, 9), "é\n": st.text()})


@given(st.lists(RECORDS, max_size=6), RECORDS, st.integers(-1, 10), st.data())
def test_a_log_is_cut_back_to_a_step_and_a_torn_line_goes(
    records: list[dict[str, Any]], torn: dict[str, Any], step: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = LogFile(Path(folder, "metrics.jsonl"))
        log.path.touch()
        for record in records:
            log.append(record)
        whole = log.path.read_bytes()
        log.append(torn)
        line = log.path.read_bytes()[len(whole) :]
        cut = data.draw(st.integers(0, len(line)), "where the last line is torn")
        log.path.write_bytes(whole + line[:cut])
        log.cut_back(step)
        complete = records + ([torn] if cut >= len(line) - 1 else [])  # only the newline may be missing
        kept = [json.loads(text) for text in log.path.read_text().splitlines()]
        assert kept == [record for record in complete if record["step"] <= step]
        log.append({"step": step})
        assert len(log.path.read_text().splitlines()) == len(kept) + 1


def test_a_log_that_needs_no_cut_is_not_rewritten(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "metrics.jsonl")
    log.cut_back(3)
    assert not log.path.exists()
    log.append({"step": 3})
    before = log.path.stat().st_ino
    log.cut_back(3)
    assert log.path.stat().st_ino == before
    log.cut_back(2)
    assert log.path.read_bytes() == b""


@pytest.mark.parametrize("line", ["torn", '{"step": "3"}', '{"loss": 1}', '{"step": true}', "[3]"])
def test_damage_inside_a_log_is_refused_by_line(line: str, tmp_path: Path) -> None:
    log = LogFile(tmp_path / "metrics.jsonl")
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    log.path.write_text(text)
    with pytest.raises(CheckpointError, match=r"line 2 of .*metrics\.jsonl"):
        log.cut_back(1)
    assert log.path.read_text() == text


@pytest.mark.parametrize("record", [{}, {"step": 1.0}, {"step": True}, {"step": 1, "loss": float("nan")}])
def test_bad_records_are_refused(record: dict[str, Any], tmp_path: Path) -> None:
    log = LogFile(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r'needs an integer "step"|cannot be written as JSON'):
        log.append(record)
    assert not log.path.exists()
