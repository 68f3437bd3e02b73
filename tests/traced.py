"""`minitransformer` under strace: what it asks of the system, and a system that refuses or kills it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import minitransformer

# Whatever changes a disk; "?" because not every processor has every one of them.
CALLS = (
    "openat,?open,?creat,write,pwrite64,writev,fsync,fdatasync,?rename,?renameat,renameat2,?link,linkat,?symlink,"
    "symlinkat,?mkdir,mkdirat,?unlink,unlinkat,?rmdir,truncate,ftruncate"
)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(minitransformer.__file__).parents[1]),
    "PYTHONDONTWRITEBYTECODE": "1",  # the same calls every time
    "PYTHONHASHSEED": "0",
}


class Call(NamedTuple):
    """The `nth` call of this name in the main thread, from 1, with the paths that it is about."""

    name: str
    nth: int
    paths: tuple[Path, ...]
    text: str

    @property
    def changes(self) -> bool:
        """Whether it can change the disk, or is how a folder is opened to be synced or emptied."""
        return self.name not in ("open", "openat") or "O_CREAT" in self.text or "O_DIRECTORY" in self.text


@cache
def why_not() -> str:
    """Why nothing can be traced here; "" where it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip().splitlines()[-1] if tried.returncode else ""


def traced(
    arguments: list[str], log: Path, *options: str, messages: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run a command of minitransformer under strace, its calls into `log`, its messages to a descriptor."""
    command = ["strace", "-f", "-y", "-s", "1", "-o", str(log), "-e", f"trace={CALLS}", *options]
    return subprocess.run(
        [*command, sys.executable, "-m", "minitransformer", *arguments],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=messages,
        text=True,
        check=False,
        timeout=120,
    )


def calls(log: Path) -> list[Call]:
    """The calls of the main thread, in order."""
    found: list[Call] = []
    counts: dict[str, int] = {}
    main = ""
    for line in log.read_text().splitlines():
        thread, _, text = line.partition(" ")
        main = main or thread
        begun = re.match(r"(\w+)\(", text.lstrip())
        if thread != main or begun is None:  # another thread, a signal, or the end
            continue
        name = begun[1]
        counts[name] = counts.get(name, 0) + 1
        descriptor = re.match(r"\w+\(\d+<([^>]*)>", text.lstrip())
        if descriptor and name in ("write", "pwrite64", "writev", "fsync", "fdatasync", "ftruncate"):
            paths = [descriptor[1]]
        else:
            paths = [os.path.join(*pair) for pair in re.findall(r'(?:<([^>]*)>, )?"([^"]*)"', text)]  # noqa: PTH118
        found.append(Call(name, counts[name], tuple(map(Path, paths)), text.lstrip()))
    return found


def under(call: Call, folder: Path) -> bool:
    return any(path == folder or folder in path.parents for path in call.paths)
