"""The formulas in docs/derivations are run, and compared with the operations that they derive."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.autograd import OPS
from minitransformer.testing.calls import CALLS, Inputs

FOLDER = Path(__file__).parents[1] / "docs" / "derivations"
ANCHOR = re.compile(r"^\(op-(.+)\)=$", re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code(text: str) -> list[str]:
    return [match[1] for match in BLOCK.finditer(text)]


def sections(text: str) -> list[tuple[str, str]]:
    """(op, what stands between its anchor and the next one)."""
    _, *parts = ANCHOR.split(text)
    return list(zip(parts[::2], parts[1::2], strict=True))


def complaints(pages: Collection[str], ops: Collection[str]) -> list[str]:
    """What is wrong with the sections of some pages, before anything is run."""
    found, seen = [], set()
    for name, section in (pair for page in pages for pair in sections(page)):
        if name not in ops:
            found.append(f"op-{name} derives no registered op")
        if name in seen:
            found.append(f"op-{name} is there twice")
        seen.add(name)
        if not section.startswith("\n## "):
            found.append(f"op-{name} is not followed by a heading")
        if len(code(section)) != 1:
            found.append(f"op-{name} has {len(code(section))} formulas, expected one")
    return [*found, *(f"{name} has no derivation" for name in ops if name not in seen)]


HELPERS = code((FOLDER / "index.md").read_text(encoding="utf-8"))[0]  # sum_to


def compare(name: str, formula: str, problem: Inputs, rng: np.random.Generator) -> None:
    """Run a formula on a problem, and hold the output and every gradient against the op's own."""
    op, (inputs, settings) = OPS[name], problem
    with np.errstate(all="ignore"):  # as where an Op calls its pair
        out, saved = op.forward(*inputs, **settings)
        douts = [rng.standard_normal(np.shape(y)).astype(y.dtype) for y in (out if op.many else [out])]
        gradients = op.backward(tuple(douts) if op.many else douts[0], saved)
        call = inspect.signature(op.forward).bind(*inputs, **settings)
        call.apply_defaults()
        results: dict[str, Any] = {"np": np, **call.arguments}
        results.update({"douts": douts} if op.many else {"dout": douts[0]})
        exec(HELPERS, results)
        exec(formula, results)

    expected = {"outs" if op.many else "out": out}
    parameters = list(inspect.signature(op.forward).parameters.values())
    if parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        expected[f"d{parameters[0].name}"] = gradients
    else:
        expected.update((f"d{p.name}", g) for p, g in zip(parameters, gradients, strict=False) if g is not None)
    assert gradients
    for result, wanted in expected.items():
        assert result in results, f"the formula of {name} does not define {result}"
        pieces = [wanted] if isinstance(wanted, np.ndarray | np.generic) else wanted
        ours = [results[result]] if pieces is not wanted else results[result]
        for a, b in zip(map(np.asarray, ours), map(np.asarray, pieces), strict=True):
            where = f"{result} of {name}"
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, strict=True, err_msg=where)


PAGES = [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))]
SECTIONS = dict(pair for page in PAGES for pair in sections(page))


def test_every_op_has_its_derivation_and_its_problem() -> None:
    assert complaints(PAGES, OPS) == []
    assert CALLS.keys() == OPS.keys()


@pytest.mark.parametrize("name", sorted(OPS))
@given(seed=st.integers(0, 2**32 - 1))
def test_formula_agrees_with_op(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    compare(name, code(SECTIONS[name])[0], CALLS[name](rng), rng)


RIGHT = "(op-exp)=\n## Exponential\n\n```python\nout = np.exp(x)\ndx = dout * out\n```\n"


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("", "exp has no derivation"),
        (RIGHT.replace("python", "text"), "op-exp has 0 formulas, expected one"),
        (RIGHT + "```python\n```\n", "op-exp has 2 formulas, expected one"),
        (RIGHT.replace("## ", ""), "op-exp is not followed by a heading"),
        (RIGHT + RIGHT, "op-exp is there twice"),
        (RIGHT + RIGHT.replace("exp", "old"), "op-old derives no registered op"),
    ],
)
def test_the_checker_complains(page: str, complaint: str) -> None:
    assert complaints([RIGHT], ["exp"]) == []
    assert complaints([page], ["exp"]) == [complaint]


@pytest.mark.parametrize(
    ("formula", "complaint"),
    [
        ("", "does not define out"),
        ("out = np.exp(x)", "does not define dx"),
        ("out = np.exp(x) + 1e-11; dx = dout * out", "out of exp"),
        ("out = np.exp(x); dx = dout * out + 1e-11", "dx of exp"),
        ("out = np.exp(x); dx = (dout * out)[None]", "dx of exp"),
    ],
)
def test_a_wrong_formula_fails(formula: str, complaint: str) -> None:
    problem, rng = ([np.zeros(3)], {}), np.random.default_rng(0)
    compare("exp", "out = np.exp(x); dx = dout * out", problem, rng)
    with pytest.raises(AssertionError, match=complaint):
        compare("exp", formula, problem, rng)


def test_one_wrong_gradient_of_several_fails() -> None:
    problem, rng = ([np.ones((2, 3)), np.ones((1, 3))], {"dim": 0}), np.random.default_rng(0)
    out = "out = np.concatenate(arrays, dim); "
    compare("concat", out + "darrays = dout[:2], dout[2:]", problem, rng)
    with pytest.raises(AssertionError, match="darrays of concat"):
        compare("concat", out + "darrays = dout[:2], dout[:1]", problem, rng)
    with pytest.raises(ValueError, match="zip"):
        compare("concat", out + "darrays = [dout[:2]]", problem, rng)
