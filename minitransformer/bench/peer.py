"""PyTorch in a process of its own: the parent's handle, and the program that runs there.

Both ends talk in lines of JSON over pipes and wait on them without using a core. A process of its own,
because the waiting policy of OpenMP is read once, when torch is loaded, and because its threads would
stand in the way of ours.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minitransformer.bench.recipe import Block, Recipe, time_steps
from minitransformer.bench.torch_twin import Twin
from minitransformer.errors import MissingExtraError, require
from minitransformer.threads import get_num_threads

# How OpenMP's threads wait for work: spinning for a while, or asleep. Which is faster depends on the load.
POLICIES = ("default", "passive")
INSTALL = 'Run: pip install "minitransformer[peers]"'
_SETTINGS = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


def installed() -> bool:
    """Whether there is a torch to compare with; does not import it."""
    return importlib.util.find_spec("torch") is not None


class Peer:
    """The twin in the other process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def build(self, recipe: Recipe) -> None:
        """Start the recipe from untrained weights."""
        self._ask(do="build", recipe=recipe.to_dict(), threads=get_num_threads())

    def steps(self, first: int, count: int) -> Block:
        """Train `count` steps from index `first`."""
        return Block(**self._ask(do="steps", first=first, count=count))

    def evaluate(self) -> float:
        """The validation loss."""
        loss: float = self._ask(do="evaluate")["loss"]
        return loss

    def _ask(self, **request: Any) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise MissingExtraError(
                "bench",
                f"the PyTorch process ended with status {process.wait()}; what it said stands above",
                'Try python -c "import torch"',
            )
        reply: dict[str, Any] = json.loads(answer)
        return reply


@contextmanager
def peer(recipe: Recipe, policy: str) -> Iterator[Peer]:
    """PyTorch, ready to train `recipe`, waiting as `policy` says; it ends with the block, however that ends.

    Raises `MissingExtraError` if the process does not come up.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
    if policy == "passive":
        environment["OMP_WAIT_POLICY"] = "passive"
    # The child must find this very package, also in a source tree that is not installed.
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    process = subprocess.Popen(
        [sys.executable, "-m", "minitransformer.bench.peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the child below
    )
    try:
        handle = Peer(process)
        handle.build(recipe)
        yield handle
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        with suppress(BrokenPipeError):  # an unsent request
            process.stdin.close()


def main() -> None:
    """Answer requests until the parent closes its end, or is no more."""
    torch = require("torch", extra="peers", purpose="the PyTorch twin")
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict[str, Any] = {}
        if request["do"] == "build":
            torch.set_num_threads(request["threads"])
            recipe = Recipe.from_dict(request["recipe"])
            model, data, validation = recipe.build()
            twin = Twin(model.config, model.state_dict(), recipe.train)
        elif request["do"] == "steps":
            reply = time_steps(twin, recipe, data, request["first"], request["count"])._asdict()
        else:
            reply = {"loss": twin.evaluate(recipe.validation_batches(validation))}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
