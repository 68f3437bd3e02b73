"""Optimizers, clipping and schedules against torch, step by step in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitransformer.autograd import Parameter
from minitransformer.nn.clip import clip_grad_norm_
from minitransformer.optim import SGD, Adam, AdamW, schedules

pytestmark = pytest.mark.peers

SHAPES: tuple[tuple[int, ...], ...] = ((4,), (3, 4), (), (2, 3, 2), (1, 1))
STEPS = 200


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch's optimizers import its compiler, which sets this variable for good if it is not set."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def pair(seed: int) -> tuple[list[Parameter], list[Any]]:
    """The same random parameters here and in torch, in one order."""
    import torch

    random = np.random.default_rng(seed)
    values = [np.asarray(random.standard_normal(shape)) for shape in SHAPES]
    return [Parameter(v.copy()) for v in values], [torch.nn.Parameter(torch.tensor(v)) for v in values]


def set_gradients(ours: list[Parameter], theirs: list[Any], random: np.random.Generator) -> None:
    """Gradients of scales from 1e-4 to 1e1, some exactly zero."""
    import torch

    for p, q in zip(ours, theirs, strict=True):
        gradient = np.asarray(random.standard_normal(p.shape) * 10.0 ** random.integers(-4, 2))
        gradient = np.where(random.random(p.shape) < 0.1, 0.0, gradient)
        p.grad, q.grad = gradient, torch.tensor(gradient)


def groups(theirs: list[Any], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: torch's way to say what the package's optimizers do by themselves."""
    return [
        {"params": [q for q in theirs if q.ndim >= 2], "weight_decay": weight_decay},
        {"params": [q for q in theirs if q.ndim < 2], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("ours_class", "theirs_name", "options"),
    [
        (SGD, "SGD", {"lr": 0.01}),
        (SGD, "SGD", {"lr": 0.01, "momentum": 0.9}),
        (Adam, "Adam", {"lr": 0.01}),
        (Adam, "Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3}),
        (AdamW, "AdamW", {"lr": 0.01}),
        (AdamW, "AdamW", {"lr": 0.01, "betas": (0.0, 0.0), "eps": 1e-3}),
    ],
)
def test_steps(ours_class: Callable[..., Any], theirs_name: str, options: dict[str, Any], weight_decay: float) -> None:
    import torch

    ours, theirs = pair(seed=0)
    mine = ours_class(ours, weight_decay=weight_decay, **options)
    peer = getattr(torch.optim, theirs_name)(groups(theirs, weight_decay), **options)
    random = np.random.default_rng(1)
    for step in range(STEPS):
        mine.lr = options["lr"] * (1 + step % 3)
        for group in peer.param_groups:
            group["lr"] = mine.lr
        set_gradients(ours, theirs, random)
        mine.step()
        peer.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p.data, q.detach().numpy())


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6, math.inf])
def test_clipping(max_norm: float) -> None:
    import torch

    ours, theirs = pair(seed=2)
    random = np.random.default_rng(3)
    for _ in range(STEPS):
        set_gradients(ours, theirs, random)
        close(clip_grad_norm_(ours, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm).item())
        for p, q in zip(ours, theirs, strict=True):
            close(p.grad, q.grad.numpy())


def rates(make: Callable[[Any], Any], lr: float) -> list[float]:
    """The learning rates that a torch scheduler gives to steps 0, 1, 2, ..."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def linear_from_warmup(optimizer: Any, after: Any, warmup: int) -> Any:
    """torch's linear warm-up with this package's first value, then `after`."""
    from torch.optim.lr_scheduler import LinearLR, SequentialLR

    start = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [start, after], milestones=[warmup])


def test_cosine() -> None:
    from torch.optim.lr_scheduler import CosineAnnealingLR

    theirs = rates(lambda o: CosineAnnealingLR(o, T_max=STEPS, eta_min=0.01), 0.5)
    close([schedules.cosine(0.5, 0.01, 0, STEPS)(s) for s in range(STEPS)], theirs)
    theirs = rates(lambda o: linear_from_warmup(o, CosineAnnealingLR(o, STEPS - 20, 0.01), 20), 0.5)
    close([schedules.cosine(0.5, 0.01, 20, STEPS)(s) for s in range(STEPS)], theirs)


def test_linear() -> None:
    from torch.optim.lr_scheduler import LinearLR

    theirs = rates(lambda o: LinearLR(o, 1.0, 0.1, total_iters=150), 0.5)
    close([schedules.linear(0.5, 0.05, 0, 150)(s) for s in range(STEPS)], theirs)
    theirs = rates(lambda o: linear_from_warmup(o, LinearLR(o, 1.0, 0.1, total_iters=130), 20), 0.5)
    close([schedules.linear(0.5, 0.05, 20, 150)(s) for s in range(STEPS)], theirs)


def test_constant_and_warmup_stable_decay() -> None:
    from torch.optim.lr_scheduler import ConstantLR, LinearLR, SequentialLR

    theirs = rates(lambda o: linear_from_warmup(o, ConstantLR(o, factor=1.0), 20), 0.5)
    close([schedules.constant(0.5, 20)(s) for s in range(STEPS)], theirs)

    def three(optimizer: Any) -> Any:
        warm = LinearLR(optimizer, start_factor=1 / 21, total_iters=20)
        parts = [warm, ConstantLR(optimizer, factor=1.0), LinearLR(optimizer, 1.0, 0.1, total_iters=50)]
        return SequentialLR(optimizer, parts, milestones=[20, 100])

    ours = schedules.warmup_stable_decay(0.5, 0.05, 20, 150, 50)
    close([ours(s) for s in range(STEPS)], rates(three, 0.5))


def test_noam() -> None:
    from torch.optim.lr_scheduler import LambdaLR

    def paper(step: int) -> float:
        n = step + 1
        return 512**-0.5 * min(n**-0.5, n * 40**-1.5)

    ours = schedules.noam(512, 40, factor=2.0)
    close([ours(s) for s in range(STEPS)], rates(lambda o: LambdaLR(o, paper), 2.0))
