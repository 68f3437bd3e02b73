"""One call of attention as the laws draw and cut it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minitransformer.testing.attention_problem import AttentionProblem

Index = Sequence[int] | slice | np.ndarray
EVERYTHING = slice(None)


class Problem(AttentionProblem):
    """q (B, H, T, D), k (B, K, S, D), v (B, K, S, Dv), an upstream gradient (B, H, T, Dv), and options by name."""

    def with_(self, **arrays: np.ndarray) -> Problem:
        """With these arrays in the place of its own."""
        return replace(self, **arrays)  # type: ignore[arg-type]

    def having(self, **options: Any) -> Problem:
        """With these options besides its own, or in their place."""
        return replace(self, options={**self.options, **options})

    def without(self, *names: str) -> Problem:
        return replace(self, options={n: x for n, x in self.options.items() if n not in names})

    def take(
        self,
        b: Index = EVERYTHING,
        h: Index = EVERYTHING,
        kv: Index = EVERYTHING,
        t: Index = EVERYTHING,
        s: Index = EVERYTHING,
    ) -> Problem:
        """These rows, query heads, key heads, queries and keys, and what belongs to them of every option."""
        options = dict(self.options)
        if "attn_mask" in options:
            options["attn_mask"] = _cut(options["attn_mask"], (b, h, t, s), self.sizes)
        if "key_lengths" in options:
            options["key_lengths"] = options["key_lengths"][b]
        if "alibi_slopes" in options:
            options["alibi_slopes"] = options["alibi_slopes"][h]
        return Problem(
            _cut(self.q, (b, h, t)),
            _cut(self.k, (b, kv, s)),
            _cut(self.v, (b, kv, s)),
            _cut(self.dout, (b, h, t)),
            options,
        )

    def magnitudes(self) -> dict[str, float]:
        """How large output and gradients can be, and "scores": what rounding is measured by."""
        _, H, T, S = self.sizes
        options = self.options
        group = H // self.k.shape[1]
        q, k, v, dout = (float(abs(x).max(initial=0.0)) for x in (self.q, self.k, self.v, self.dout))
        scale = abs(options["scale"]) if "scale" in options else self.q.shape[3] ** -0.5
        products = np.matmul(abs(self.q), np.repeat(abs(self.k), group, axis=1).swapaxes(2, 3))
        scores = scale * float(products.max(initial=0.0))
        scores += float(abs(options.get("alibi_slopes", np.zeros(1))).max()) * (T + S)
        mask = options.get("attn_mask", np.zeros(1, bool))
        scores += float(np.max(abs(mask), initial=0.0, where=np.isfinite(mask))) if mask.dtype != bool else 0.0
        dscores = 2 * self.v.shape[3] * dout * v
        return {
            "scores": scores,
            "out": v,
            "dq": scale * dscores * k,
            "dk": scale * dscores * q * T * group,
            "dv": dout * T * group,
            "weights": 1.0,
            "lse": 1.0 + scores,
        }


def _cut(x: np.ndarray, indices: Sequence[Index], full: Sequence[int] | None = None) -> np.ndarray:
    """x[indices], one an axis; axes along which it is broadcast to the `full` shape stay as they are."""
    for axis, index in enumerate(indices):
        if full is None or x.shape[axis] == full[axis]:
            x = x[(slice(None),) * axis + (index,)]
    return x
