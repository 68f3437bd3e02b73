"""Attention against PyTorch's, forward and backward, in float64.

Hypothesis draws the structure of a problem; its values come from a seeded generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer import functional as F
from minitransformer import masks

pytestmark = pytest.mark.peers


@dataclass(frozen=True)
class Case:
    B: int
    K: int
    groups: int
    T: int
    S: int
    D: int
    Dv: int
    order: tuple[int, ...]  # of the axes in memory
    spread: float  # of the values
    seed: int

    @property
    def H(self) -> int:
        return self.K * self.groups

    def qkv(self) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(self.seed)
        shapes = (
            (self.B, self.H, self.T, self.D),
            (self.B, self.K, self.S, self.D),
            (self.B, self.K, self.S, self.Dv),
        )
        arrays = []
        for shape in shapes:
            stored = rng.standard_normal([shape[axis] for axis in self.order]) * self.spread
            arrays.append(stored.transpose(np.argsort(self.order)))  # a view with strides in any order
        return tuple(arrays)


cases = st.builds(
    Case,
    B=st.integers(1, 3),
    K=st.integers(1, 3),
    groups=st.integers(1, 3),
    T=st.integers(1, 7),
    S=st.integers(1, 7),
    D=st.integers(1, 9),
    Dv=st.integers(1, 9),
    order=st.permutations(range(4)).map(tuple),
    spread=st.sampled_from([1.0, 0.01, 4.0]),
    seed=st.integers(0, 2**32 - 1),
)
scales = st.sampled_from([None, 1.0, 0.3, 0.0, -0.5])
many = settings(max_examples=max(300, settings().max_examples))


@many
@given(
    case=cases,
    scale=scales,
    kind=st.sampled_from(["bool", "float", "float without gradient"]),
    axes=st.tuples(*[st.booleans()] * 4),
    ndim=st.integers(2, 4),
    blocked=st.sampled_from([0.3, 0.0, 0.8, 1.0]),
)
def test_sdpa_with_a_mask_of_any_broadcast_shape(
    torch: Any,
    parity: Callable[..., Any],
    case: Case,
    scale: float | None,
    kind: str,
    axes: tuple[bool, ...],
    ndim: int,
    blocked: float,
) -> None:
    sizes = (case.B, case.H, case.T, case.S)
    shape = tuple(n if varies else 1 for n, varies in zip(sizes, axes, strict=True))[4 - ndim :]
    rng = np.random.default_rng(case.seed + 1)
    may = rng.random(shape) >= blocked
    mask = may if kind == "bool" else np.where(may, rng.standard_normal(shape), -np.inf)
    inputs = (*case.qkv(), mask)
    if kind == "float without gradient":
        inputs = inputs[:3]
    theirs = torch.nn.functional.scaled_dot_product_attention
    fixed = torch.from_numpy(mask)
    options = {"scale": scale, "enable_gqa": True}
    (out,) = parity(
        lambda q, k, v, m=mask: F.scaled_dot_product_attention(q, k, v, m, **options),
        lambda q, k, v, m=fixed: theirs(q, k, v, m, **options),
        *inputs,
    )
    empty = ~np.broadcast_to(may, sizes).any(axis=-1)
    assert not out[empty].any()


@many
@given(case=cases, scale=scales, is_causal=st.booleans())
def test_sdpa_full_and_causal(
    torch: Any, parity: Callable[..., Any], case: Case, scale: float | None, is_causal: bool
) -> None:
    if is_causal and scale is not None:
        scale = abs(scale) or 2.0  # torch multiplies the -inf of masked scores too, and gets NaN
    options = {"scale": scale, "is_causal": is_causal, "enable_gqa": True}
    parity(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal_align="upper_left", **options),
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, **options),
        *case.qkv(),
    )


@pytest.mark.parametrize("empty", ["B", "T", "S"])
def test_sdpa_of_nothing(torch: Any, parity: Callable[..., Any], empty: str) -> None:
    sizes = {"B": 2, "K": 2, "groups": 1, "T": 3, "S": 3, "D": 4, "Dv": 5, empty: 0}
    parity(
        F.scaled_dot_product_attention,
        torch.nn.functional.scaled_dot_product_attention,
        *Case(**sizes, order=(0, 1, 2, 3), spread=1.0, seed=0).qkv(),
    )


@given(
    case=cases,
    align=st.sampled_from(["upper_left", "lower_right"]),
    is_causal=st.booleans(),
    window=st.none() | st.tuples(*[st.none() | st.integers(0, 4)] * 2),
    lengths=st.booleans(),
    slopes=st.booleans(),
)
def test_our_options_are_torchs_additive_masks(
    torch: Any,
    parity: Callable[..., Any],
    case: Case,
    align: str,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    lengths: bool,
    slopes: bool,
) -> None:
    """Causal, window, lengths and ALiBi, written out cell by cell as one float mask."""
    rng = np.random.default_rng(case.seed + 1)
    key_lengths = rng.integers(0, case.S + 1, case.B)
    alibi = rng.random(case.H)
    left, right = window or (None, None)
    mask = np.zeros((case.B, case.H, case.T, case.S))
    for b, h, q, k in np.ndindex(mask.shape):
        end = key_lengths[b] if lengths else case.S
        at = q if align == "upper_left" else q + end - case.T
        allowed = (
            (k <= at or not is_causal)
            and (left is None or at - k <= left)
            and (right is None or k - at <= right)
            and k < end
        )
        mask[b, h, q, k] = -alibi[h] * abs(at - k) * slopes if allowed else -np.inf
    parity(
        lambda q, k, v: F.scaled_dot_product_attention(
            q,
            k,
            v,
            is_causal=is_causal,
            enable_gqa=True,
            causal_align=align,
            window_size=window,
            key_lengths=key_lengths if lengths else None,
            alibi_slopes=alibi if slopes else None,
        ),
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, torch.from_numpy(mask), enable_gqa=True
        ),
        *case.qkv(),
    )


# Operators alone, so that one function runs under both packages; factors of bare indices are powers of two,
# because torch rounds 0.1 * q to float32.
MASK_MODS = {
    "none": None,
    "window": lambda b, h, q, k: (q - k < 3) & (k - q < 2),
    "by head and row": lambda b, h, q, k: (q + k + h) % (b + 2) == 0,
    "nothing": lambda b, h, q, k: q > 100 + k,
}
SCORE_MODS = {
    "none": None,
    "bias": lambda s, b, h, q, k: s - (h + 1) * 0.125 * (q - k) ** 2,
    "polynomial": lambda s, b, h, q, k: s * (1 + 0.25 * b) - 0.02 * s * s * (k + 1),
    "rational": lambda s, b, h, q, k: s / (1 + 0.3 * s * s) + 0.5 * q,
}


@pytest.fixture
def flex(torch: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """torch.nn.attention.flex_attention, run as it is written instead of traced by the compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else importing the compiler sets it for good
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return flex_attention


@pytest.mark.parametrize("mask_mod", MASK_MODS)
@pytest.mark.parametrize("score_mod", SCORE_MODS)
def test_flex_attention_forward(flex: Any, torch: Any, score_mod: str, mask_mod: str) -> None:
    B, H, T, S = 3, 4, 5, 7
    arrays = Case(B=B, K=2, groups=2, T=T, S=S, D=6, Dv=3, order=(0, 2, 1, 3), spread=1.0, seed=0).qkv()
    score, mask = SCORE_MODS[score_mod], MASK_MODS[mask_mod]
    own = mask and masks.create_block_mask(mask, B, H, T, S)
    other = mask and flex.create_block_mask(mask, B, H, T, S, device="cpu")
    out, lse = F.flex_attention(*arrays, score, own, enable_gqa=True, need_lse=True)
    tensors = [torch.from_numpy(a) for a in arrays]
    expected, aux = flex.flex_attention(*tensors, score, other, enable_gqa=True, return_aux=flex.AuxRequest(lse=True))
    np.testing.assert_allclose(out.numpy(), expected.numpy(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), aux.lse.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask_mod", MASK_MODS)
@pytest.mark.parametrize("score_mod", SCORE_MODS)
@given(case=cases)
@settings(max_examples=5)
def test_flex_attention_backward(
    torch: Any, parity: Callable[..., Any], case: Case, score_mod: str, mask_mod: str
) -> None:
    """torch has no backward for it on a CPU, so against its definition, differentiated by torch."""
    score, mask = SCORE_MODS[score_mod], MASK_MODS[mask_mod]
    sizes = (case.B, case.H, case.T, case.S)
    grids = torch.meshgrid(*[torch.arange(n) for n in sizes], indexing="ij")
    may = None if mask is None else mask(*grids)

    def written_out(q: Any, k: Any, v: Any) -> Any:
        k, v = (x.repeat_interleave(case.groups, dim=1) for x in (k, v))
        scores = 0.3 * q @ k.transpose(2, 3)
        if score is not None:
            scores = score(scores, *grids)
        if may is None:
            return scores.softmax(-1) @ v
        # A finite score in empty rows keeps NaN out of the backward; their weights are then set to 0.
        scores = scores.masked_fill(~may & may.any(-1, keepdim=True), -torch.inf)
        return (scores.softmax(-1) * may) @ v

    own = mask and masks.create_block_mask(mask, *sizes)
    parity(
        lambda q, k, v: F.flex_attention(q, k, v, score, own, 0.3, enable_gqa=True),
        written_out,
        *case.qkv(),
    )
