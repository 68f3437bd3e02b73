"""What tests run under: Hypothesis profiles, the markers `thorough`, `peers` and `cuda`, sealed global state."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl  # noqa: F401  (sets an environment variable when first imported: not in the middle of a test)
from hypothesis import Phase, register_random, settings

from minitransformer.autograd import OPS
from minitransformer.random import manual_seed
from minitransformer.threads import get_num_threads
from minitransformer_pytest import register_profiles

register_profiles()  # Hypothesis does this itself where the package is installed
# For runs that only ask whether a test fails, as zoo.py and mutate.py do: no search for a smaller example.
settings.register_profile("mt-fail-fast", settings.get_profile("mt-ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("MT_PROFILE", "mt-ci" if os.environ.get("CI") else "mt-dev"))

LEFT_OUT = pytest.StashKey[int]()


class PackageStream:
    """The package's own random stream, as Hypothesis wants it: restarted before every example."""

    def seed(self, seed: int) -> None:
        manual_seed(seed)

    def getstate(self) -> None:
        """Nothing to keep: every test starts at seed 0."""

    def setstate(self, state: None) -> None:
        manual_seed(0)


PACKAGE_STREAM = PackageStream()  # Hypothesis holds it weakly
register_random(PACKAGE_STREAM)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-peers",
        action="store_true",
        help="a test against a peer that is not installed is an error, not a skip",
    )
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="a test that compiles for a GPU is an error, not a skip, where numba-cuda is not installed",
    )
    parser.addoption("--install-bug", metavar="NAME", help="run each test with this bug of the zoo in the package")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks how many processes are asked for
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes where pytest-xdist is installed, tests that are named in one.

    Never a process that pytest-xdist has started, nor what a test starts in one: they would multiply.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.usepdb
    if whole and getattr(config.option, "numprocesses", 0) is None and "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "thorough" in config.option.markexpr:
        return
    thorough = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if item not in thorough]
    config.hook.pytest_deselected(items=thorough)
    config.stash[LEFT_OUT] = len(thorough)
    if hasattr(config, "workeroutput"):  # what a process of pytest-xdist tells the one that has started it
        config.workeroutput["left out"] = len(thorough)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)


def pytest_collection_finish() -> None:
    if "torch" in sys.modules:
        raise pytest.UsageError("a test file imports torch while it is collected; import it in its peers tests")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"thorough tests left out: {count}; -m thorough runs them")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not (name := item.config.getoption("--install-bug")):
        return (yield)
    from minitransformer.testing import bugs  # imports the upper floors: not for every run

    with bugs.install(name):
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, module in (("peers", "torch"), ("cuda", "numba_cuda")):
        if item.get_closest_marker(marker) and importlib.util.find_spec(module) is None:
            reason = f'needs the {marker} extra: pip install "minitransformer[{marker}]"'
            if item.config.getoption(f"--require-{marker}"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)


def global_state() -> dict[str, object]:
    kind, key, *position = np.random.get_state()  # noqa: NPY002 (the legacy stream is the global one)
    return {
        "a context variable": {v.name: x for v, x in copy_context().items() if "minitransformer" in v.name},
        "the number of threads": get_num_threads(),
        "the registry of ops": set(OPS),
        "NumPy's error handling": np.geterr(),
        "NumPy's print options": np.get_printoptions(),
        "NumPy's random state": (kind, key.tobytes(), *position),
        "Python's random state": random.getstate(),
        "the environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"},
        "the working directory": Path.cwd(),
    }


@pytest.fixture(autouse=True)
def sealed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start each test at seed 0; fail one that changes process-wide state, or imports torch unmarked."""
    manual_seed(0)
    before, torch_before = global_state(), "torch" in sys.modules
    yield
    if "torch" in sys.modules and not torch_before and not request.node.get_closest_marker("peers"):
        pytest.fail("imports torch without the marker `peers`", pytrace=False)
    if changed := [name for name, value in global_state().items() if value != before[name]]:
        pytest.fail(f"leaves {' and '.join(changed)} changed", pytrace=False)
