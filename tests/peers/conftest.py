"""One function written for both packages, run on the same arrays: outputs and gradients must agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitransformer as mt

Parity = Callable[..., tuple[np.ndarray, ...]]


@pytest.fixture(scope="session")
def torch() -> Any:
    import torch

    return torch


@pytest.fixture(scope="session")
def parity(torch: Any) -> Parity:
    def check(
        ours: Callable[..., Any],
        theirs: Callable[..., Any],
        *arrays: np.ndarray,
        parameters: dict[str, tuple[Any, Any]] | None = None,
        tolerance: float = 1e-12,
    ) -> tuple[np.ndarray, ...]:
        """Our outputs, after comparing them and the gradients with torch's.

        Gradients are taken with respect to every float64 array and to `parameters` (name -> ours, torch's),
        under one random upstream gradient. The tolerance is relative to an array's largest element, or to 1.
        """
        arrays = tuple(np.asarray(a) for a in arrays)
        own = [mt.tensor(a, requires_grad=a.dtype == np.float64) for a in arrays]
        other = [torch.from_numpy(a).requires_grad_(a.dtype == np.float64) for a in arrays]
        own_outs, other_outs = ours(*own), theirs(*other)
        if not isinstance(own_outs, tuple):
            own_outs, other_outs = (own_outs,), (other_outs,)
        rng = np.random.default_rng(len(arrays))
        own_loss, other_loss = 0.0, 0.0
        for i, (a, b) in enumerate(zip(own_outs, other_outs, strict=True)):
            _close(f"output {i}", a.numpy(), b.detach().numpy(), tolerance)
            upstream = rng.standard_normal(a.shape)
            own_loss = own_loss + (a * upstream).sum()
            other_loss = other_loss + (b * torch.from_numpy(upstream)).sum()
        pairs = {f"input {i}": (own[i], other[i]) for i, t in enumerate(own) if t.requires_grad}
        pairs |= parameters or {}
        own_grads = mt.grad(own_loss, [a for a, _ in pairs.values()])
        other_grads = torch.autograd.grad(other_loss, [b for _, b in pairs.values()])
        for name, a, b in zip(pairs, own_grads, other_grads, strict=True):
            _close(f"gradient of {name}", a, b.numpy(), tolerance)
        return tuple(t.numpy() for t in own_outs)

    return check


def _close(what: str, actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    scale = np.max(np.abs(expected), initial=1.0, where=np.isfinite(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale, equal_nan=False, err_msg=what)
