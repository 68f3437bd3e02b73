"""Users' functions in the kernels for a GPU, in the simulator: as in the reference, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_attention_cpu import ZERO
from test_attention_cuda import SIZES, arrays, assert_close, both, there
from test_attention_mods import MODS, Mod

from minitransformer import functional as F
from minitransformer import tensor
from minitransformer.errors import ConfigError, GradientError
from minitransformer.kernels.attention import cuda, reference
from minitransformer.kernels.attention.cuda_user import Mods
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.gpu.memory import KernelError

TABLE = np.zeros((2, 5))


def problem_of(name: str, **options: Any) -> Problem:
    mod, grad, buffers = MODS[name]
    return Problem(0.4, ZERO, score_mod=mod, score_mod_grad=grad, buffers=buffers, **options)


@pytest.mark.parametrize("name", MODS)
def test_every_function_agrees(name: str) -> None:
    given = arrays(*SIZES, np.float32)
    problem = problem_of(name, causal=True)
    assert_close(both(cuda, given, None, problem), both(reference, given, None, problem))


@pytest.mark.parametrize("name", ["derivative given", "buffers of all kinds"])
def test_with_other_rules(name: str) -> None:
    given = arrays(*SIZES, np.float64)
    bias = np.linspace(-1, 1, 5)
    problem = problem_of(name, softcap=2.0, alibi_slopes=np.array([0.5, 0.1]), window=(3, 1))
    moved = problem._replace(buffers=tuple(map(there, problem.buffers)))
    assert_close(both(cuda, given, bias, moved), both(reference, given, bias, problem))


def test_weights_and_their_gradients() -> None:
    _, _, q, k, v = arrays(*SIZES, np.float32)
    problem = problem_of("softcap by a helper")
    weights = reference.weights_forward(q, k, None, reference.forward(q, k, v, None, None, problem)[1], problem)
    _, lse = cuda.forward(*map(there, (q, k, v)), None, None, problem)
    assert_close([cuda.weights_forward(there(q), there(k), None, lse, problem).host], [weights])
    arguments = weights + 1, weights, q, k
    ours = cuda.weights_backward(*map(there, arguments), None, problem)
    assert_close(
        [x.host for x in ours if x is not None],
        [x for x in reference.weights_backward(*arguments, None, problem) if x is not None],
    )


def raising(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    if q > 100:
        raise ValueError
    return s


@pytest.mark.parametrize("given", [False, True])
def test_a_derivative_that_cannot_be_compiled_leaves_the_forward(given: bool) -> None:
    arrays_ = arrays(*SIZES, np.float32)
    grad: Mod | None = (lambda s, b, h, q, k: 1.0 if s > 0 else 0.5) if given else None
    problem = Problem(1.0, ZERO, score_mod=lambda s, b, h, q, k: s if s > 0 else s * 0.5, score_mod_grad=grad)
    if given:
        assert_close(both(cuda, arrays_, None, problem), both(reference, arrays_, None, problem))
    else:
        cuda.forward(*map(there, arrays_[2:]), None, None, problem)
        with pytest.raises(ConfigError, match=r"<lambda> cannot be compiled for a GPU \(.* give score_mod_grad"):
            both(cuda, arrays_, None, problem)


REFUSED: dict[str, tuple[Mod, str]] = {
    "an array around it": (lambda s, b, h, q, k: s + TABLE[0, k], "it reads TABLE, a ndarray, which may change unseen"),
    "what Numba has not": (lambda s, b, h, q, k: s.astype(float), "Unknown attribute 'astype'"),
    "an error": (raising, "it raises errors, which nobody on a GPU can see"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(name: str) -> None:
    mod, reason = REFUSED[name]
    q, k, v = (tensor(x, device="simulator") for x in arrays(*SIZES, np.float32)[2:])
    with pytest.raises(ConfigError) as caught:
        F.flex_attention(q, k, v, mod, enable_gqa=True)
    text = str(caught.value)
    assert text.startswith(f"flex_attention: {mod.__name__} cannot be compiled for a GPU (") and reason in text
    assert text.endswith("give score_mod_grad; or move q, k and v to the CPU.")


def test_a_complex_step_that_drops_the_imaginary_part_is_refused() -> None:
    given = arrays(*SIZES, np.float32)
    with pytest.raises(GradientError, match=r"score_mod: .*, or give score_mod_grad\."):
        both(cuda, given, None, Problem(1.0, ZERO, score_mod=lambda s, b, h, q, k: abs(s) * 2))


def test_an_index_beyond_a_buffer_is_found_by_the_simulator() -> None:
    given = arrays(*SIZES, np.float32)
    with pytest.raises(KernelError, match="IndexError"):
        both(cuda, given, None, problem_of("table")._replace(buffers=(np.zeros((2, 3)),)))


def test_functions_that_compute_the_same_share_their_kernels() -> None:
    def made(factor: float) -> Mods:
        return Mods(Problem(1.0, ZERO, score_mod=lambda s, b, h, q, k: s * factor))

    assert made(2.0) == made(2.0) and hash(made(2.0)) == hash(made(2.0))
    assert made(2.0) != made(3.0) and made(2.0) != "score_mod"
