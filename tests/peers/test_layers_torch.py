"""Layers against PyTorch's with the same weights, in float64: outputs, inputs' and parameters' gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer import masks, nn

pytestmark = pytest.mark.peers

ATTENTION = {
    "qkv.weight": "in_proj_weight",
    "qkv.bias": "in_proj_bias",
    "out.weight": "out_proj.weight",
    "out.bias": "out_proj.bias",
}
FEED_FORWARD = {
    "ffn.up.weight": "linear1.weight",
    "ffn.up.bias": "linear1.bias",
    "ffn.down.weight": "linear2.weight",
    "ffn.down.bias": "linear2.bias",
}


def norms(count: int) -> dict[str, str]:
    return {name: name for i in range(1, count + 1) for name in (f"norm{i}.weight", f"norm{i}.bias")}


def below(own: str, other: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{own}.{a}": f"{other}.{b}" for a, b in names.items()}


ENCODER = {**below("attn", "self_attn", ATTENTION), **FEED_FORWARD, **norms(2)}
DECODER = {
    **below("attn", "self_attn", ATTENTION),
    **below("cross_attn", "multihead_attn", ATTENTION),
    **FEED_FORWARD,
    **norms(3),
}


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    S: int
    H: int
    D: int
    seed: int

    @property
    def C(self) -> int:
        return self.H * self.D

    def values(self, length: int, salt: int) -> np.ndarray:
        return np.random.default_rng((self.seed, salt)).standard_normal((self.B, length, self.C))

    def padding(self, length: int, left: bool, salt: int) -> np.ndarray:
        """torch's key_padding_mask (B, length): True = blocked; every row keeps at least one key."""
        kept = np.random.default_rng((self.seed, salt)).integers(1, length + 1, (self.B, 1))
        blocked = np.arange(length) >= kept
        return blocked[:, ::-1].copy() if left else blocked


cases = st.builds(
    Case,
    B=st.integers(1, 3),
    T=st.integers(1, 6),
    S=st.integers(1, 6),
    H=st.integers(1, 4),
    D=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
flag = st.booleans()


def same_weights(ours: nn.Module, theirs: Any, names: dict[str, str], seed: int) -> dict[str, tuple[Any, Any]]:
    """Random values in both, norms and biases included; returns the pairs of parameters."""
    rng = np.random.default_rng(seed)
    other = dict(theirs.named_parameters())
    for parameter in other.values():
        values = rng.standard_normal(parameter.shape) * 0.5
        parameter.data.copy_(parameter.data.new_tensor(values))
    names = {own: name for own, name in names.items() if name in other}
    assert set(names.values()) == set(other)
    ours.to("float64").load_state_dict({own: other[name].detach().numpy() for own, name in names.items()})
    return {own: (p, other[names[own]]) for own, p in ours.named_parameters()}


@given(case=cases, bias=flag, inputs=st.integers(1, 3), is_causal=flag, padded=flag, left=flag)
def test_multi_head_attention(
    torch: Any,
    parity: Callable[..., Any],
    case: Case,
    bias: bool,
    inputs: int,
    is_causal: bool,
    padded: bool,
    left: bool,
) -> None:
    """One input is self-attention, two are query and memory, three have values of their own."""
    S = case.T if inputs == 1 else case.S
    left = left and not is_causal  # together they would leave queries nothing to attend to
    blocked = case.padding(S, left, 9) if padded else np.zeros((case.B, S), bool)
    future = ~np.tri(case.T, S, dtype=bool)
    mask = masks.padding(~blocked)
    if is_causal:
        mask = mask & masks.causal("upper_left")
    own = nn.MultiHeadAttention(case.C, case.H, bias=bias)
    other = torch.nn.MultiheadAttention(case.C, case.H, bias=bias, batch_first=True, dtype=torch.float64)
    parameters = same_weights(own, other, ATTENTION, case.seed)

    def theirs(q: Any, k: Any = None, v: Any = None) -> Any:
        k = q if k is None else k
        return other(
            q,
            k,
            k if v is None else v,
            key_padding_mask=torch.from_numpy(blocked),
            attn_mask=torch.from_numpy(future) if is_causal else None,
            average_attn_weights=False,
        )

    parity(
        lambda *x: own(*x, attn_mask=mask, need_weights=True),
        theirs,
        *[case.values(length, i) for i, length in enumerate((case.T, S, S)[:inputs])],
        parameters=parameters,
        tolerance=1e-10,
    )


@given(
    case=cases,
    norm_first=flag,
    activation=st.sampled_from(["relu", "gelu"]),
    is_causal=flag,
    padded=flag,
)
def test_encoder_layer(
    torch: Any,
    parity: Callable[..., Any],
    case: Case,
    norm_first: bool,
    activation: str,
    is_causal: bool,
    padded: bool,
) -> None:
    blocked = case.padding(case.T, not is_causal, 9) if padded else np.zeros((case.B, case.T), bool)
    mask = masks.padding(~blocked)
    if is_causal:
        mask = mask & masks.causal()
    sizes = (case.C, case.H, 2 * case.C + 1, 0.0)
    own = nn.EncoderLayer(*sizes, norm_first=norm_first, activation=activation)
    other = torch.nn.TransformerEncoderLayer(
        *sizes, norm_first=norm_first, activation=activation, batch_first=True, dtype=torch.float64
    )
    parity(
        lambda x: own(x, mask),
        lambda x: other(
            x,
            torch.from_numpy(~np.tri(case.T, dtype=bool)) if is_causal else None,
            src_key_padding_mask=torch.from_numpy(blocked),
        ),
        case.values(case.T, 0),
        parameters=same_weights(own, other, ENCODER, case.seed),
        tolerance=1e-10,
    )


@given(
    case=cases,
    norm_first=flag,
    activation=st.sampled_from(["relu", "gelu"]),
    is_causal=flag,
    padded=flag,
    memory_padded=flag,
)
def test_decoder_layer(
    torch: Any,
    parity: Callable[..., Any],
    case: Case,
    norm_first: bool,
    activation: str,
    is_causal: bool,
    padded: bool,
    memory_padded: bool,
) -> None:
    blocked = case.padding(case.T, not is_causal, 8) if padded else np.zeros((case.B, case.T), bool)
    hidden = case.padding(case.S, True, 9) if memory_padded else np.zeros((case.B, case.S), bool)
    mask = masks.padding(~blocked)
    if is_causal:
        mask = mask & masks.causal()
    sizes = (case.C, case.H, 2 * case.C + 1, 0.0)
    own = nn.DecoderLayer(*sizes, norm_first=norm_first, activation=activation)
    other = torch.nn.TransformerDecoderLayer(
        *sizes, norm_first=norm_first, activation=activation, batch_first=True, dtype=torch.float64
    )
    parity(
        lambda x, memory: own(x, memory, mask, masks.padding(~hidden)),
        lambda x, memory: other(
            x,
            memory,
            torch.from_numpy(~np.tri(case.T, dtype=bool)) if is_causal else None,
            tgt_key_padding_mask=torch.from_numpy(blocked),
            memory_key_padding_mask=torch.from_numpy(hidden),
        ),
        case.values(case.T, 0),
        case.values(case.S, 1),
        parameters=same_weights(own, other, DECODER, case.seed),
        tolerance=1e-10,
    )


@given(case=cases, kv_heads=st.integers(1, 3), groups=st.integers(1, 3), rope=flag)
def test_grouped_heads_and_rotary_positions(
    torch: Any, parity: Callable[..., Any], case: Case, kv_heads: int, groups: int, rope: bool
) -> None:
    """torch's layer has neither, so against the same layer written in torch's functions."""
    H, D = kv_heads * groups, 2 * case.D
    x = np.random.default_rng(case.seed).standard_normal((case.B, case.T, H * D))
    positions = np.arange(3, 3 + case.T)
    own = nn.MultiHeadAttention(H * D, H, kv_heads)
    wide = torch.nn.Linear(H * D, own.qkv.weight.shape[0], dtype=torch.float64)
    out = torch.nn.Linear(H * D, H * D, dtype=torch.float64)
    other = torch.nn.ModuleDict({"qkv": wide, "out": out})
    parameters = same_weights(own, other, {name: name for name in own.state_dict()}, case.seed)

    def turned(heads: Any) -> Any:
        """Each pair (x[i], x[i + D/2]) as a complex number, turned by position * base^(-2i/D)."""
        if not rope:
            return heads
        pairs = torch.complex(heads[..., : D // 2], heads[..., D // 2 :])
        frequencies = 10000.0 ** (-torch.arange(D // 2, dtype=torch.float64) * 2 / D)
        angles = torch.from_numpy(positions)[:, None] * frequencies
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def theirs(x: Any) -> Any:
        split = wide(x).split([H * D, kv_heads * D, kv_heads * D], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, D)).transpose(1, 2) for part in split)
        heads = torch.nn.functional.scaled_dot_product_attention(
            turned(q), turned(k), v, is_causal=True, enable_gqa=True
        )
        return out(heads.transpose(1, 2).flatten(2))

    parity(
        lambda x: own(x, is_causal=True, rope_positions=positions if rope else None),
        theirs,
        x,
        parameters=parameters,
        tolerance=1e-10,
    )


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward(torch: Any, parity: Callable[..., Any], activation: str, bias: bool) -> None:
    nn_torch = torch.nn.functional
    activations = {
        "relu": nn_torch.relu,
        "gelu": nn_torch.gelu,
        "gelu_tanh": lambda h: nn_torch.gelu(h, approximate="tanh"),
        "silu": nn_torch.silu,
        "swiglu": lambda h: nn_torch.silu(h[..., :7]) * h[..., 7:],
    }
    own = nn.FeedForward(5, 7, activation=activation, bias=bias)
    up = torch.nn.Linear(5, 14 if activation == "swiglu" else 7, bias, dtype=torch.float64)
    down = torch.nn.Linear(7, 5, bias, dtype=torch.float64)
    other = torch.nn.ModuleDict({"up": up, "down": down})
    names = {name: name for name in own.state_dict()}
    parity(
        own,
        lambda x: down(activations[activation](up(x))),
        np.random.default_rng(0).standard_normal((2, 3, 5)),
        parameters=same_weights(own, other, names, 1),
        tolerance=1e-10,
    )


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "Linear"])
def test_small_layers(torch: Any, parity: Callable[..., Any], kind: str) -> None:
    arguments = (5, 3) if kind == "Linear" else (5,)
    own, other = getattr(nn, kind)(*arguments), getattr(torch.nn, kind)(*arguments, dtype=torch.float64)
    if kind == "RMSNorm":
        other.eps = own.eps  # torch's default is the dtype's epsilon
    names = {name: name for name in own.state_dict()}
    parity(
        own,
        other,
        np.random.default_rng(0).standard_normal((2, 4, 5)),
        parameters=same_weights(own, other, names, 1),
        tolerance=1e-10,
    )
