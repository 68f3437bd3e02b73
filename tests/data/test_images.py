"""Digits: those drawn here, and those of a package that need not be installed."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.data import digits, drawn_digits
from minitransformer.errors import AllocationError, ConfigError, MissingExtraError


@given(count=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
def test_drawn_digits_are_images_with_labels_and_a_function_of_the_seed(count: int, seed: int) -> None:
    data = drawn_digits(count, seed)
    pixels, labels = data.arrays["pixels"], data.arrays["labels"]
    assert (pixels.shape, pixels.dtype) == ((count, 1, 8, 8), np.float32)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert set(labels) <= set(range(10))
    assert drawn_digits(count, seed).source == data.source


def test_drawn_digits_differ_and_can_be_told_apart() -> None:
    """Every digit comes, at every place, and no two images are the same; the nearest image is mostly of its kind."""
    train, test = (drawn_digits(count, seed).arrays for count, seed in ((3000, 0), (200, 1)))
    assert len(np.unique(train["pixels"], axis=0)) == 3000
    assert np.all(abs(np.bincount(train["labels"], minlength=10) - 300) < 5 * np.sqrt(300))
    seven = train["pixels"][train["labels"] == 7, 0] > 0.4
    tops = {tuple(np.argwhere(image)[0]) for image in seven}
    assert {(y, x) for y in range(2) for x in range(4)} <= tops
    images = [part["pixels"].reshape(-1, 64) for part in (train, test)]
    nearest = (((images[1][:, None] - images[0][None]) ** 2).sum(-1)).argmin(1)
    assert (train["labels"][nearest] == test["labels"]).mean() > 0.95


@pytest.mark.parametrize("bad", [0, -3, 1.5, None, True])
def test_a_count_that_makes_no_sense_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"^drawn_digits: count is .*, expected an integer from 1"):
        drawn_digits(bad)


def test_too_many_and_a_seed_that_is_none_are_refused() -> None:
    with pytest.raises(AllocationError, match=r"^drawn_digits: images of shape \(3, 1152921504606846976, 1, 8, 8\)"):
        drawn_digits(2**60)
    with pytest.raises(ConfigError, match=r"^drawn_digits: seed is -1, expected an integer from 0"):
        drawn_digits(1, -1)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for scikit-learn and cannot be imported."""
    folder = tmp_path / "sklearn"
    (folder / "datasets" / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    return folder


def test_handwritten_digits_are_read_from_the_package(package: Path) -> None:
    numbers = np.arange(1797)[:, None] + np.arange(64)
    table = np.concatenate([numbers % 17, np.arange(1797)[:, None] % 10], axis=1)
    with gzip.open(package / "datasets" / "data" / "digits.csv.gz", "wt") as file:
        file.writelines(",".join(map(str, row)) + "\n" for row in table)
    parts = [part.arrays for part in digits()]
    assert [part["pixels"].shape for part in parts] == [(1437, 1, 8, 8), (360, 1, 8, 8)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert {name: array.dtype for name, array in joined.items()} == {"pixels": np.float32, "labels": np.int64}
    np.testing.assert_array_equal(joined["pixels"].reshape(1797, 64) * 16, numbers % 17)
    np.testing.assert_array_equal(joined["labels"], np.arange(1797) % 10)


@pytest.mark.parametrize("installed", [True, False])
def test_without_them_the_pip_line_is_named(installed: bool, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtraError) as error:
        digits()
    assert str(error.value) == (
        "digits: needs the images of the package 'scikit-learn', which is not installed. "
        'Run: pip install "minitransformer[images]"'
    )
