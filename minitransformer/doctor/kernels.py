"""Every function of every kernel family, once, against the reference: does what this machine compiled compute?"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from minitransformer.doctor.results import expect
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.decode.step import BlockWeights, HeadWeights, Step, Weights, block_shapes
from minitransformer.kernels.gpu.arrays import is_array, move, to_host
from minitransformer.random import DrawKey

_STEP = {"lr": 0.1, "weight_decay": 0.1, "num_decayed": 700}
_ADAM = {**_STEP, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "step": 3}
_SIZES = {"N": 37, "C": 33, "V": 5, "P": 1000, "B": 2, "H": 4, "K": 2, "T": 35, "D": 18, "E": 7}
_SIMULATED = {**_SIZES, "B": 1, "D": 3, "E": 2}  # where an access to memory takes some 10 us
_KEY = DrawKey(seed=1, step=2, site=3, first_row=0)
_FUSED = 4  # roundings: where the reference rounds a product and then a sum, a GPU may round once
_BLOCK = block_shapes(4, 2, 18, 50, "gelu_tanh")


class Call(NamedTuple):
    """`arrays` are shapes in the letters of `_SIZES`, positive numbers; `more` follows them.

    `allowed` is how far results may be from the reference, in units of rounding times their largest number; 0 for
    the same bits.
    """

    function: str
    arrays: str
    more: tuple[Any, ...] = ()
    settings: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    allowed: float = 200


def _targets(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    valid = rng.random(_SIZES["N"]) < 0.8
    return np.where(valid, rng.integers(0, _SIZES["C"], _SIZES["N"]), -100), valid


_TARGETS = _targets(np.random.default_rng(1))
_IDS = np.random.default_rng(2).integers(0, 9, _SIZES["N"])
_PROBLEM = Problem(scale=0.3, offset=np.zeros(1, np.int64), causal=True)
_RULED = _PROBLEM._replace(
    softcap=3.0,
    alibi_slopes=np.array([0.1, 0.2, 0.3, 0.4]),
    mask=np.arange(35) % 5 > 0,
    dropout_p=0.2,
    dropout_key=_KEY,
)

CALLS: dict[str, list[Call]] = {
    "attention": [
        *(Call("forward", "BHTD BKTD BKTE", (None, None, problem)) for problem in (_PROBLEM, _RULED)),
        *(Call("backward", "BHTE BHT BHTD BKTD BKTE - BHTE BHT - - -", (problem,)) for problem in (_PROBLEM, _RULED)),
        Call("weights_forward", "BHTD BKTD - BHT", (_PROBLEM,)),
        Call("weights_backward", "BHTT BHTT BHTD BKTD -", (_PROBLEM,)),
    ],
    "decode": [Call("next_logits", "step")],
    "linear_attention": [
        call
        for settings in ((True, "elu"), (False, None))
        for call in (
            Call("forward", "BHTD BKTD BKTE", settings),
            Call("backward", "BHTE BHTD BKTD BKTE BHTE BHT", settings),
        )
    ],
    "optimizer": [
        Call("sgd_step", "P P -", (), {**_STEP, "momentum": 0.0}, 0),
        Call("sgd_step", "P P P", (), {**_STEP, "momentum": 0.9}, 0),
        Call("adam_step", "P P P P", (), _ADAM, 0),
        Call("adamw_step", "P P P P", (), _ADAM, 0),
        Call("squared_norm", "P"),
        Call("clip_factor", "", (3.0, 1.0), {}, 0),
        Call("clip_", "P", (1.0,)),
        Call("add_l1", "P P", (0.1, 700), {}, 0),
    ],
    "pointwise": [
        *(Call(f"{name}_forward", "P") for name in ("gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "silu")),
        *(Call(f"{name}_backward", "P P") for name in ("gelu", "gelu_tanh", "relu", "sigmoid", "tanh", "silu")),
        Call("erf", "P"),
        Call("swiglu_forward", "P P"),
        Call("swiglu_backward", "P P P"),
        Call("add_bias_gelu_tanh", "NC C"),
        Call("gelu_tanh_bias_backward", "NC NC C"),
        Call("dropout_forward", "NC", (0.3, _KEY)),
        Call("dropout_backward", "NC", (np.arange(37 * 33).reshape(37, 33) % 3 > 0, 1.5)),
    ],
    "rowwise": [
        *(Call(f"{name}_forward", "NC") for name in ("softmax", "log_softmax")),
        *(Call(f"{name}_backward", "NC NC") for name in ("softmax", "log_softmax")),
        Call("layer_norm_forward", "NC C C", (1e-5,)),
        Call("layer_norm_backward", "NC NC C N N"),
        Call("add_layer_norm", "NC NC C C C", (1e-5,)),
        Call("add_residual", "NC NC C"),
        Call("layer_norm_backward_add", "NC NC C N N NC"),
        Call("rms_norm_forward", "NC C", (1e-5,)),
        Call("rms_norm_backward", "NC NC C N"),
        Call("cross_entropy_forward", "NC", (*_TARGETS, 0.1)),
        Call("cross_entropy_backward", "N NC", (*_TARGETS, np.full(37, 5.0), 0.1)),
        Call("column_sum", "NC"),
        Call("embedding_backward", "NC", (_IDS, 9)),
    ],
}


def agrees(family: str, implementation: str, device: str = "cpu") -> None:
    """Every function of one implementation against the reference, in both dtypes; `CheckFailed` if one differs.

    Its arrays are on `device`, those of the reference on the host.
    """
    sides = [
        (import_module(f"minitransformer.kernels.{family}.{name}"), where)
        for name, where in ((implementation, device), ("reference", "cpu"))
    ]
    sizes = _SIMULATED if device == "simulator" else _SIZES
    for call in CALLS[family]:
        for dtype in (np.float32, np.float64):
            got, expected = (
                _results(getattr(module, call.function), call, dtype, where, sizes) for module, where in sides
            )
            error = max(map(_distance, got, expected)) / np.finfo(dtype).eps
            allowed = max(call.allowed, _FUSED) if device == "cuda" else call.allowed
            problem = f"{call.function} in {np.dtype(dtype)} is {error:.1e} roundings away from the reference"
            fix = "Remove the cache folder that the report names and run this again; if it fails again, report it"
            expect(error <= allowed, f"{family} kernels", f"{problem}, expected {allowed:g}", fix)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, over the largest number; infinite where one is NaN."""
    if a.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):  # the log-sum-exp of an empty row is -inf
        error = float(np.max(np.where(a == b, 0, np.abs(a - b))))
    error /= max(float(np.max(np.abs(b), where=np.isfinite(b), initial=0)), 1e-30)
    return error if error == error else np.inf


def _results(
    function: Callable[..., Any], call: Call, dtype: Any, device: str, sizes: dict[str, int]
) -> list[np.ndarray]:
    """What a kernel returns, and what it has made of its arrays, in float64."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return np.abs(rng.normal(size=shape)).astype(dtype)

    if call.arrays == "step":
        blocks = [BlockWeights(*(draw(*shape) / 9 for shape in _BLOCK)) for _ in range(2)]
        head = HeadWeights(draw(72), draw(72), draw(11, 72))
        weights = Weights(blocks, head, dtype, num_heads=4, num_kv_heads=2)
        arguments: list[Any] = [draw(2, 72), weights, draw(2, 2, 2, 9, 18), draw(2, 2, 2, 9, 18), Step(5)]
    else:
        arguments = [
            None if shape == "-" else draw(*(sizes[letter] for letter in shape)) for shape in call.arrays.split()
        ]
        arguments += [x.astype(dtype) if _is_float(x) else x for x in deepcopy(call.more)]
    arguments = [move(x, device) if isinstance(x, np.ndarray) else x for x in arguments]
    returned = function(*arguments, **call.settings)
    several = returned if isinstance(returned, tuple) else (returned,)
    results = [*several, *arguments]
    numbers = [x for x in results if is_array(x) or isinstance(x, (float, np.floating))]
    return [np.asarray(to_host(x) if is_array(x) else x, np.float64) for x in numbers]


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"
