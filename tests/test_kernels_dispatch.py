"""Which implementation serves which array."""

from __future__ import annotations

import importlib
import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import minitransformer as mt
from minitransformer import kernels
from minitransformer.errors import ConfigError
from minitransformer.kernels import FAMILIES, serve
from minitransformer.kernels.gpu.arrays import SimulatedArray

REAL = [np.ones(2, np.float32), np.ones(2)]
IMPLEMENTATIONS = [(family, name) for family, names in FAMILIES.items() for name in names]


def name(module: Any) -> str:
    return module.__name__.rpartition(".")[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_choice_serves_real_arrays_and_the_reference_complex_ones(family: str) -> None:
    for array in REAL:
        assert name(serve(family, array)) == FAMILIES[family][0]
        assert name(serve(family, array, np.ones(2, np.complex128))) == "reference"


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_use_backend_overrides(family: str, implementation: str) -> None:
    with mt.use_backend(implementation):
        assert name(serve(family, REAL[0])) == implementation
        with mt.use_backend("reference"):
            assert name(serve(family, REAL[0])) == "reference"
        assert name(serve(family, REAL[0])) == implementation
        assert name(serve(family, np.ones(1, np.complex128))) == "reference"
    assert name(serve(family, REAL[0])) == FAMILIES[family][0]


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_every_implementation_has_the_functions_of_the_reference(family: str, implementation: str) -> None:
    package = f"minitransformer.kernels.{family}"
    reference = importlib.import_module(f"{package}.reference")
    module = importlib.import_module(f"{package}.{implementation}")
    for function, value in vars(reference).items():
        if callable(value) and not function.startswith("_") and value.__module__ == reference.__name__:
            assert callable(getattr(module, function)), function


@pytest.mark.parametrize("family", [family for family, names in FAMILIES.items() if "cuda" in names])
def test_arrays_on_a_gpu_are_served_by_its_kernels_alone(family: str) -> None:
    there = SimulatedArray(REAL[0])
    for backend in (None, "reference", "cpu", "cuda"):
        with mt.use_backend(backend) if backend else nullcontext():
            assert name(serve(family, there)) == "cuda"
    assert kernels.host_implementations(family) == ("cpu", "reference")


def test_a_family_without_kernels_for_the_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.FAMILIES, "rowwise", ("cpu", "reference"))
    message = r"rowwise: has no implementation 'cuda' in this version, expected one of .*\. Move the arrays with \.to\("
    with pytest.raises(ConfigError, match=message):
        serve("rowwise", SimulatedArray(REAL[0]))


def test_the_reference_is_last_everywhere() -> None:
    assert {names[-1] for names in FAMILIES.values()} == {"reference"}


def test_a_family_without_the_wanted_implementation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.FAMILIES, "another", ("gpu", "reference"))
    with mt.use_backend("gpu"):
        for family in FAMILIES:
            if family != "another":
                with pytest.raises(ConfigError, match=f"{family}: has no implementation 'gpu' in this version, expec"):
                    serve(family, REAL[0])
                assert name(serve(family, np.ones(1, np.complex128))) == "reference"


def test_unknown_backends_are_refused() -> None:
    with (
        pytest.raises(ConfigError, match=r"use_backend: 'referense' is no implementation.*Did you mean 'reference'\?"),
        mt.use_backend("referense"),
    ):
        pass


def test_use_backend_ends_on_errors_and_holds_in_its_thread_only() -> None:
    seen = []
    with pytest.raises(KeyError), mt.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(kernels._backend.get()))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [None] and kernels._backend.get() is None
