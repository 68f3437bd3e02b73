"""BERT against the same built of torch's encoder layers, in float64: states, logits, loss and all gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_bert import HEADS, LONGEST, bert, targets, tokens

import minitransformer as mt

pytestmark = pytest.mark.peers

# Ours -> torch's, below layers.n. Both pack query, key and value in this order.
NAMES = {
    "attn.qkv.weight": "self_attn.in_proj_weight",
    "attn.qkv.bias": "self_attn.in_proj_bias",
    "attn.out": "self_attn.out_proj",
    "ffn.up": "linear1",
    "ffn.down": "linear2",
}


def renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


class Twin:
    """The model `model` of torch's layers and functions, with copies of its weights."""

    def __init__(self, torch: Any, model: Any) -> None:
        config = self.config = model.config
        self.F = torch.nn.functional
        self.weights = {n: torch.tensor(p.data, requires_grad=True) for n, p in model.named_parameters()}
        self.apply = torch.func.functional_call
        self.layer = torch.nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation=getattr(self.F, config.hidden_act),
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            dtype=torch.float64,
        )

    def norm(self, x: Any, name: str) -> Any:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return self.F.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_eps)

    def linear(self, x: Any, name: str) -> Any:
        return self.F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def states(self, ids: Any, types: Any, padding: Any) -> list[Any]:
        tables = {n: self.weights[f"encoder.embeddings.{n}.weight"] for n in ("word", "position", "token_type")}
        x = tables["word"][ids] + tables["position"][: ids.shape[1]] + tables["token_type"][types]
        states = [self.norm(x, "encoder.embeddings.norm")]
        for n in range(self.config.num_hidden_layers):
            start = f"encoder.layers.{n}."
            own = {renamed(k.removeprefix(start)): w for k, w in self.weights.items() if k.startswith(start)}
            states.append(self.apply(self.layer, own, states[-1], {"src_key_padding_mask": padding}))
        return states


def logits_of(kind: str, twin: Twin, x: Any) -> Any:
    if kind == "masked":
        x = twin.norm(getattr(twin.F, twin.config.hidden_act)(twin.linear(x, "dense")), "norm")
        return twin.F.linear(x, twin.weights["encoder.embeddings.word.weight"], twin.weights["bias"])
    if kind == "classes":
        return twin.linear(twin.linear(x[:, 0], "pooler.dense").tanh(), "classifier")
    return twin.linear(x, "spans")


def loss_of(kind: str, twin: Twin, logits: Any, wanted: dict[str, Any]) -> Any:
    if kind == "answers":
        losses = [twin.F.cross_entropy(logits[..., i], wanted[name]) for i, name in enumerate(wanted)]
        return (losses[0] + losses[1]) / 2
    return twin.F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted["labels"].reshape(-1))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
def test_states_logits_loss_and_gradients(torch: Any, kind: str, act: str) -> None:
    model = bert(kind, num_hidden_layers=3, hidden_act=act, seed=3)
    twin = Twin(torch, model)
    batch, wanted = tokens(4, LONGEST, 5), targets(kind, 4, LONGEST, 6)
    real = np.arange(LONGEST) < np.array([[LONGEST], [1], [4], [LONGEST - 1]])
    if kind == "masked":
        wanted["labels"][~real] = -100
    ours = model(**batch, **wanted, attention_mask=real.astype(int))
    ids, types, padding = (torch.from_numpy(a) for a in (*batch.values(), ~real))
    states = twin.states(ids, types, padding)
    for mine, theirs in zip(ours.hidden_states, states, strict=True):
        np.testing.assert_allclose(mine.numpy()[real], theirs.detach().numpy()[real], rtol=0, atol=1e-10)
    logits = logits_of(kind, twin, states[-1])
    mine, theirs = ours.logits.numpy(), logits.detach().numpy()
    rows = real if logits.ndim == 3 else slice(None)
    np.testing.assert_allclose(mine[rows], theirs[rows], rtol=0, atol=1e-10)
    loss = loss_of(kind, twin, logits, {name: torch.from_numpy(array) for name, array in wanted.items()})
    np.testing.assert_allclose(ours.loss.item(), loss.item(), rtol=0, atol=1e-10)
    expected = torch.autograd.grad(loss, list(twin.weights.values()))
    for name, mine, theirs in zip(twin.weights, mt.grad(ours.loss, model.parameters()), expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=1e-10, err_msg=name)
