"""What attention is measured on, on every device, and whether both sides compute it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minitransformer.bench import peer
from minitransformer.errors import GradientError

TOLERANCE = 1e-4  # between our float32 and torch's, of the largest value
PASSES = {"forward": 1.0, "forward and backward": 3.5}  # with the work of each over that of a forward pass


class Case(NamedTuple):
    """Self-attention of float32 heads (B, H, T, D), causal, or with a mask that hides the end of some rows' keys."""

    B: int
    T: int
    H: int
    D: int
    causal: bool = True

    @property
    def name(self) -> str:
        return f"B{self.B} T{self.T} H{self.H} D{self.D} {'causal' if self.causal else 'key mask'}"

    @property
    def flops(self) -> float:
        """Of the two products of a forward pass; those above the diagonal are not counted, those of hidden keys are."""
        return 4 * self.B * self.H * self.T**2 * self.D / (2 if self.causal else 1)

    def inputs(self) -> dict[str, np.ndarray]:
        """q, k, v and dout (B, H, T, D): the same in every process."""
        rng, shape = np.random.default_rng(0), (self.B, self.H, self.T, self.D)
        return {name: rng.standard_normal(shape, np.float32) for name in ("q", "k", "v", "dout")}

    def mask(self) -> np.ndarray | None:
        """(B, 1, 1, S), True where a key may be seen: all of row 0, three quarters of row 1, and so on."""
        if self.causal:
            return None
        lengths = self.T - np.arange(self.B) % 4 * (self.T // 4)
        return np.arange(self.T) < lengths[:, None, None, None]


def check(case: Case, ours: Mapping[str, np.ndarray], torch: peer.Peer) -> None:
    """`GradientError` if the results of both sides differ by more than rounding."""
    with tempfile.TemporaryDirectory() as folder:
        torch.call("save", folder=folder)
        for name, mine in ours.items():
            theirs = np.load(Path(folder) / f"{name}.npy")
            difference = float(np.abs(mine - theirs).max())
            if not difference <= TOLERANCE * max(1, float(np.abs(theirs).max())):
                problem = (
                    f"{name} of {case.name} differs from torch's by {difference:.2g}, expected {TOLERANCE:g} at most"
                )
                raise GradientError("bench attention", problem, "Run: minitransformer verify")
