"""The pytest plugin, in pytest runs of its own: what it costs, the profiles, the fixture, the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from children import ENVIRONMENT

CHECKS = """
import numpy as np
import minitransformer.functional as F
from minitransformer.gradients import gradcheck

def test_right():
    gradcheck(F.gelu, np.ones(3))
    gradcheck(F.softmax, np.ones(3), method="central", mode="directional")

def test_wrong():
    gradcheck((lambda x: (x * x, x), lambda dout, x: dout * x), np.ones(3))
"""
RUN = "import sys; sys.exit(pytest.main(sys.argv[1:]))"


def run_pytest(folder: Path, *arguments: str, program: str = RUN, **environment: str) -> str:
    """What pytest prints in a folder of its own; the plugin is loaded as an installed one would be."""
    argv = [sys.executable, "-c", f"import pytest\n{program}", "-p", "minitransformer_pytest", "-p", "no:cacheprovider"]
    env = ENVIRONMENT | {"PYTEST_ADDOPTS": ""} | environment  # what our own run was told is not for this one
    run = subprocess.run([*argv, *arguments], env=env, cwd=folder, capture_output=True, encoding="utf-8")
    return run.stdout + run.stderr


def write(folder: Path, text: str, name: str = "test_it.py") -> None:
    (folder / name).write_text(text, encoding="utf-8")


def test_nothing_is_imported_until_it_is_used(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
import sys

def test_it(request):
    assert request.config.pluginmanager.has_plugin("minitransformer_pytest")
    assert not {"numpy", "numba", "minitransformer"} & sys.modules.keys()
""",
    )
    assert "1 passed" in run_pytest(tmp_path)


def test_pytest_works_where_hypothesis_and_numpy_are_missing(tmp_path: Path) -> None:
    write(tmp_path, "def test_it(): pass")
    program = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("hypothesis", "numpy", "numba"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
sys.exit(pytest.main(sys.argv[1:]))
"""
    out = run_pytest(tmp_path, program=program, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # else Hypothesis's own is loaded
    assert "1 passed" in out


def test_the_profiles_are_there(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
from hypothesis import settings
from minitransformer_pytest import register_profiles

register_profiles()

def test_it():
    dev, ci, thorough = (settings.get_profile(f"mt-{name}") for name in ("dev", "ci", "thorough"))
    assert (dev.max_examples, ci.max_examples, thorough.max_examples) == (20, 50, 1000)
    assert dev.deadline is ci.deadline is thorough.deadline is None
    assert ci.derandomize
""",
    )
    assert "1 passed" in run_pytest(tmp_path)


def test_the_entry_points_are_declared() -> None:
    """Both lead to names that exist, under the name by which `-p` would load the plugin a second time."""
    import configparser

    import minitransformer_pytest

    parser = configparser.ConfigParser()
    parser.read(Path(minitransformer_pytest.__file__).with_name("setup.cfg"), encoding="utf-8")
    points = parser["options.entry_points"]
    assert points["pytest11"].split() == ["minitransformer_pytest", "=", "minitransformer_pytest"]
    assert points["hypothesis"].split() == ["minitransformer", "=", "minitransformer_pytest:register_profiles"]
    assert parser["options"]["py_modules"] == "minitransformer_pytest"
    assert callable(minitransformer_pytest.register_profiles)


def test_hypothesis_registers_the_profiles_where_the_package_is_installed(tmp_path: Path) -> None:
    """By its own entry point, so that a conftest can load one and `--hypothesis-profile` knows them."""
    installed = tmp_path / "minitransformer-0.dist-info"
    installed.mkdir()
    write(installed, "[hypothesis]\nminitransformer = minitransformer_pytest:register_profiles\n", "entry_points.txt")
    write(installed, "Metadata-Version: 2.1\nName: installed-minitransformer\nVersion: 0\n", "METADATA")
    write(tmp_path, "from hypothesis import settings\nsettings.load_profile('mt-thorough')\n", "conftest.py")
    write(tmp_path, "from hypothesis import settings\ndef test_it(): assert settings().max_examples == 50\n")
    environment_path = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nsys.exit(pytest.main(sys.argv[1:]))"
    out = run_pytest(tmp_path, "--hypothesis-profile=mt-ci", program=environment_path)
    assert "1 passed" in out


def test_kernels_are_compiled_once_a_session(tmp_path: Path) -> None:
    write(
        tmp_path,
        """
import pytest
from minitransformer.kernels import compiled

calls = []

@pytest.fixture(autouse=True, scope="session")
def counted():
    patch = pytest.MonkeyPatch()
    job = type("Job", (), {"run": lambda self: calls.append(self)})
    patch.setattr(compiled, "all_kernels", lambda: [job(), job()])
    yield
    patch.undo()

def test_one(counted, compiled_kernels):
    assert len(calls) == 2

def test_two(compiled_kernels):
    assert len(calls) == 2
""",
    )
    assert "2 passed" in run_pytest(tmp_path)


def test_gradcheck_report_as_text(tmp_path: Path) -> None:
    write(tmp_path, CHECKS)
    out = run_pytest(tmp_path, "--gradcheck-report=checks.txt")
    assert "1 failed, 1 passed" in out
    assert "gradchecks: 3, of which 1 failed; table in checks.txt" in out
    head, *rows, summary = (tmp_path / "checks.txt").read_text(encoding="utf-8").splitlines()
    assert head.split() == ["test", "name", "method", "mode", "compared", "worst", "passed"]
    assert summary == "gradchecks: 3, of which 1 failed"
    cells = [row.split() for row in rows]
    assert [(c[0], c[1], c[2], c[3], c[-1]) for c in cells] == [
        ("test_it.py::test_right", "gelu", "complex", "full", "yes"),
        ("test_it.py::test_right", "softmax", "central", "directional", "yes"),
        ("test_it.py::test_wrong", "<lambda>", "complex", "full", "NO"),
    ]
    assert all(int(c[4]) > 0 for c in cells)
    assert [float(c[5]) <= 1 for c in cells] == [True, True, False]


def test_gradcheck_report_as_json(tmp_path: Path) -> None:
    write(tmp_path, CHECKS)
    run_pytest(tmp_path, "--gradcheck-report=checks.json", "-k", "wrong or right")
    checks = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))["gradchecks"]
    assert [(c["name"], c["passed"]) for c in checks] == [("gelu", True), ("softmax", True), ("<lambda>", False)]
    assert checks[2]["worst"] > 1
    assert checks[0].keys() == {"test", "name", "method", "mode", "compared", "worst", "passed"}


def test_no_gradcheck_is_said_so(tmp_path: Path) -> None:
    write(tmp_path, "def test_it(): pass")
    assert "gradchecks: 0, of which 0 failed" in run_pytest(tmp_path, "--gradcheck-report=checks.json")
    assert json.loads((tmp_path / "checks.json").read_text(encoding="utf-8")) == {"gradchecks": []}


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    write(tmp_path, "def test_it(): pass")
    out = run_pytest(tmp_path, "--gradcheck-report=nowhere/checks.txt")
    assert "--gradcheck-report: there is no folder nowhere" in out
    assert "passed" not in out
