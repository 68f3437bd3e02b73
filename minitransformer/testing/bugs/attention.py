"""Wrong attention: scores, masks, and the four gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

import minitransformer.ops  # noqa: F401  (registers the ops)
from minitransformer import functional
from minitransformer.autograd import OPS
from minitransformer.kernels.attention.problem import Problem
from minitransformer.kernels.attention.reference import allowed
from minitransformer.nn import MultiHeadAttention
from minitransformer.testing.bugs.bug import bug

_ATTENTION = OPS["attention"]
_TESTS = "tests/ops/test_ops_attention.py::"


def _for_everybody(problem: Problem) -> Problem:
    """`problem` without any rule about who may attend to whom."""
    return problem._replace(causal=False, window=(None, None), key_lengths=None, documents=None, mask=None)


# --- forward ---------------------------------------------------------------------------------------------


@bug(
    _ATTENTION,
    "forward",
    story="Scores are not divided by sqrt(D). Nothing fails: training is slow, because the softmax saturates.",
    exercise="Forward and backward agree with each other, so a gradient check passes. What does not?",
    solution="The comparison with the formula in plain loops; and the weights no longer reproduce the output (L14).",
    caught_by=[f"{_TESTS}test_attention_by_loops"],
)
def attention_without_scale(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    return right(q, k, v, bias, problem=problem._replace(scale=1.0))


@bug(
    _ATTENTION,
    "forward",
    story="The queries were scaled when they were projected, and the scores are scaled again.",
    exercise="With D = 1 nobody notices. Which inputs does a test need, and what does it compare with?",
    solution="D > 1 and the formula in plain loops, or any other implementation. No law relates two values of D; only "
    "where the maps come from code of their own, as here, do they no longer reproduce the output (L14).",
    caught_by=[f"{_TESTS}test_attention_by_loops"],
)
def attention_scaled_twice(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    return right(q, k, v, bias, problem=problem._replace(scale=problem.scale**2))


@bug(
    _ATTENTION,
    "forward",
    story="The softmax runs over all keys, and the weights of masked ones are set to 0 afterwards.",
    exercise="The future has weight 0, and yet it leaks. How?",
    solution="Through the denominator: L1 (changing later keys leaves earlier outputs alone), L3 (appended masked "
    "keys change nothing) and L14 (rows sum to 1) all fail.",
    caught_by=[
        f"{_TESTS}test_later_keys_leave_earlier_outputs_bitwise_unchanged",
        f"{_TESTS}test_masked_keys_may_hold_anything",
    ],
)
def mask_after_softmax(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    (_, lse), saved = right(q, k, v, bias, problem=_for_everybody(problem))
    (out, own), _ = right(q, k, v, bias, problem=problem)
    out = out * np.exp(own - lse)[..., None]  # what is left keeps its share of the sum over all keys
    return (out, lse), saved._replace(out=out, problem=problem)


@bug(
    _ATTENTION,
    "forward",
    story="Masked scores get -1e9 instead of -inf; a query whose keys are all padding then attends to all of them "
    "(the other choice, NaN, is pytorch#24816, #41508, #103749).",
    exercise="For most queries the result is right to the last bit. For which is it not?",
    solution="For a query that may attend to nothing: its output must be 0 and its gradient 0 (L15), and here it is "
    "the mean of all values.",
    caught_by=[f"{_TESTS}test_a_query_that_may_attend_to_nothing"],
)
def mask_of_minus_1e9(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    result, saved = right(q, k, v, bias, problem=problem)
    may = allowed(problem, q.shape[0], q.shape[2], k.shape[2])
    if may is not None:
        leak = np.where(may, 0, -1e9).astype(q.real.dtype)  # (B, H, T, S) by broadcasting
        result, _ = right(q, k, v, leak if bias is None else bias + leak, problem=_for_everybody(problem))
    return result, saved


@bug(
    _ATTENTION,
    "forward",
    story="The causal mask is one diagonal too high: each token sees the one it is to predict. The loss falls "
    "beautifully, and the model generates noise.",
    exercise="The gradient check passes. Write the shortest test that fails.",
    solution="L1: change the token at t + 1 and see whether output t changed; or ask for its gradient, which is not 0.",
    caught_by=[
        f"{_TESTS}test_causal_is_its_mask",
        f"{_TESTS}test_later_keys_leave_earlier_outputs_bitwise_unchanged",
    ],
)
def causal_sees_one_ahead(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    if problem.causal:
        left, reach = problem.window
        problem = problem._replace(causal=False, window=(left, 1 if reach is None else min(reach, 1)))
    return right(q, k, v, bias, problem=problem)


@bug(
    _ATTENTION,
    "forward",
    story="With fewer queries than keys the causal triangle hangs in the upper left corner, so that a decoder with a "
    "cache sees only its first keys (pytorch#103082, #108108, #144858; ml-explore/mlx#2835; onnx/onnx#8068).",
    exercise="Everything is right while T = S. Which law has T != S in it?",
    solution="L2: the prompt first, then token by token, must give the outputs of one pass over everything.",
    caught_by=[
        f"{_TESTS}test_positional_rules_by_loops",
        "tests/models/test_generate.py::test_cached_logits_are_the_uncached_ones_however_the_tokens_are_fed",
    ],
)
def causal_upper_left(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    if problem.causal:
        problem = problem._replace(offset=np.zeros_like(problem.offset))
    return right(q, k, v, bias, problem=problem)


@bug(
    _ATTENTION,
    "forward",
    story="A window of 4 is taken as 4 tokens besides the query's own; libraries differ in how they count.",
    exercise="L10, that a window of all tokens is none, holds. What has to be compared?",
    solution="The cells: the rule in a loop, or the dense mask of the same window. Of the laws, L13: outputs lie among "
    "the values that may be seen.",
    caught_by=[f"{_TESTS}test_positional_rules_by_loops"],
)
def window_one_wider(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    left, reach = problem.window
    if left is not None:
        problem = problem._replace(window=(left + 1, reach))
    return right(q, k, v, bias, problem=problem)


@bug(
    _ATTENTION,
    "forward",
    story="ALiBi measures distances from the number of the query within this call, not from its position: right "
    "without a cache, wrong with one (TransformerLensOrg/TransformerLens#776).",
    exercise="Which of the two laws about position sees it: L2 (cached = uncached) or L17 (distance only)?",
    solution="L2. Within one call all distances are off by the same number, so L17 still holds.",
    caught_by=[
        f"{_TESTS}test_softcap_and_alibi_by_their_formulas",
        "tests/models/test_generate.py::test_cached_logits_are_the_uncached_ones_however_the_tokens_are_fed",
    ],
)
def alibi_from_row_zero(right: Any, q: Any, k: Any, v: Any, bias: Any = None, *, problem: Problem) -> Any:
    if problem.alibi_slopes is not None:
        may = allowed(problem, q.shape[0], q.shape[2], k.shape[2])
        problem = _for_everybody(problem)._replace(mask=may, offset=np.zeros_like(problem.offset))
    return right(q, k, v, bias, problem=problem)


@bug(
    functional,
    "scaled_dot_product_attention",
    story="Whoever asks for the attention maps gets another code path, and that one forgot the causal mask "
    "(huggingface/transformers#30652).",
    exercise="Every test of the output passes, every test of the maps too. What was never compared?",
    solution="The output with and without the maps: looking must change no bit.",
    caught_by=["tests/nn/test_layers.py::test_asking_for_weights_changes_no_bit"],
)
def maps_without_causal_mask(
    right: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *rest: Any,
    need_weights: bool = False,
    **options: Any,
) -> Any:
    causal = is_causal and not need_weights
    return right(query, key, value, attn_mask, dropout_p, causal, *rest, need_weights=need_weights, **options)


# --- backward --------------------------------------------------------------------------------------------


@bug(
    _ATTENTION,
    "backward",
    story="The scale reached dQ and was forgotten in dK.",
    exercise="The report of a gradient check names the argument and a constant factor. Which, for D = 16?",
    solution="dK, with analytic / numeric = sqrt(16) = 4. dQ and dV are right.",
    caught_by=["tests/test_gradients.py::test_op[attention-0]"],
)
def dk_without_scale(right: Any, douts: Any, saved: Any) -> Any:
    dq, dk, dv, dbias = right(douts, saved)
    return dq, dk / dk.dtype.type(saved.problem.scale), dv, dbias


@bug(
    _ATTENTION,
    "backward",
    story="ds = w dw: the derivative of exp alone, without the sum in the denominator. The classic of hand-written "
    "softmax backwards.",
    exercise="L12 says that a shift of all scores is invisible. What does it say of the gradient of the scores?",
    solution="Its rows sum to 0, since nothing changes along (1, ..., 1); without <dout, out> they do not. A gradient "
    "check sees dQ and dK wrong, dV right.",
    caught_by=["tests/test_gradients.py::test_op[attention-0]"],
)
def softmax_jacobian_without_row_sum(right: Any, douts: Any, saved: Any) -> Any:
    return right(douts, saved._replace(out=np.zeros_like(saved.out)))  # delta = <dout, out> becomes 0


@bug(
    _ATTENTION,
    "backward",
    story="dV is made from the scores, because both have shape (T, S) and the weights had been freed.",
    exercise="The output is linear in V (L11). Which equation between dout, out, dV and V follows?",
    solution="<dout, out> = <dV, V>, and it no longer holds. A gradient check finds dV wrong and nothing else; of the "
    "laws, those fail that look at gradients, as L1 (the future gets none).",
    caught_by=["tests/test_gradients.py::test_op[attention-0]"],
)
def dv_from_scores(right: Any, douts: Any, saved: Any) -> Any:
    dq, dk, _, dbias = right(douts, saved)
    groups = saved.q.shape[1] // saved.k.shape[1]
    scores = saved.problem.scale * (saved.q @ np.repeat(saved.k, groups, axis=1).swapaxes(-1, -2))  # (B, H, T, S)
    dv = scores.swapaxes(-1, -2) @ douts[0]  # (B, H, S, Dv)
    B, K, S, Dv = saved.v.shape
    return dq, dk, dv.reshape(B, K, groups, S, Dv).sum(axis=2), dbias


@bug(
    _ATTENTION,
    "backward",
    story="Backward draws its dropout mask anew, from the next number of the generator.",
    exercise="On average over many masks the gradient is right. Which test is not an average?",
    solution="One gradient check at a fixed seed: L18, the same mask in forward and backward.",
    caught_by=[
        f"{_TESTS}test_dropout_draws_one_mask_for_forward_and_backward",
        "tests/test_gradients.py::test_attention_at_drawn_problems",
    ],
)
def dropout_redrawn_in_backward(right: Any, douts: Any, saved: Any) -> Any:
    key = saved.problem.dropout_key
    if key is not None:
        saved = saved._replace(problem=saved.problem._replace(dropout_key=key._replace(step=key.step + 1)))
    return right(douts, saved)


@bug(
    _ATTENTION,
    "backward",
    story="Several query heads share a key head; a loop over the query heads assigns dK and dV instead of adding.",
    exercise="With as many key heads as query heads nobody notices. What does the law about grouped heads say?",
    solution="L9: grouped heads are repeated heads, and the gradient of a shared head is the sum over its group. A "
    "gradient check with K < H says so too.",
    caught_by=[
        f"{_TESTS}test_grouped_queries_are_repeated_keys_and_values",
        "tests/test_gradients.py::test_attention_at_drawn_problems",
    ],
)
def grouped_heads_not_summed(right: Any, douts: Any, saved: Any) -> Any:
    dq, dk, dv, dbias = right(douts, saved)
    groups = saved.q.shape[1] // saved.k.shape[1]
    if groups > 1:
        k, v = (np.repeat(x, groups, axis=1) for x in (saved.k, saved.v))
        _, dk, dv, _ = right(douts, saved._replace(k=k, v=v))  # (B, H, S, D), for each query head
        dk, dv = (x[:, groups - 1 :: groups].copy() for x in (dk, dv))  # the last of each group
    return dq, dk, dv, dbias


@bug(
    MultiHeadAttention,
    "_project",
    story="In cross-attention the keys are taken from the encoder once and kept without history: the encoder learns "
    "through the values alone, and the model trains, only worse.",
    exercise="No shape, no number of the forward is wrong. At which level must gradients be checked?",
    solution="At the layer's: the gradient of `memory`, and of the rows of the packed weight that make keys, is wrong "
    "or 0. A check of the attention op alone sees nothing. The layer by hand, which is right, says so too.",
    caught_by=["tests/nn/test_layers_by_hand.py::test_drawn_layers"],
)
def cross_attention_keys_detached(right: Any, self: Any, query: Any, key: Any, value: Any) -> Any:
    q, k, v = right(self, query, key, value)
    return q, k if key is None else k.detach(), v
