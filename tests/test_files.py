"""Files: JSON that is refused rather than misread, and logs that are cut back to a checkpoint."""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from minitransformer.errors import CheckpointError
from minitransformer.files import LogFile, read_json, sealed, unseal, write_bytes, write_json


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
    [
        *(b"", b'{"a": 1', b"[1]", b"1", b"\xff{}", b'{"a": NaN}', b'{"a": -Infinity}', b"{}{}"),
        *(b"[" * 100_000, b'{"a": 1e400}', b'{"a": -1e999}', b'{"a": ' + b"9" * 101 + b"}", b'{"a":' * 100_000),
    ],
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
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"the vocabulary could not be read: .* \(Not a directory\)"):
        read_json(tmp_path / "file" / "x.json", "the vocabulary")
    with pytest.raises(CheckpointError, match=r"x could not be written \(No such file or directory\)"):
        write_bytes(tmp_path / "gone" / "x", b"")


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # in the working folder: the system allows 108 bytes


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has these")
@pytest.mark.parametrize(
    ("kind", "put"),
    [
        ("a folder", Path.mkdir),
        ("a pipe", os.mkfifo),
        ("a device or socket", listen),
    ],
)
def test_what_is_no_file_is_not_opened(
    kind: str, put: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").write_bytes(b"{}")
    path = tmp_path / "x.json"
    put(path)
    with pytest.raises(CheckpointError) as caught:
        read_json(path, "the vocabulary")
    assert str(caught.value) == (
        f"files: the vocabulary is {kind}, expected a file: {path}. Put the file itself there."
    )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX has these")
def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b'{"a": 1}')
    (tmp_path / "x.json").symlink_to("elsewhere")
    assert read_json(tmp_path / "x.json", "the vocabulary") == {"a": 1}


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 1 << 40)  # a hole: it takes no space
    with pytest.raises(CheckpointError, match=r"the vocabulary has 1,099,511,627,776 bytes, expected at most 67,108,8"):
        read_json(path, "the vocabulary")


@given(st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=5), max_size=3), st.data())
def test_a_seal_tells_every_changed_byte(content: dict[str, Any], data: st.DataObject) -> None:
    content.pop("sha256", None)
    whole = sealed("it", content)
    assert unseal(whole, Path("it"), "it") == content
    offset, flip = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    for damaged in (whole[:offset] + bytes([whole[offset] ^ flip]) + whole[offset + 1 :], whole[:offset]):
        with pytest.raises(CheckpointError):
            unseal(damaged, Path("it"), "it")


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
        log.cut_back(3)
    assert log.path.read_text() == text
    log.cut_back(2)  # a crash may have left anything after the last step that was synced
    assert log.path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("record", [{}, {"step": 1.0}, {"step": True}, {"step": 1, "loss": float("nan")}])
def test_bad_records_are_refused(record: dict[str, Any], tmp_path: Path) -> None:
    log = LogFile(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match=r'needs an integer "step"|cannot be written as JSON'):
        log.append(record)
    assert not log.path.exists()
