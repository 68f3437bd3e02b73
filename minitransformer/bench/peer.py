"""A process of its own for PyTorch, or for whatever must be measured alone: the parent's handle.

Both ends talk in lines of JSON over pipes and wait on them without using a core. The program at the
other end is `jobs.py`. A process of its own, because the waiting policy of OpenMP is read once, when
torch is loaded, because its threads would stand in the way of ours, and because memory has only one peak.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from minitransformer import errors
from minitransformer.errors import MiniTransformerError, MissingExtraError

# How OpenMP's threads wait for work: spinning for a while, or asleep. Which is faster depends on the load.
POLICIES = ("default", "passive")
INSTALL = 'Run: pip install "minitransformer[peers]"'
_SETTINGS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def installed() -> bool:
    """Whether there is a torch to compare with; does not import it."""
    return importlib.util.find_spec("torch") is not None


class Peer:
    """The other process: `make` what it is to work on, then `call` methods of that."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def make(self, job: str, **options: Any) -> Peer:
        """Make the job of that name in `jobs.py`, in place of the last one; returns this handle.

        Raises what the job raises in the other process.
        """
        self.send("make", job=job, **options)
        self.receive()
        return self

    def call(self, method: str, **options: Any) -> Any:
        """What that method of the job returns there, as JSON can hold it. Raises what it raises."""
        self.send(method, **options)
        return self.receive()

    def send(self, method: str, **options: Any) -> None:
        """Ask, and do not wait."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps({"method": method, "options": options}) + "\n")
            self._process.stdin.flush()

    def receive(self) -> Any:
        """The answer to the oldest question."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MissingExtraError(
                "bench",
                f"the PyTorch process ended with status {self._process.wait()}; what it said stands above",
                'Try python -c "import torch"',
            )
        answer = json.loads(line)
        if "error" in answer:
            kind: type[MiniTransformerError] = getattr(errors, answer["error"])
            raise kind(*answer["arguments"])
        return answer["result"]


def child_environment() -> dict[str, str]:
    """Ours, in which a child finds this very package, also in a source tree that is not installed."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


@contextmanager
def process(policy: str = "default") -> Iterator[Peer]:
    """A process whose OpenMP waits as `policy` says; it ends with the block, however that ends.

    `Peer.make` raises `MissingExtraError` if the process does not come up.
    """
    environment = {name: value for name, value in child_environment().items() if name not in _SETTINGS}
    if policy == "passive":
        environment["OMP_WAIT_POLICY"] = "passive"
    child = subprocess.Popen(
        [sys.executable, "-m", "minitransformer.bench.jobs"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the child below
    )
    try:
        yield Peer(child)
    finally:
        child.kill()
        child.wait()
        assert child.stdin is not None and child.stdout is not None
        child.stdout.close()
        with suppress(BrokenPipeError):  # an unsent request
            child.stdin.close()


def of_each_policy(stack: ExitStack) -> dict[str, Peer]:
    """A process for each waiting policy, which end with `stack`; none where torch is not installed."""
    if not installed():
        return {}
    return {f"torch ({policy})": stack.enter_context(process(policy)) for policy in POLICIES}
