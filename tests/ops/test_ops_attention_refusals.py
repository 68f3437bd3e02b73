"""What attention refuses, before any number is computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

import minitransformer.functional as F
from minitransformer.errors import ConfigError, DTypeError, MaskError, RangeError, ShapeError

attend = F.scaled_dot_product_attention
INF = np.inf
SIZES = st.fixed_dictionaries({n: st.integers(1, 4) for n in "BHTSD"} | {"seed": st.integers(0, 99)})


X = np.ones((2, 4, 3, 8))


@pytest.mark.parametrize(
    ("qkv", "options", "error", "message"),
    [
        ((X[0], X, X), {}, ShapeError, "expected 4 axes .*Split the heads first"),
        ((X, X[:1], X), {}, ShapeError, "the batch sizes differ"),
        ((X, X[..., :5], X), {}, ShapeError, "key has head width 5, query has 8 .*Project both"),
        ((X, X, X[:, :, :2]), {}, ShapeError, "key and value differ in heads or length"),
        ((X, X[:, :3], X[:, :3]), {"enable_gqa": True}, ShapeError, "4 query heads cannot share 3 key heads"),
        ((X, X[:, :2], X[:, :2]), {}, ShapeError, "Pass enable_gqa=True to share key heads"),
        ((X[..., :0], X[..., :0], X), {}, ShapeError, "there are no heads, or heads of width 0"),
        ((X[:, :0], X[:, :0], X[:, :0]), {}, ShapeError, "there are no heads, or heads of width 0"),
        ((X.astype(int), X, X), {}, DTypeError, "query has dtype int64"),
        ((X, X[:, :, :2], X[:, :, :2]), {"is_causal": True}, MaskError, "positions of 3 queries and 2 keys can be"),
        ((X, X, X), {"is_causal": True, "key_lengths": [1, 2]}, MaskError, "rows of different lengths can be"),
        ((X, X, X), {"causal_align": "right"}, ConfigError, "causal_align is 'right', expected one of"),
        ((X, X, X), {"window_size": 3}, ConfigError, r"window_size is 3, expected a pair \(left, right\)"),
        ((X, X, X), {"window_size": (-1, 0)}, ConfigError, "expected two non-negative integers"),
        ((X, X, X), {"softcap": -1.0}, ConfigError, r"softcap is -1\.0, expected a number from 0, finite"),
        ((X, X, X), {"scale": math.nan}, ConfigError, "scale is nan, expected a number, finite"),
        ((X, X, X), {"dropout_p": 1.0}, ConfigError, r"the dropout rate is 1\.0"),
        ((X, X, X), {"alibi_slopes": [1.0]}, ShapeError, r"alibi_slopes has shape \(1,\), expected \(4,\)"),
        ((X, X, X), {"key_lengths": [1]}, ShapeError, r"key_lengths has shape \(1,\), expected \(2,\)"),
        ((X, X, X), {"key_lengths": [1, 4]}, RangeError, r"key_lengths are \[1, 4\], expected 0 to 3"),
        ((X, X, X), {"key_lengths": [1.0, 2.0]}, DTypeError, "key_lengths has dtype float64, expected integers"),
        ((X, X, X), {"cu_seqlens": [0, 3]}, ShapeError, "cu_seqlens packs one row of self-attention, got B=2"),
        ((X[:1], X[:1], X[:1]), {"cu_seqlens": [0, 2]}, RangeError, r"cu_seqlens is \[0, 2\], expected ascending"),
        ((X[:1],) * 3, {"cu_seqlens": [0, 3], "key_lengths": [3]}, ConfigError, "exclude each other"),
        ((X, X, X), {"attn_mask": np.ones((3, 3), int)}, MaskError, "attn_mask has dtype int64, expected bool"),
        ((X, X, X), {"attn_mask": np.ones((3, 3))}, MaskError, "holds only 0 and 1, which would be added"),
        ((X, X, X), {"attn_mask": np.ones((2, 3), bool)}, MaskError, r"shape \(2, 3\), expected one that broadcasts"),
        ((X, X, X), {"key_padding_mask": np.ones(3)}, DTypeError, "in torch it means True = blocked"),
        ((X, X, X), {"causal": True}, DTypeError, "got an unexpected argument 'causal'"),
    ],
)
def test_refusals(qkv: Any, options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match="attention: .*" + message):
        attend(*qkv, **options)
