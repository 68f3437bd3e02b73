"""Causal self-attention without a softmax, and what it keeps of the tokens it has read."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitransformer import functional as F
from minitransformer.autograd import Tensor, as_array, check_arrays, check_dtype
from minitransformer.checks import allocate, check_count, check_size, shown
from minitransformer.errors import DTypeError, ShapeError
from minitransformer.kernels.gpu.arrays import check_device, like, move
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.kv_cache import checked_layer, checked_rows
from minitransformer.nn.linear import as_sequence
from minitransformer.ops.linear_attention import elu_plus_one, linear_attention_forward


class StateCache:
    """The sums over all tokens seen so far that linear attention needs, per layer: its size does not grow.

    `sums` is (n_layer, B, K, D, D + 1): of phi(k) v^T and, in the last column, of phi(k). Layers add to them, and the
    model counts the tokens with `advance`. Inference only: what is stored has no gradient.
    """

    def __init__(
        self, n_layer: int, batch_size: int, num_kv_heads: int, head_width: int, dtype: np.dtype, device: str = "cpu"
    ) -> None:
        check_device("StateCache", device)
        sizes = {"n_layer": n_layer, "batch_size": batch_size, "num_kv_heads": num_kv_heads, "head_width": head_width}
        check_size("StateCache", **sizes)
        shape = (n_layer, batch_size, num_kv_heads, head_width, head_width + 1)
        dtype = check_dtype("StateCache", dtype)
        self.sums = allocate("StateCache", "sums", shape, dtype, lambda: move(np.zeros(shape, dtype), device))
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Add k and v (B, K, T, D) to what `layer` has seen."""
        self._add(self._sums("StateCache.append", layer), *self._pair("StateCache.append", k, v))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention (B, H, T, D) of q to the tokens seen before and to k and v, which are then seen too."""
        sums, (new_k, new_v) = self._sums("StateCache.attend", layer), self._pair("StateCache.attend", k, v)
        out, own = linear_attention_forward(as_array("StateCache.attend", q), new_k, new_v, is_causal=True)
        B, H, T, D = out.shape
        queries = elu_plus_one(own.q).reshape(B, sums.shape[1], -1, D)  # of all heads that share a key head
        before = (queries @ sums).reshape(B, H, T, D + 1)
        total = before[..., D] + own.den
        total[total == 0] = 1
        self._add(sums, new_k, new_v)
        return Tensor((before[..., :D] + out * own.den[..., None]) / total[..., None])

    def select(self, rows: np.ndarray) -> None:
        """Go on with these rows of the batch (B,), as `KVCache.select`."""
        rows = like(self.sums, checked_rows("StateCache.select", rows, self.sums.shape[1]))
        self.sums[...] = self.sums[:, rows]

    def advance(self, T: int) -> None:
        """Count T tokens as seen, after all layers have added them."""
        self.length += check_count("StateCache.advance", "T", T)

    def _sums(self, op: str, layer: int) -> np.ndarray:
        return self.sums[checked_layer(op, layer, len(self.sums))]

    def _pair(self, op: str, k: Tensor, v: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Both as arrays (B, K, T, D)."""
        new_k, new_v = as_array(op, k), as_array(op, v)
        check_arrays(op, k=new_k, v=new_v)
        B, K, D = self.sums.shape[1:4]
        if new_k.ndim != 4 or new_k.shape != new_v.shape or new_k.shape != (B, K, new_k.shape[2], D):
            problem = f"k and v have shapes {new_k.shape} and {new_v.shape}, expected one ({B}, {K}, T, {D})"
            raise ShapeError(op, problem, "Make the cache with model.make_cache(batch_size) for this batch size")
        return new_k, new_v

    @staticmethod
    def _add(sums: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        features = elu_plus_one(k).swapaxes(2, 3)  # (B, K, D, T)
        sums[..., :-1] += features @ v
        sums[..., -1] += features.sum(axis=3)


class LinearSelfAttention(MultiHeadAttention):
    """Causal self-attention with weights phi(q) . phi(k), phi = elu + 1 (Katharopoulos et al. 2020).

    The parameters are those of `MultiHeadAttention`. There are no weights that could be dropped, so `dropout_rate` is
    without effect. Positions by `rope_positions` turn queries and keys before phi.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        *,
        attn_mask: np.ndarray | None = None,
        rope_positions: Any = None,
        cache: StateCache | None = None,
        cache_layer: int = 0,
    ) -> Tensor:
        """(B, T, C) from query (B, T, C); bool `attn_mask` (B, 1, 1, T) is False for keys that nobody sees."""
        if cache is not None and not isinstance(cache, StateCache):
            problem = f"cache is {shown(cache)}, expected a StateCache"
            raise DTypeError("LinearSelfAttention", problem, "Make it with model.make_cache(batch_size)")
        query = as_sequence("LinearSelfAttention", "query", query, self.d_model)
        q, k, v = self._project(query, None, None)
        if rope_positions is not None:
            q, k = F.apply_rope(q, rope_positions), F.apply_rope(k, rope_positions)
        if attn_mask is not None:
            shape = (*query.shape[:1], 1, 1, query.shape[1])
            if not isinstance(attn_mask, np.ndarray) or attn_mask.dtype != bool or attn_mask.shape != shape:
                problem = f"attn_mask is {shown(attn_mask)}, expected bools of shape {shape}"
                raise ShapeError("LinearSelfAttention", problem, "Only whole keys can be hidden from linear attention")
            k = F.where(attn_mask.swapaxes(2, 3), k, k.dtype.type(-np.inf))  # phi of that is 0
        heads = F.linear_attention(q, k, v, is_causal=True) if cache is None else cache.attend(cache_layer, q, k, v)
        B, H, T, D = heads.shape
        return self.out(heads.transpose(1, 2).reshape(B, T, H * D))  # (B, T, C)
