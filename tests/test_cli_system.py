"""The command line where the system is hostile: odd files, closed streams, missing folders, no permission."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import ENVIRONMENT, command

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX: special files, permissions and descriptors")

TRAIN = [
    "--max-steps",
    "2",
    "--n-layer",
    "1",
    "--n-embd",
    "8",
    "--n-head",
    "1",
    "--block-size",
    "8",
    "--threads",
    "1",
    "--progress",
    "false",
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh working folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be\n" * 20, encoding="utf-8")
    yield tmp_path
    for path in [tmp_path, *tmp_path.rglob("*")]:  # so that pytest can remove it
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("trained")
    (where / "text.txt").write_text("to be, or not to be\n" * 20, encoding="utf-8")
    ended = command("train", "--data", "text.txt", *TRAIN, "--out-dir", "run", cwd=where)
    assert ended.returncode == 0, ended.stderr
    return where / "run"


@pytest.fixture
def run(trained: Path, folder: Path) -> str:
    """A finished run of 2 steps."""
    shutil.copytree(trained, folder / "run")
    return "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def says(*argv: str, **options: Any) -> str:
    """The error of a command that is refused: one line in the form of all errors, and nothing on stdout."""
    ended = command(*argv, timeout=60, **options)
    assert ended.returncode == 2, ended
    assert not ended.stdout
    *information, line = ended.stderr.splitlines()
    assert not any("Traceback" in text or text.startswith("minitransformer: ") for text in information), ended.stderr
    assert len(line.split(": ", 2)) == 3, line
    assert line[-1] in ".?!"
    return line.removeprefix("minitransformer: ")


def refused(*argv: str, error: str, **options: Any) -> None:
    """No file is changed either."""
    before = contents(Path.cwd())
    assert says(*argv, **options).startswith(error)
    assert contents(Path.cwd()) == before


# --- files that are no texts -----------------------------------------------------------------------------


def test_what_is_no_file_is_not_read(folder: Path) -> None:
    """A pipe would hang, and a device never ends."""
    os.mkfifo("pipe")
    for name, target in {"device": "/dev/zero", "to a pipe": "pipe"}.items():
        Path(name).symlink_to(target)
    Path("folder").mkdir()
    os.mkfifo("folder/pipe.txt")
    Path("folder/device.txt").symlink_to("/dev/zero")
    Path("folder/itself").symlink_to(".")
    Path("folder/loop.txt").symlink_to("loop.txt")
    for path in ("pipe", "device", "to a pipe", "/dev/zero", "/dev/null", "/dev/stdin"):
        refused("train", "--data", path, error=f"corpus '{path}': is neither a file nor a folder. ")
    refused("train", "--data", "folder", error="corpus 'folder': the folder holds no .txt, ")
    shutil.copy("text.txt", "folder")
    assert command("train", "--data", "folder", *TRAIN).returncode == 0


@pytest.mark.parametrize("name", ["run.json", "last.json", "model.safetensors", "tokenizer.json", "manifest.json"])
def test_a_pipe_in_the_place_of_a_file_of_a_run(run: str, name: str) -> None:
    file = next(Path(run).rglob(name))
    file.unlink()
    os.mkfifo(file)
    refused("resume", run, "--max-steps", "3", error="")


# --- streams ---------------------------------------------------------------------------------------------


def closed(*numbers: int) -> Any:
    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.mark.parametrize("numbers", [(1,), (2,), (0, 1, 2)], ids=str)
def test_closed_streams(run: str, numbers: tuple[int, ...]) -> None:
    """The work is done, nothing meant for one stream comes out of another or in a file."""
    before = contents(Path(run))
    ended = command("eval", run, preexec_fn=closed(*numbers))
    assert ended.returncode == 0
    assert ended.stdout.startswith("loss ") is (1 not in numbers)
    assert ended.stderr.startswith("run/checkpoints/") is (2 not in numbers)
    assert contents(Path(run)) == before
    ended = command("train", "--data", "text.txt", *TRAIN, "--out-dir", "other", preexec_fn=closed(*numbers))
    assert ended.returncode == 0
    assert contents(Path("other")).keys() == before.keys()
    ended = command("nonsense", preexec_fn=closed(*numbers))
    assert (ended.returncode, ended.stdout) == (2, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
@pytest.mark.parametrize(
    ("argv", "unbuffered"),
    [("--version", ""), ("--version", "1"), ("train --help", ""), ("eval run", "1"), ("generate run", "")],
)
def test_full_stdout(run: str, argv: str, unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        refused(
            *argv.split(),
            error="output: cannot be written: No space left on device. ",
            stdout=full,
            env=ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered},
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_full_stderr(run: str) -> None:
    with Path("/dev/full").open("w") as full:
        ended = command("nonsense", stderr=full)
        assert (ended.returncode, ended.stdout) == (2, "")
        ended = command("generate", run, stderr=full)
        assert ended.returncode == 0
        assert ended.stdout


# --- surroundings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv", ["train --data text.txt", "train --data TEXT", "generate run", "eval run", "resume run"]
)
def test_a_working_folder_that_is_gone(folder: Path, argv: str) -> None:
    (folder / "gone").mkdir()

    def leave() -> None:
        os.chdir(folder / "gone")
        Path.cwd().rmdir()

    words = argv.replace("TEXT", str(folder / "text.txt")).split()
    ended = command(*words, preexec_fn=leave)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith("minitransformer: ")
    assert "Traceback" not in ended.stderr
    assert sorted(contents(folder)) == ["text.txt"]


def test_an_empty_environment() -> None:
    """No HOME, no PATH, no locale."""
    ended = command("train", "--data", "text.txt", *TRAIN, env={"PYTHONPATH": ENVIRONMENT["PYTHONPATH"]})
    assert ended.returncode == 0, ended.stderr


def test_a_temporary_folder_that_is_not_there() -> None:
    assert command("train", "--data", "text.txt", *TRAIN, env=ENVIRONMENT | {"TMPDIR": "/nowhere"}).returncode == 0


# --- locales ---------------------------------------------------------------------------------------------


def test_a_locale_without_letters() -> None:
    """Text files are UTF-8 whatever the locale; what stdout cannot show is escaped; a name can be any bytes."""
    Path("bäume.txt").write_text("Fünf süße Bäume, 春眠不覚暁\n" * 20, encoding="utf-8")
    ascii_only = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    options: dict[str, Any] = {"env": ENVIRONMENT | ascii_only}
    ended = command("train", "--data", "bäume.txt", *TRAIN, "--out-dir", "übung", **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.isascii()
    refused("generate", "übung", "--prompt", "Bäume", error="encode: U+DCC3 at position 1 is a lone ", **options)
    assert command("generate", "übung", "--prompt", "Bäume", env=ENVIRONMENT).stdout.startswith("Bäume")


def test_bytes_that_are_no_utf8(run: str) -> None:
    refused("generate", run, "--prompt", os.fsdecode(b"to \xff"), error="encode: U+DCFF at position 3 is a lone ")
    refused("train", "--data", os.fsdecode(b"\xff.txt"), error="corpus: '\\udcff.txt' is neither ")
    shutil.copy("text.txt", os.fsdecode(b"\xff.txt"))
    refused("train", "--data", os.fsdecode(b"\xff.txt"), *TRAIN, "--out-dir", "text.txt/x", error="files: text.txt/x ")


# --- permissions -----------------------------------------------------------------------------------------


def bound_by_permissions() -> None:
    """Take from root, for good, what lets it pass over the permissions of its own files."""
    if os.geteuid() == 0:
        bounding_set_drop, override, search = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (override, search):
            if libc.prctl(bounding_set_drop, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")


def forbidden(path: str, mode: int, *argv: str, error: str) -> None:
    before, rights = contents(Path.cwd()), Path(path).stat().st_mode
    Path(path).chmod(mode)
    said = says(*argv, preexec_fn=bound_by_permissions)
    Path(path).chmod(rights)
    assert said.startswith(error)
    assert contents(Path.cwd()) == before


@pytest.mark.skipif(
    sys.platform != "linux" and os.geteuid() == 0, reason="only on Linux can root be bound by permissions"
)
def test_without_permission(run: str) -> None:
    Path("closed").mkdir()
    shutil.copy("text.txt", "closed")
    train = ("train", *TRAIN, "--data")
    forbidden("text.txt", 0o000, *train, "text.txt", error="corpus '")
    for place in ("closed", "closed/text.txt"):
        forbidden("closed", 0o000, *train, place, error=f"corpus '{place}': cannot be read: Permission denied. ")
    forbidden("closed", 0o500, *train, "text.txt", "--out-dir", "closed/run", error="files: closed/run could not be ")
    forbidden("closed", 0o000, *train, "text.txt", "--out-dir", "closed/run", error="files: ")
    forbidden(".", 0o500, *train, "text.txt", error="files: runs/text.txt-1 could not be written (Permission denied)")
    Path("runs").mkdir()
    forbidden("runs", 0o000, *train, "text.txt", error="files: ")
    for file in (
        "run/run.json",
        *map(str, Path(run).rglob("manifest.json")),
        *map(str, Path(run).rglob("config.json")),
    ):
        forbidden(file, 0o000, "resume", run, "--max-steps", "3", error="files: ")
    forbidden("run", 0o000, "generate", run, error="")
    forbidden("run/checkpoints", 0o000, "generate", run, error="")
    forbidden(
        "run/metrics.jsonl",
        0o400,
        "resume",
        run,
        "--max-steps",
        "3",
        error="files: run/metrics.jsonl could not be written",
    )
