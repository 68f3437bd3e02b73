"""The floors of the house: a file imports only from lower floors, or from its own floor, listed before it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "minitransformer"

# One floor a paragraph, from the ground up; within a floor, later files may import earlier ones. `name` is
# that module alone, `name/` it and its whole folder, where files may import each other if no circle forms.
HOUSE = """
    version errors context memory checks render random threads files

    kernels kernels.store kernels.compiled kernels.entrance kernels.philox kernels.simd/
    kernels.gpu.arrays kernels.gpu.memory kernels.gpu.simulator kernels.gpu.kernel kernels.gpu/ kernels/

    autograd.base autograd/

    masks/
    ops.arithmetic ops.shape ops.reduce ops.linear ops.activation ops.dropout
    ops.norm ops.embedding ops.position ops.attention ops.linear_attention ops.feedforward ops.loss
    ops.sublayers ops.stream ops.encoder_layer ops.decoder_layer ops.gpt_block ops
    functional.attention functional/

    nn.module nn/

    checkpoint generate/ diagnose/ gradients/

    models/

    data/ optim/ metrics/ interpret/

    training/ testing/

    doctor/ bench/ verify cli/
"""
PLACES = HOUSE.split()
ROOF = {"", "__main__"}  # may import anything, and nothing may import it

# What may be imported besides the standard library, and in which folders ("" is everywhere).
OUTSIDE = {
    "numpy": ("",),
    "numba": ("kernels", "threads", "bench.gpu"),
    "numba.cuda": (),
    "llvmlite": ("kernels",),
    "safetensors": ("",),
    "threadpoolctl": ("threads",),
    "tqdm": ("",),
    "hypothesis": ("testing",),
    "pytest": ("testing",),
}
# What is optional is imported by name when it is needed: `errors.require("torch")`, which names the pip line, or
# `import_module`.
OPTIONAL = {
    **dict.fromkeys(("torch", "jax"), ("testing", "bench")),
    **dict.fromkeys(("autograd", "mygrad", "hypothesis"), ("testing",)),
    "matplotlib": ("bench",),
    "numba.core": ("threads",),
    **dict.fromkeys(("numba_cuda", "numba.cuda", "cupy", "cuda.bindings"), ("kernels.gpu", "doctor")),
}


def inside(module: str, folder: str) -> bool:
    return not folder or f"{module}.".startswith(f"{folder}.")


def allowed(module: str, name: str, places: dict[str, tuple[str, ...]]) -> bool:
    """Whether `module` lies in a place of `name`, or else of the nearest package around it."""
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    while name not in places and name:
        name = name.rpartition(".")[0]
    return any(inside(module, folder) for folder in places.get(name, ()))


def place_of(module: str) -> int:
    """Index in PLACES, the module's own name before its folder's; -1 if it has none."""
    if module in PLACES:
        return PLACES.index(module)
    return next((i for i, p in enumerate(PLACES) if p.endswith("/") and inside(module, p[:-1])), -1)


def imports(file: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a file, wherever in the file it stands."""
    package = ["minitransformer", *Path(file).parent.parts]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) + 1 - node.level] if node.level else []
            origin = [*origin, node.module] if node.module else origin
            yield from ((node.lineno, ".".join([*origin, alias.name])) for alias in node.names)


def imports_by_name(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of what is imported by a call with its name, if that stands there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and isinstance(name := node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("require", "import_module") and isinstance(name.value, str):
                yield node.lineno, name.value


def holder(name: str, modules: Collection[str]) -> str:
    """The module that a dotted name lies in: `ops.linear.linear_forward` lies in `ops.linear`."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def complaints(files: dict[str, str]) -> list[str]:
    """What is wrong with the imports of a package, given as path -> source."""
    modules = {f.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", "."): f for f in files}
    neighbours: dict[str, set[str]] = {}
    found = []
    for module, file in modules.items():
        place = len(PLACES) if module in ROOF else place_of(module)
        if place < 0:
            found.append(f"{file} is on no floor. Give it its place in HOUSE, tests/{Path(__file__).name}")
            continue
        for line, name in imports_by_name(files[file]):
            if not allowed(module, name, OPTIONAL):
                found.append(f"{file}:{line} may not ask for {name}")
        for line, name in imports(file, files[file]):
            top, _, rest = name.partition(".")
            if top != "minitransformer":
                if not allowed(module, name, OUTSIDE):
                    found.append(f"{file}:{line} may not import {top}. Optional packages: errors.require")
                continue
            target = holder(rest, modules)
            if module in ROOF or target == module:
                continue
            if target in ROOF or place_of(target) > place:
                found.append(f"{file}:{line} imports {target or name}, which is not below it")
            elif place_of(target) == place:
                neighbours.setdefault(module, set()).add(target)
                if PLACES[place] == "kernels/" and module.split(".")[1] != target.split(".")[1]:
                    found.append(f"{file}:{line} imports {target}, a kernel of another family")
    try:
        TopologicalSorter(neighbours).prepare()
    except CycleError as error:
        found.append(f"circle of imports: {', '.join(error.args[1])}")
    return found


def test_every_file_imports_only_downwards() -> None:
    files = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in ROOT.rglob("*.py")}
    assert {"__init__.py", "errors.py"} <= files.keys()
    assert complaints(files) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("errors.py", "import minitransformer.nn", "errors.py:1 imports nn, which is not below it"),
        ("errors.py", "from . import nn", "errors.py:1 imports nn, which is not below it"),
        ("errors.py", "from . import __version__", "errors.py:1 imports minitransformer.__version__, which"),
        ("autograd.py", "def f():\n    from .ops.linear import x", "autograd.py:2 imports ops.linear, which"),
        (
            "autograd.py",
            "if TYPE_CHECKING:\n    from .nn.module import x",
            "autograd.py:2 imports nn.module, wh",
        ),
        ("ops/linear.py", "from .norm import x", "ops/linear.py:1 imports ops.norm, which is not below it"),
        ("ops/linear.py", "from . import norm", "ops/linear.py:1 imports ops.norm, which is not below it"),
        (
            "kernels/rowwise/cpu.py",
            "from ..pointwise import cpu",
            "kernels.pointwise.cpu, a kernel of another",
        ),
        ("kernels/__init__.py", "from .rowwise import cpu", "kernels.rowwise.cpu, which is not below it"),
        ("nn/linear.py", "from . import Linear", "circle of imports"),
        ("autograd.py", "def f():\n    import numba.core", "autograd.py:2 may not import numba"),
        ("testing/laws.py", "import torch", "testing/laws.py:1 may not import torch"),
        ("generate.py", "from hypothesis import given", "generate.py:1 may not import hypothesis"),
        ("ops/new.py", "", "ops/new.py is on no floor"),
        ("kernels/rowwise/cpu.py", "from numba import cuda", "kernels/rowwise/cpu.py:1 may not import numba"),
        ("kernels/rowwise/cpu.py", "import cupy", "kernels/rowwise/cpu.py:1 may not import cupy"),
        ("kernels/rowwise/cpu.py", "require('cupy')", "kernels/rowwise/cpu.py:1 may not ask for cupy"),
        (
            "errors.py",
            "import importlib as i\ni.import_module('cuda.bindings.x')",
            "errors.py:2 may not ask for cuda.b",
        ),
        ("kernels/pointwise/cpu.py", "from ..gpu import arrays\nfrom ..rowwise import cpu", "a kernel of another"),
        ("kernels/gpu/arrays.py", "from ..rowwise import cpu", "kernels.rowwise.cpu, which is not below it"),
    ],
)
def test_the_checker_complains(file: str, source: str, complaint: str) -> None:
    package = {
        "__init__.py": "from .nn import Linear",
        "errors.py": "import sys",
        "autograd.py": "import numpy as np\nfrom .errors import ShapeError",
        "kernels/__init__.py": "from .. import errors",
        "kernels/gpu/arrays.py": "require('cupy')",
        "kernels/pointwise/cpu.py": "from ..gpu import arrays",
        "kernels/rowwise/cpu.py": "from numba import njit\nfrom .. import serve",
        "ops/linear.py": "from ..kernels.rowwise import cpu",
        "ops/norm.py": "from . import linear",
        "nn/__init__.py": "from .linear import Linear",
        "nn/module.py": "",
        "nn/linear.py": "from minitransformer.nn.module import Module\nfrom minitransformer.ops import norm",
        "testing/laws.py": "import hypothesis.strategies as st",
    }
    assert complaints(package) == []
    found = complaints({**package, file: source})
    assert len(found) == 1
    assert complaint in found[0]
