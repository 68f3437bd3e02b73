"""No code from a file, ever: nothing in the package unpickles, evaluates, or unpacks what it has not looked at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "minitransformer"

MODULES = {"pickle", "cPickle", "_pickle", "pickletools", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
MODULES |= {"runpy", "code", "codeop", "imp"}
FUNCTIONS = {"eval", "exec", "compile", "execfile", "__import__"}  # built-in ones
METHODS = {"system", "popen", "spec_from_file_location", "exec_module", "run_path", "run_module"}
UNPACKING = {"extract", "extractall", "unpack_archive"}

# What a file may do all the same, and why.
ALLOWED = {
    "kernels/compiled.py imports pickle",  # Numba's cache is one; it lies in a folder that only this user can write
    "errors.py imports a module by a name that is not in the source",  # `require`, which is given names in the source
}


def complaints(file: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"{file} imports {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from (f"{file} {what}" for what in _of_call(node))


def _of_call(call: ast.Call) -> Iterator[str]:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    module = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    if (name in FUNCTIONS and module in ("", "builtins")) or name in METHODS or (module, name) == ("torch", "load"):
        yield f"calls {ast.unparse(function)}"
    if name == "import_module" and not _is_in_the_source(call.args[0]):
        yield "imports a module by a name that is not in the source"
    if "allow_pickle" in keywords and not _is(keywords["allow_pickle"], False):
        yield "reads arrays with pickles in them"
    if name in UNPACKING and not _is(keywords.get("filter"), "data"):
        yield "unpacks an archive without its data filter"
    if "shell" in keywords and not _is(keywords["shell"], False):
        yield "runs a shell"


def _is_in_the_source(argument: ast.expr) -> bool:
    """A string, or one that begins with the name of a package."""
    if isinstance(argument, ast.JoinedStr):
        argument = argument.values[0]
        if isinstance(argument, ast.FormattedValue):
            return ast.unparse(argument.value) == "_PACKAGE"
        return isinstance(argument, ast.Constant) and "." in str(argument.value)
    return isinstance(argument, ast.Constant)


def _is(value: ast.expr | None, constant: object) -> bool:
    return isinstance(value, ast.Constant) and type(value.value) is type(constant) and value.value == constant


def test_no_code_from_files() -> None:
    found = {
        complaint
        for path in ROOT.rglob("*.py")
        for complaint in complaints(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import pickle", "imports pickle"),
        ("def f():\n    from marshal import loads", "imports marshal"),
        ("import shelve as s", "imports shelve"),
        ("eval(text)", "calls eval"),
        ("x = [exec(line) for line in lines]", "calls exec"),
        ("import builtins\nbuiltins.eval(text)", "calls builtins.eval"),
        ("compile(text, 'name', 'exec')", "calls compile"),
        ("__import__(name)", "calls __import__"),
        ("torch.load(path)", "calls torch.load"),
        ("os.system(command)", "calls os.system"),
        ("import_module(config['class'])", "imports a module by a name that is not in the source"),
        ("importlib.import_module(f'{name}.x')", "imports a module by a name that is not in the source"),
        ("np.load(path, allow_pickle=True)", "reads arrays with pickles in them"),
        ("np.load(path, allow_pickle=flag)", "reads arrays with pickles in them"),
        ("tarfile.open(path).extractall(folder)", "unpacks an archive without its data filter"),
        ("archive.extractall(folder, filter='tar')", "unpacks an archive without its data filter"),
        ("subprocess.run(line, shell=True)", "runs a shell"),
    ],
)
def test_the_checker_complains(source: str, complaint: str) -> None:
    assert list(complaints("x.py", source)) == [f"x.py {complaint}"]


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "re.compile(pattern)",
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "archive.extractall(folder, filter='data')",
        "import_module('numba.core')",
        "import_module(f'minitransformer.{name}')",
        "subprocess.run(words)",
    ],
)
def test_the_checker_is_silent(source: str) -> None:
    assert list(complaints("x.py", source)) == []
