"""Small images that come without a download: handwritten digits of a package, and digits drawn here."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path

import numpy as np

from minitransformer.checks import allocate, check_count
from minitransformer.data.arrays import ArrayDataset
from minitransformer.errors import MissingExtraError
from minitransformer.random import check_seed

SIZE = 8  # of all images here, in pixels
_VALIDATION = 360  # of the 1,797 handwritten digits
_NOISE = 0.1
_FONT = """
.###....#....###...###.....#..#####..###..#####..###...###.
#...#..##...#...#.#...#...##..#.....#.........#.#...#.#...#
#..##...#.......#.....#..#.#..####..#........#..#...#.#...#
#.#.#...#......#....##..#..#......#.####....#....###...####
##..#...#.....#.......#.#####.....#.#...#...#...#...#.....#
#...#...#....#....#...#....#..#...#.#...#...#...#...#.....#
.###...###..#####..###.....#...###...###....#....###...###.
"""


def digits() -> tuple[ArrayDataset, ArrayDataset]:
    """Handwritten digits (Alpaydin and Kaynak 1998) as (training, validation), 1,437 and 360 of them.

    `pixels` (N, 1, 8, 8) are float32 from 0, paper, to 1, ink; `labels` (N,) are the digits. The last fifth of the
    file validates. They are in the package scikit-learn, which is only read, not imported; `MissingExtraError` if
    it is not installed.
    """
    spec = importlib.util.find_spec("sklearn")  # finds the folder and runs no code of the package
    folders = [Path(folder, "datasets", "data") for folder in (spec and spec.submodule_search_locations) or ()]
    files = [file for folder in folders for file in folder.glob("digits.csv.gz")]
    if not files:
        raise MissingExtraError(
            "digits",
            "needs the images of the package 'scikit-learn', which is not installed",
            'Run: pip install "minitransformer[images]"',
        )
    table = np.loadtxt(files[0], np.float32, delimiter=",")  # (N, 65): pixels from 0 to 16, and the digit
    pixels, labels = table[:, :-1].reshape(-1, 1, SIZE, SIZE) / 16, table[:, -1].astype(np.int64)
    return (
        ArrayDataset(pixels=pixels[:-_VALIDATION], labels=labels[:-_VALIDATION]),
        ArrayDataset(pixels=pixels[-_VALIDATION:], labels=labels[-_VALIDATION:]),
    )


def drawn_digits(count: int, seed: int = 0) -> ArrayDataset:
    """`count` digits in a font of 5 x 7 pixels, anywhere in 8 x 8, in ink of varying strength, with noise.

    `pixels` and `labels` are as those of `digits`, and a function of `seed`. They need nothing installed, and are
    easy: for tests and first steps.
    """
    count, seed = check_count("drawn_digits", "count", count, least=1), check_seed("drawn_digits", seed)
    shape = count, 1, SIZE, SIZE
    return allocate("drawn_digits", "images", (3, *shape), np.float64, lambda: _draw(shape, seed))


def _draw(shape: tuple[int, ...], seed: int) -> ArrayDataset:
    font = np.array([[dot == "#" for dot in line] for line in _FONT.split()])  # (7, 59), a column between two digits
    glyphs = np.stack([font[:, 6 * digit : 6 * digit + 5] for digit in range(10)])  # (10, 7, 5)
    random = np.random.default_rng(seed)
    labels = random.integers(10, size=shape[0])
    down, right = random.integers(2, size=shape[0]), random.integers(4, size=shape[0])
    pixels = random.normal(0, _NOISE, shape)
    ink = random.uniform(0.6, 1, (shape[0], 1, 1))
    for y, x in product(range(2), range(4)):
        here = (down == y) & (right == x)
        pixels[here, 0, y : y + 7, x : x + 5] += ink[here] * glyphs[labels[here]]
    return ArrayDataset(pixels=pixels.clip(0, 1).astype(np.float32), labels=labels)
