"""The package as a whole: what importing it costs, its version, and its error types."""

from __future__ import annotations

import ast
import copy
import importlib.metadata
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import minitransformer
from minitransformer import errors

PACKAGE = Path(minitransformer.__file__).parent
ERRORS = [c for c in vars(errors).values() if inspect.isclass(c) and issubclass(c, errors.MiniTransformerError)]


def test_import_loads_nothing_heavy() -> None:
    program = "import sys, minitransformer; print(*{m.partition('.')[0] for m in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = set(run.stdout.split())
    assert "minitransformer" in loaded
    assert loaded.isdisjoint({"numba", "torch", "tqdm", "safetensors", "matplotlib", "hypothesis", "pytest"})


def test_type_hints_are_announced() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_version_is_a_literal_and_is_the_installed_one() -> None:
    """setuptools reads the version without importing the package only if it is a plain literal."""
    source = (PACKAGE / "version.py").read_text(encoding="utf-8")
    literals = [
        ast.literal_eval(node.value)
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert literals == [minitransformer.__version__]
    installed = {d.version for d in importlib.metadata.distributions(name="minitransformer")}
    assert installed <= {minitransformer.__version__}, "the package was installed at another version: install it again"


def test_require_returns_what_is_installed() -> None:
    assert errors.require("numpy", extra="plot", purpose="plot") is sys.modules["numpy"]


def test_require_names_the_pip_line() -> None:
    with pytest.raises(errors.MissingExtraError) as caught:
        errors.require("no_such_module", extra="plot", purpose="loss curve")
    assert str(caught.value).startswith("loss curve: needs the package 'no_such_module', which is not installed. ")
    assert 'pip install "minitransformer[plot]"' in str(caught.value)


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_have_one_form_and_can_be_copied(kind: type[errors.MiniTransformerError]) -> None:
    error = kind("linear", "expected width 4, got 3", "Transpose the weight.")
    assert (error.op, error.problem, error.fix) == (
        "linear",
        "expected width 4, got 3",
        "Transpose the weight.",
    )
    assert str(error) == "linear: expected width 4, got 3. Transpose the weight."
    for twin in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is kind
        assert str(twin) == str(error)
        assert (twin.op, twin.problem, twin.fix) == (error.op, error.problem, error.fix)


@pytest.mark.parametrize("kind", [kind for kind in ERRORS if kind is not errors.MiniTransformerError])
def test_errors_are_caught_as_the_builtin_too(kind: type[errors.MiniTransformerError]) -> None:
    builtin = [c for c in kind.__mro__ if c.__module__ == "builtins" and c not in (Exception, BaseException, object)]
    assert builtin
    with pytest.raises(builtin[0]):
        raise kind("linear", "expected width 4, got 3", "Transpose the weight.")
