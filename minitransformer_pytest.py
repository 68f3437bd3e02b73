"""The pytest plugin of minitransformer: a fixture, an option, and Hypothesis profiles.

It lies beside the package and not inside, because every run of pytest imports it where minitransformer is
installed, and whatever lies inside imports the package and NumPy. Here nothing is imported until it is used.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("minitransformer").addoption(
        "--gradcheck-report",
        metavar="FILE",
        type=Path,
        help="write a table of all gradchecks that the tests make, as JSON if FILE ends in .json",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--gradcheck-report")
    if path is None:
        return
    if not path.parent.is_dir():
        raise pytest.UsageError(f"--gradcheck-report: there is no folder {path.parent}")
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--gradcheck-report gathers the checks of one process: run it without -n")
    from minitransformer.testing.plugin import GradcheckTable

    config.pluginmanager.register(GradcheckTable(path))


@pytest.fixture(scope="session")
def compiled_kernels() -> None:
    """All kernels compiled, once a session, so that no test waits for the first call of one."""
    from minitransformer.kernels.compiled import all_kernels

    for job in all_kernels():
        job.run()


def register_profiles() -> None:
    """The Hypothesis profiles mt-dev, mt-ci and mt-thorough; Hypothesis calls this when it is imported.

    No deadline anywhere: the first call of a kernel compiles it, and the machine may be shared. The prefix keeps
    clear of Hypothesis's own profile named `ci`.
    """
    from hypothesis import HealthCheck, settings

    settings.register_profile("mt-dev", deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("mt-ci", settings.get_profile("mt-dev"), max_examples=50, derandomize=True)
    settings.register_profile("mt-thorough", settings.get_profile("mt-dev"), max_examples=1000)
