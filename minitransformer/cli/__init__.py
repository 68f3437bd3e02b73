"""The command line `minitransformer`: arguments, exit status, and errors in one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper

from minitransformer.cli.parser import parser
from minitransformer.cli.verbs import say
from minitransformer.errors import ConfigError, DataError, MiniTransformerError, NonFiniteError
from minitransformer.kernels import announcers

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    0 done, 1 stopped on numbers that are not finite, 2 wrong usage or input, 130 interrupted, also by a
    reader of our output who has gone. `--help` and `--version` raise `SystemExit`.
    """
    argv = sys.argv[1:] if argv is None else argv
    _reopen_closed_streams()
    try:
        with _plain_stdout(), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"minitransformer: {message}")
            arguments = parser().parse_args(argv)
            with _compilation_announced():
                return arguments.run(arguments)
    except KeyboardInterrupt:
        say("\nminitransformer: interrupted")
        return 130
    except BrokenPipeError:  # as in `| head`
        _drop_output()
        return 130
    except (MiniTransformerError, MemoryError, OSError) as error:
        if "--debug" in argv:
            raise
        with suppress(OSError):  # where stderr is what cannot be written
            say(f"minitransformer: {_refusal(error)}")
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()
        return 1 if isinstance(error, NonFiniteError) else 2


def _refusal(error: Exception) -> Exception:
    """`error` in the one form of all errors."""
    if isinstance(error, MemoryError) and not isinstance(error, MiniTransformerError):
        fix = "Make batch_size, block_size or the model smaller"
        return ConfigError("memory", f"there is too little: {error or 'no details'}", fix)
    if isinstance(error, OSError) and error.filename is not None:
        return DataError("files", f"{error.filename} cannot be used ({error.strerror})", "Check that path")
    if isinstance(error, OSError):  # of stdout: the floors below turn those of files into errors of their own
        return DataError("output", f"cannot be written: {error.strerror}", "Check where it goes")
    return error


def _reopen_closed_streams() -> None:
    """Lead to nowhere what came closed, as with `2>&-`.

    Else the next file that is opened would get its number, and what is meant for stderr would be written
    into it; and print would send messages to stdout.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


@contextmanager
def _compilation_announced() -> Iterator[None]:
    """Say what is being compiled, above a progress bar if there is one: the first run on a machine seems to hang."""

    def announce(name: str) -> None:
        from tqdm import tqdm

        tqdm.write(f"compiling {name}, once for this machine and version", file=sys.stderr)

    announcers.append(announce)
    try:
        yield
    finally:
        announcers.remove(announce)


@contextmanager
def _plain_stdout() -> Iterator[None]:
    r"""Characters that the encoding of stdout lacks come out as \uXXXX, as they do on stderr; flushed at the end."""
    stream = sys.stdout
    if not isinstance(stream, TextIOWrapper):  # closed, or replaced by something that takes any text
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.flush()
        stream.reconfigure(errors=before)


def _drop_output() -> None:
    """Keep Python from flushing, at its end, what could not be written: it would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
