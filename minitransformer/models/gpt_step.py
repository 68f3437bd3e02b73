"""One token a row through a GPT by hand: what generation spends its time in.

The arithmetic of a token is that of reading the weights once; every op beside it that is a node of its own costs as
much as a layer. So this goes from ids to logits on plain arrays, all blocks in one compiled call. `GPT` composes the
same of its modules for everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer.autograd import Tensor, is_grad_enabled
from minitransformer.kernels import serve
from minitransformer.kernels.decode.step import Blocks, BlockWeights, Step
from minitransformer.nn.embedding import Embedding
from minitransformer.nn.kv_cache import KVCache
from minitransformer.nn.linear import Linear
from minitransformer.nn.norm import RMSNorm
from minitransformer.ops.embedding import check_ids
from minitransformer.ops.position import angles

_FEW = 16  # rows up to which reading the weights once a row costs no more than matrix products do


def can_step(model: Any, ids: np.ndarray) -> bool:
    """Whether ids (B, T) are one token a row, few rows, without gradients and dropout, and no part was replaced."""
    B, T = ids.shape
    first = model.blocks[0].norm1
    return (
        T == 1
        and B <= _FEW
        and not is_grad_enabled()
        and not (model.training and model.config.dropout)
        and model.wte.weight.dtype.kind == "f"
        and type(model.norm) is type(first)
        and type(model.wte) is Embedding
        and (model.config.positions != "learned" or type(model.wpe) is Embedding)
        and (model.config.tie_weights or type(model.head) is Linear)
        and all(block.runs_by_hand() and block.norm1.eps == first.eps for block in model.blocks)
    )


def step(
    model: Any, ids: np.ndarray, cache: KVCache, positions: np.ndarray, visible: np.ndarray | None, reach: int
) -> Tensor:
    """Logits (B, 1, V) for ids (B, 1), whose keys and values go to the cache; to rounding what the modules compute.

    `positions` are (1,) or (B, 1), `visible` (B, S) tells keys that are not padding, `reach` how many of them before
    its own a token sees.
    """
    config = model.config
    table = model.wte.weight.data
    check_ids("embedding", ids, len(table))
    x = table[ids[:, 0]]  # (B, C), written to from now on
    if config.positions == "learned":
        x += model.wpe.weight.data[positions.reshape(-1)]
    elif config.positions == "sinusoidal":
        x += model._sinusoids[positions.reshape(-1)].astype(x.dtype)
    rotation = None
    if config.positions == "rope":
        tables = angles(positions, config.n_embd // config.n_head, x.dtype)  # (1, D/2) or (B, 1, 1, D/2)
        D2 = tables[0].shape[-1]
        cos, sin = (np.broadcast_to(part.reshape(-1, D2), (len(x), D2)) for part in tables)
        rotation = cos, sin
    asked = Step(
        stored=cache.stored,
        reach=reach if config.window is not None or cache.length + 1 > config.block_size else None,
        visible=visible,
        slopes=model._alibi,
        rotation=rotation,
    )
    serve("decode", x).step_blocks(x, _blocks(model, x.dtype), cache.keys, cache.values, asked)
    norm, rowwise = model.norm, serve("rowwise", x)
    if isinstance(norm, RMSNorm):
        x = rowwise.rms_norm_forward(x, norm.weight.data, norm.eps)[0]
    else:
        x = rowwise.layer_norm_forward(x, norm.weight.data, None if norm.bias is None else norm.bias.data, norm.eps)[0]
    out = x @ (table if config.tie_weights else model.head.weight.data).T
    return Tensor(out[:, None])


def _blocks(model: Any, dtype: np.dtype) -> Blocks:
    """The weights of all blocks, those of the last step if they still are."""
    arrays: list[Any] = [None if p is None else p._data for block in model.blocks for p in block.weights()]
    blocks: Blocks | None = model._blocks_of_last_step
    if blocks is None or blocks.dtype != dtype or not blocks.hold(arrays):
        config, each = model.config, len(BlockWeights._fields)
        blocks = model._blocks_of_last_step = Blocks(
            [BlockWeights(*arrays[i : i + each]) for i in range(0, len(arrays), each)],
            dtype,
            num_heads=config.n_head,
            num_kv_heads=config.n_kv_head or config.n_head,
            norm=config.norm,
            eps=model.blocks[0].norm1.eps,
            activation="gelu_tanh" if config.ffn == "gelu" else config.ffn,
        )
    return blocks
