"""Lines of the gradient table for the hand-written block: each option once alone, and empty batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from checker import Case, case

from minitransformer.kernels.attention.problem import Sparse
from minitransformer.kernels.decode.step import block_shapes
from minitransformer.ops.attention import make_problem
from minitransformer.ops.gpt_block import BlockOptions
from minitransformer.random import DrawKey

RNG = np.random.default_rng(6)
KEY = DrawKey(seed=5, step=3, site=17, first_row=2)


def block(B: int = 2, T: int = 3, H: int = 2, K: int = 2, D: int = 2, F: int = 3, **options: Any) -> Case:
    """A block with all biases, or with none if bias=False; `attention` are options of its attention."""
    C = H * D
    rms = options.get("norm") == "rms"
    biased = options.pop("bias", True)
    attention = {"is_causal": True, **options.pop("attention", {})}
    shapes = block_shapes(H, K, D, F, options.get("activation", "gelu_tanh"))
    weights = [
        None if i % 2 and (not biased or (rms and i in (1, 7))) else RNG.standard_normal(shape)
        for i, shape in enumerate(shapes)
    ]
    q, k = (np.empty((B, heads, T, D)) for heads in (H, K))
    problem = make_problem("attention", q, k, k, enable_gqa=True, **attention)
    if problem.dropout_p:
        problem = problem._replace(dropout_key=KEY)
    static = BlockOptions(H, K, problem, **options)
    return case(RNG.standard_normal((B, T, C)), *weights, empty=B * T == 0, options=static)


def block_cases() -> list[Case]:
    return [
        block(),
        block(bias=False),
        block(H=4, K=2),
        block(norm="rms"),
        block(norm="rms", bias=False, activation="swiglu"),
        block(activation="swiglu"),
        block(activation="relu"),
        block(T=4, attention={"window_size": (1, 0)}),
        block(attention={"alibi_slopes": [0.5, 0.25]}),
        block(attention={"dropout_p": 0.4}),
        block(T=4, attention={"sparse": Sparse(range(1, 9, 2), block=2)}),
        block(linear=True, H=4, K=2),
        block(linear=True, attention={"mask": np.array([[0, 1, 1], [1, 0, 1]])[:, None, None] > 0}),
        block(D=4, rope_positions=np.arange(3)),
        block(dropout1=(0.4, KEY), dropout2=(0.3, KEY._replace(site=3))),
        block(bias=False, dropout1=(0.4, KEY)),
        block(B=1, T=1, H=1, K=1, D=1, F=1),
        block(T=0),
        block(B=0),
    ]
