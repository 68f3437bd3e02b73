"""Public functions with arguments of the wrong kind: a result or one of our errors, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import calls
import numpy as np
import pytest
from calls import Case, Edit, Place, cases, difference, laid_out, little_memory, perform, verdict
from hypothesis import given, settings
from material import Valid, call, real
from valid_calls import REFUSED, VALID, public_names
from wrong_values import LAYOUTS

from minitransformer.errors import MiniTransformerError

EXAMPLES = settings.default.max_examples  # of the profile


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Paths are drawn too: whatever is written is written here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        yield


def test_every_public_name_has_a_call() -> None:
    names = {name.split(" ")[0] for name in VALID}
    assert set(public_names()) - names == set()


@pytest.mark.parametrize("name", VALID)
def test_the_calls_are_valid(name: str) -> None:
    with calls.put_back():
        if name in REFUSED:
            with pytest.raises((MiniTransformerError, TypeError)):
                perform(VALID[name]())
        else:
            perform(VALID[name]())


@settings(max_examples=8 * EXAMPLES)
@given(cases())
def test_spoilt_calls_are_refused_or_return(case: Case) -> None:
    with little_memory():
        assert verdict(case) is None


@settings(max_examples=8 * EXAMPLES)
@given(laid_out())
def test_how_an_array_lies_in_memory_changes_no_result(drawn: tuple[str, Place, str]) -> None:
    with calls.put_back():
        assert difference(*drawn) is None


@pytest.mark.thorough
def test_ten_thousand_calls() -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(here / "run.py"), str(seed), "10000"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(child.stdout)
    assert child.returncode == 0, f"seed {seed}\n{child.stdout}{child.stderr}"
    done, _ = child.stdout.split(" calls")
    assert int(done) >= 10_000


# ---- the fuzzer itself ----------------------------------------------------------------------------


def spoil(function: Any, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The verdict on a function of this file, taken for one of the package."""
    monkeypatch.setitem(VALID, "new", lambda: call(function, real(2, 3)))
    monkeypatch.setattr(calls, "PACKAGE", str(Path(__file__).parent))
    calls.edits_of.cache_clear()
    return verdict(Case("new", (Edit(("args", 0), "NaN inside"),)))


def writes(x: np.ndarray) -> None:
    x[0] = 1


def breaks(x: np.ndarray) -> None:
    raise IndexError("index 3 is out of bounds")


def warns(x: np.ndarray) -> Any:
    return np.log(np.where(np.isnan(x), -1, x))


def adds(x: np.ndarray) -> Any:
    return x + None  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (writes, "changes an argument"),
        (breaks, "raises IndexError at test_calls.py:"),
        (warns, "raises RuntimeWarning at test_calls.py:"),
        (adds, "raises TypeError at test_calls.py:"),
        (lambda x: None, None),
    ],
)
def test_the_fuzzer_complains(function: Any, complaint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = spoil(function, monkeypatch)
    assert found is None if complaint is None else found is not None and found.startswith(complaint)


def memory_order(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(x.tobytes("A"), x.dtype)


@pytest.mark.parametrize("layout", ["Fortran order", "other byte order"])
def test_the_fuzzer_sees_a_result_that_depends_on_the_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VALID, "new", lambda: Valid(memory_order, (real(2, 3),), {}))
    assert difference("new", ("args", 0), layout) is not None
    assert difference("new", ("args", 0), "contiguous") is None


def test_layouts_are_what_they_are_called() -> None:
    x = real(3, 4)
    made = {name: layout(x) for name, layout in LAYOUTS.items()}
    for name, array in made.items():
        assert name == "zero strides" or np.array_equal(array, x)
    assert not made["read-only"].flags.writeable and not made["unaligned"].flags.aligned
    assert made["Fortran order"].flags.f_contiguous and made["negative strides"].strides[0] < 0
    assert made["zero strides"].strides[0] == 0 and not made["other byte order"].dtype.isnative
