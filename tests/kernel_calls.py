"""Calls of every public function of every kernel family: what an implementation of the family must take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minitransformer.kernels.attention import reference as attention
from minitransformer.kernels.decode.step import BlockWeights, HeadWeights, Step, Weights, block_shapes
from minitransformer.kernels.linear_attention import reference as linear_attention
from minitransformer.kernels.rowwise import reference as rowwise
from minitransformer.random import DrawKey
from minitransformer.testing.calls import attended

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional arguments, and settings by name
ROWS = [(0, 3), (1, 1), (1, 7), (3, 5), (2, 33), (17, 64)]
SHAPES = [(0,), (1,), (7,), (3, 5), (2, 3, 11)]
SIZES = [0, 1, 7, 1000, 32768 + 5]  # the last is longer than a part of the optimizer's loops


def _normal(rng: np.random.Generator, dtype: Any, *shape: int) -> np.ndarray:
    return np.asarray(3 * rng.standard_normal(shape)).astype(dtype)


def _rows(*shapes: str, settings: tuple[Any, ...] = ()) -> Callable[..., list[Call]]:
    """Arrays of rows "NC", of one number a column "C" or a row "N"."""

    def calls(rng: np.random.Generator, dtype: Any) -> list[Call]:
        return [
            ((*(_normal(rng, dtype, *({"N": N, "C": C}[axis] for axis in shape)) for shape in shapes), *settings), {})
            for N, C in ROWS
        ]

    return calls


def _affine(rng: np.random.Generator, dtype: Any) -> list[Call]:
    full = _rows("NC", "C", "C", settings=(1e-5,))(rng, dtype)
    return full + [((x, None, None, eps), {}) for (x, _, _, eps), _ in full]


def _elementwise(arrays: int) -> Callable[..., list[Call]]:
    return lambda rng, dtype: [(tuple(_normal(rng, dtype, *shape) for _ in range(arrays)), {}) for shape in SHAPES]


def _classes(rng: np.random.Generator, dtype: Any) -> list[Call]:
    """Logits, targets with the first and the last class among them, which rows count, and the smoothing."""
    calls: list[Call] = []
    for N, C in ROWS:
        targets = rng.integers(0, C, N)
        targets[:1], targets[1:2] = C - 1, 0
        valid = rng.random(N) < 0.8
        targets[~valid] = -100
        calls += [((_normal(rng, dtype, N, C), targets, valid, smoothing), {}) for smoothing in (0.0, 0.1)]
    return calls


def _steps(rng: np.random.Generator, dtype: Any) -> list[Call]:
    """One token through a block and a head of odd widths, with each option."""
    options: list[dict[str, Any]] = [
        {},
        {"norm": "rms", "activation": "swiglu"},
        {"activation": "relu", "reach": 1},
        {"slopes": True, "visible": True},
        {"rotation": True, "reach": 0},
    ]
    calls: list[Call] = []
    for B, K, groups, D, F, stored, more in ((2, 2, 1, 8, 33, 5, 3), (1, 1, 3, 2, 5, 0, 1), (3, 1, 1, 34, 7, 40, 0)):
        H = K * groups
        C = H * D
        for given in options:
            swiglu = given.get("activation") == "swiglu"
            shapes = block_shapes(H, K, D, F, given.get("activation", "gelu_tanh"))
            weights = [
                None if swiglu and i % 2 else (_normal(rng, dtype, *shape) / 9).astype(dtype)
                for i, shape in enumerate(shapes)
            ]
            ready = dict(given)
            kind = {name: ready.pop(name) for name in ("norm", "activation") if name in ready}
            if given.get("visible"):
                ready["visible"] = rng.random((B, stored + 1)) < 0.5
            if given.get("slopes"):
                ready["slopes"] = rng.random(H)
            if given.get("rotation"):
                angles = rng.random((B, D // 2))
                ready["rotation"] = np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)
            cache = (_normal(rng, dtype, 1, B, K, stored + 1 + more, D) for _ in range(2))
            bias = None if swiglu else _normal(rng, dtype, C)
            head = HeadWeights(_normal(rng, dtype, C), bias, _normal(rng, dtype, 2 * F + 1, C))
            both = Weights([BlockWeights(*weights)], head, np.dtype(dtype), num_heads=H, num_kv_heads=K, **kind)
            calls.append(((_normal(rng, dtype, B, C), both, *cache, Step(stored, **ready)), {}))
    return calls


def _or_none(calls: Callable[..., list[Call]], *positions: int) -> Callable[..., list[Call]]:
    """Those calls, and the same without the arrays at `positions`."""

    def both(rng: np.random.Generator, dtype: Any) -> list[Call]:
        less = [
            (tuple(None if i in positions else x for i, x in enumerate(args)), settings)
            for args, settings in calls(rng, dtype)
        ]
        return calls(rng, dtype) + less  # no array in two calls: some are written to

    return both


def _looked_up(rng: np.random.Generator, dtype: Any) -> list[Call]:
    """Gradients of rows, their ids with the first and the last among them, and how many rows the table has."""
    calls: list[Call] = []
    for N, C in ROWS:
        ids = rng.integers(0, 5, N)
        ids[:1], ids[1:2] = 4, 0
        calls.append(((_normal(rng, dtype, N, C), ids, 5), {}))
    return calls


def _classes_backward(rng: np.random.Generator, dtype: Any) -> list[Call]:
    calls: list[Call] = []
    for (logits, targets, valid, smoothing), _ in _classes(rng, dtype):
        _, lse = rowwise.cross_entropy_forward(logits, targets, valid, smoothing)
        calls.append(((_normal(rng, dtype, len(logits)), logits, targets, valid, lse, smoothing), {}))
    return calls


def _attention(rng: np.random.Generator, dtype: Any) -> list[Call]:
    """q, k, v, bias, nothing to write to and the problem, of drawn sizes and options."""
    drawn = [attended(rng) for _ in range(20)]
    return [((*(x.astype(dtype) for x in inputs), None, static["problem"]), {}) for inputs, static in drawn]


def _attention_backward(rng: np.random.Generator, dtype: Any) -> list[Call]:
    calls: list[Call] = []
    for (q, k, v, bias, _, problem), _ in _attention(rng, dtype):
        out, lse = attention.forward(q, k, v, bias, None, problem)
        dout, dlse = _normal(rng, dtype, *out.shape), _normal(rng, dtype, *lse.shape)
        calls.append(((dout, dlse, q, k, v, bias, out, lse, None, None, None, problem), {}))
    return calls


def _weights(rng: np.random.Generator, dtype: Any) -> list[Call]:
    drawn = [args for args, _ in _attention(rng, dtype)]
    return [((q, k, bias, attention.forward(q, k, v, bias, None, p)[1], p), {}) for q, k, v, bias, _, p in drawn]


def _weights_backward(rng: np.random.Generator, dtype: Any) -> list[Call]:
    calls: list[Call] = []
    for (q, k, bias, lse, problem), _ in _weights(rng, dtype):
        weights = attention.weights_forward(q, k, bias, lse, problem)
        calls.append(((_normal(rng, dtype, *weights.shape), weights, q, k, bias, problem), {}))
    return calls


def _linear_attention(rng: np.random.Generator, dtype: Any) -> list[Call]:
    """q, k, v, whether causal, and the map; lengths about chunks and registers, and none."""
    calls: list[Call] = []
    for B, H, K, T, S, D, E in (
        (1, 1, 1, 1, 1, 1, 1),
        (2, 4, 2, 70, 70, 33, 5),
        (1, 2, 1, 3, 40, 7, 16),
        (1, 2, 2, 4, 0, 2, 3),
    ):
        for feature_map in ("elu", None):
            for causal in (False, True)[: 1 + (T == S)]:
                q, k, v = (
                    _normal(rng, dtype, B, H, T, D),
                    _normal(rng, dtype, B, K, S, D),
                    _normal(rng, dtype, B, K, S, E),
                )
                if feature_map is None:
                    q, k = abs(q), abs(k)
                calls.append(((q, k, v, causal, feature_map), {}))
    return calls


def _linear_attention_backward(rng: np.random.Generator, dtype: Any) -> list[Call]:
    calls: list[Call] = []
    for (q, k, v, *settings), _ in _linear_attention(rng, dtype):
        out, den = linear_attention.forward(q, k, v, *settings)
        calls.append(((_normal(rng, dtype, *out.shape), q, k, v, out, den, *settings), {}))
    return calls


def _allowed(rng: np.random.Generator, dtype: Any) -> list[Call]:
    drawn = [args for args, _ in _attention(rng, dtype)]
    return [((problem, len(q), q.shape[2], k.shape[2]), {}) for q, k, _, _, _, problem in drawn]


def _optimizer(state: int, settings: dict[str, Any]) -> Callable[..., list[Call]]:
    """Flat data, gradient and state; no element decays, some do, all do."""

    def calls(rng: np.random.Generator, dtype: Any) -> list[Call]:
        found: list[Call] = []
        for size in SIZES:
            for decayed in {0, size // 3, size}:
                arrays = (_normal(rng, dtype, size), *(abs(_normal(rng, dtype, size)) for _ in range(1 + state)))
                found.append((arrays, {**settings, "num_decayed": decayed}))
        return found

    return calls


def _flat(settings: Callable[[int], tuple[Any, ...]], arrays: int = 1) -> Callable[..., list[Call]]:
    return lambda rng, dtype: [
        ((*(_normal(rng, dtype, size) for _ in range(arrays)), *settings(size)), {}) for size in SIZES
    ]


_SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
_ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}

# By family and function: (generator, dtype) -> calls.
CALLS: dict[str, dict[str, Callable[..., list[Call]]]] = {
    "attention": {
        "allowed": _allowed,
        "forward": _attention,
        "backward": _attention_backward,
        "weights_forward": _weights,
        "weights_backward": _weights_backward,
    },
    "decode": {"next_logits": _steps},
    "linear_attention": {"forward": _linear_attention, "backward": _linear_attention_backward},
    "optimizer": {
        "sgd_step": lambda rng, dtype: (
            _optimizer(1, _SGD)(rng, dtype)
            + [((data, gradient, None), settings) for (data, gradient), settings in _optimizer(0, _SGD)(rng, dtype)]
        ),
        "adam_step": _optimizer(2, _ADAM),
        "adamw_step": _optimizer(2, _ADAM),
        "squared_norm": _flat(lambda size: ()),
        "clip_factor": lambda rng, dtype: [((norm, 1.0), {}) for norm in (0.0, 0.5, 2.0, np.inf, np.nan)],
        "clip_": _flat(lambda size: (1.0,)),
        "add_l1": _flat(lambda size: (0.1, size // 2), arrays=2),
    },
    "pointwise": {
        "erf": _elementwise(1),
        "gelu_forward": _elementwise(1),
        "gelu_backward": _elementwise(2),
        "gelu_tanh_forward": _elementwise(1),
        "gelu_tanh_backward": _elementwise(2),
        "add_bias_gelu_tanh": _or_none(_rows("NC", "C"), 1),
        "gelu_tanh_bias_backward": _or_none(_rows("NC", "NC", "C"), 2),
        "relu_forward": _elementwise(1),
        "relu_backward": _elementwise(2),
        "sigmoid_forward": _elementwise(1),
        "sigmoid_backward": _elementwise(2),
        "tanh_forward": _elementwise(1),
        "tanh_backward": _elementwise(2),
        "silu_forward": _elementwise(1),
        "silu_backward": _elementwise(2),
        "swiglu_forward": _elementwise(2),
        "swiglu_backward": _elementwise(3),
        "dropout_forward": lambda rng, dtype: [
            ((x, 0.3, DrawKey(2**40 + 1, 2, 3, 4)), {}) for (x,), _ in _elementwise(1)(rng, dtype)
        ],
        "dropout_backward": lambda rng, dtype: [
            ((x, rng.random(x.shape) < 0.7, 1 / 0.7), {}) for (x,), _ in _elementwise(1)(rng, dtype)
        ],
    },
    "rowwise": {
        "softmax_forward": _rows("NC"),
        "softmax_backward": _rows("NC", "NC"),
        "log_softmax_forward": _rows("NC"),
        "log_softmax_backward": _rows("NC", "NC"),
        "layer_norm_forward": _affine,
        "layer_norm_backward": _rows("NC", "NC", "C", "N", "N"),
        "add_residual": _or_none(_rows("NC", "NC", "C"), 2),
        "add_layer_norm": _or_none(_or_none(_rows("NC", "NC", "C", "C", "C", settings=(1e-5,)), 2), 3, 4),
        "layer_norm_backward_add": _or_none(_rows("NC", "NC", "C", "N", "N", "NC"), 2),
        "column_sum": _rows("NC"),
        "embedding_backward": _looked_up,
        "rms_norm_forward": lambda rng, dtype: [((x, w, eps), {}) for (x, w, _, eps), _ in _affine(rng, dtype)],
        "rms_norm_backward": _rows("NC", "NC", "C", "N"),
        "cross_entropy_forward": _classes,
        "cross_entropy_backward": _classes_backward,
    },
}
