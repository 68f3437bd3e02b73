"""One token a row through a GPT by hand: what generation spends its time in.

The arithmetic of a token is that of reading the weights once; every op beside it that is a node of its own costs as
much as a layer. So this goes from ids to logits on plain arrays, in one compiled call. `GPT` composes the same of its
modules for everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.autograd import Parameter
from minitransformer.kernels import serve
from minitransformer.kernels.decode.step import BlockWeights, HeadWeights, Step, Weights
from minitransformer.models.gpt_block import GPTBlock
from minitransformer.nn.embedding import Embedding
from minitransformer.nn.kv_cache import KVCache
from minitransformer.nn.linear import Linear
from minitransformer.ops.embedding import check_ids
from minitransformer.ops.position import angles

_FEW = 16  # rows up to which reading the weights once a row costs no more than matrix products do


def can_step(model: Any, B: int) -> bool:
    """Whether `Steps` computes what the model does: few rows, no dropout, nothing watched and no part replaced."""
    config, norm = model.config, model.norm
    return (
        0 < B <= _FEW
        and model.wte.weight.device == "cpu"
        and not (model.training and config.dropout)
        and type(model.wte) is Embedding
        and (config.positions != "learned" or type(model.wpe) is Embedding)
        and (config.tie_weights or type(model.head) is Linear)
        and all(type(block) is GPTBlock and block.runs_by_hand() for block in model.blocks)
        and all(type(block.norm1) is type(norm) and block.norm1.eps == norm.eps for block in model.blocks)
    )


class Steps:
    """The logits of one more token a row, and the next, and the next; to rounding what the modules compute.

    No gradients. The parameters are those that the model has when this is made.
    """

    def __init__(self, model: Any, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        config, norm = model.config, model.norm
        self.table = model.wte.weight.data  # (V, C)
        head = self.table if config.tie_weights else model.head.weight.data
        bias = getattr(norm, "bias", None)
        self.weights = Weights(
            [BlockWeights(*map(_data, block.weights())) for block in model.blocks],
            HeadWeights(norm.weight.data, _data(bias), head),
            self.table.dtype,
            num_heads=config.n_head,
            num_kv_heads=config.n_kv_head or config.n_head,
            norm=config.norm,
            eps=norm.eps,
            activation="gelu_tanh" if config.ffn == "gelu" else config.ffn,
        )

    def __call__(self, ids: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
        """Logits (B, V) for ids (B,), whose keys and values go to the cache.

        `real` (B, S) says which of the tokens seen, those of `ids` at the end, are not padding.
        """
        model, cache, config = self.model, self.cache, self.model.config
        check_ids("GPT", ids, len(self.table))
        past = cache.length
        model.check_length(past + 1)
        cache.reserve(1, model.reach if config.forgets else None)
        slots = cache.stored + 1
        window, sparse = model.seen(real, past + 1, slots)
        visible = None
        if real is None:
            positions = np.full(1, past)
        else:
            positions = np.maximum(real.sum(axis=1) - 1, 0)
            visible = real[:, past + 1 - slots :]
        if sparse is not None:
            seen = sparse.allowed(np.array(cache.stored), np.arange(slots))[:, 0, 0]  # (B or 1, slots)
            visible = np.broadcast_to(seen, (len(ids), slots)) if visible is None else visible & seen
        x = self.table[ids]  # (B, C), written to from now on
        rotation = None
        if config.positions == "learned":
            x += model.wpe.weight.data[positions]
        elif config.positions == "sinusoidal":
            x += model._sinusoids[positions].astype(x.dtype)
        elif config.positions == "rope":
            cos, sin = angles(positions, config.n_embd // config.n_head, x.dtype)  # (1 or B, D/2)
            shape = len(x), cos.shape[1]
            rotation = np.broadcast_to(cos, shape), np.broadcast_to(sin, shape)
        step = Step(
            stored=cache.stored,
            reach=None if window is None else window[0],
            visible=visible,
            slopes=model._alibi,
            rotation=rotation,
        )
        logits: np.ndarray = serve("decode", x).next_logits(x, self.weights, cache.keys, cache.values, step)
        cache.advance(1)
        return logits


def _data(parameter: Parameter | None) -> Any:
    return None if parameter is None else parameter.data
