"""What calls of the wrong kind are told: op, what is wrong, expected, got, and the way out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from material import at, bools, gpt, ids, leaf, optimizer, real, tokens
from wrong_values import OnTheGPU, loop

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import checks, data, masks, metrics, nn, optim, training
from minitransformer.errors import AllocationError, MiniTransformerError
from minitransformer.nn.kv_cache import KVCache
from minitransformer.optim import schedules

FLOAT32 = np.dtype(np.float32)
X = real(2, 3)
CONCAT = "Use the Tensor's own operations or mt.concat, mt.stack, mt.where; or t.detach() for plain numbers."


def attend(**options: Any) -> Any:
    return F.scaled_dot_product_attention(leaf(2, 4, 3, 4), leaf(2, 4, 3, 4), leaf(2, 4, 3, 4), **options)


MESSAGES: list[tuple[Callable[[], Any], str]] = [
    # ---- arrays -----------------------------------------------------------------------------------
    (
        lambda: F.relu([[1.0, 2.0], [3.0]]),
        "relu: got a list that is ragged or nested too deeply. Pad all rows to one length.",
    ),
    (lambda: F.relu(loop()), "relu: got a list that is ragged or nested too deeply. Pad all rows to one length."),
    (lambda: leaf(2) + 10**30, f"add: got {10**30}, which does not fit 64 bits. Pass a float."),
    (lambda: leaf(2) * 10**400, "multiply: got an integer of 1329 bits, which does not fit 64 bits. Pass a float."),
    (lambda: leaf(2) + OnTheGPU(), "add: got a wrong_values.OnTheGPU on a GPU, expected an array of NumPy or CuPy"),
    (lambda: F.maximum(leaf(2), None), "maximum: an operand is None, expected arrays or numbers. Pass 0 or 1 for"),
    (lambda: F.linear(leaf(2, 3), None), "linear: weight is None, expected an array. Convert it with mt.tensor(x)."),
    (lambda: F.concat([leaf(2), 1.0]), "concat: tensor 1 is 1.0, expected an array. Convert it with mt.tensor(x)."),
    (lambda: F.concat(leaf(2, 3)), "concat: tensors is a Tensor of shape (2, 3), expected a list or tuple. Pass "),
    (lambda: F.einsum(None, leaf(2)), "einsum: equation is None, expected a string. Pass it first: 'ij,jk->ik'."),
    (lambda: leaf(2, 3).reshape(2.0, 3), "reshape: got (2.0, 3), expected a tuple of integers. Pass sizes as in"),
    (lambda: F.expand(leaf(1), (2**63,)), f"expand: a size in ({2**63},) is outside 0 to 2**63 - 1. Pass other"),
    (lambda: leaf(2, 3).sum(keepdim=1), "sum: keepdim is 1, expected a bool. Pass a bool."),
    (lambda: leaf(2, 3).argmax(2), "argmax: dim is 2, expected -2 to 1 for 2 axes. Count axes from 0 or from -1."),
    (lambda: leaf(0, 3).argmax(), "argmax: no elements to compare in shape (0, 3). Pass an axis that holds some."),
    (lambda: leaf(2)["a":], "getitem: the index does not fit shape (2,) (slice indices must be integers or None"),  # type: ignore[misc]
    (lambda: ~leaf(2), "invert: ~ cannot be taken of float32. Use it on bools, as ~(t > 0)."),
    (lambda: leaf(2) & 1, "and: cannot be taken of float32 and int. Use it on bools, the results of comparisons."),
    (lambda: mt.tensor(bools(2)) - bools(2), "subtract: cannot be taken of bool and bool. Convert bools first"),
    (lambda: int(mt.tensor(math.nan)), "int: the element is nan, which no integer is. Look for where it came from."),
    (lambda: float(mt.tensor(1j)), "float: a tensor of dtype complex128 is no real number. Use complex(t.item())."),
    (lambda: mt.tensor(X, requires_grad=1), "requires_grad: requires_grad is 1, expected a bool. Pass a bool."),  # type: ignore[arg-type]
    (lambda: mt.tensor(X, dtype="nonsense"), "tensor: 'nonsense' is no dtype. Pass 'float32' or 'float64'."),
    (lambda: mt.tensor([1j], dtype="float32"), "tensor: complex128 as float32 would lose its imaginary part. Take"),
    (
        lambda: mt.tensor([math.nan], dtype="int64"),
        "tensor: the data hold NaN or infinity, which int64 has not. Use float32 or float64.",
    ),
    (lambda: mt.tensor([math.inf]).to("int8"), "to: the data hold NaN or infinity, which int8 has not. Use float32"),
    (lambda: mt.tensor([1]).__setitem__(0, 0.5), "setitem: float64 does not fit into int64. Convert it first."),
    (
        lambda: F.expand(np.ones(1), (3,)).__setitem__(0, 1.0),
        "setitem: the memory of the tensor is read-only. Make a copy first: mt.tensor(t.numpy()).",
    ),
    (
        lambda: mt.Tensor(np.ones(2)).__setitem__(slice(None), X),
        "setitem: a value of shape (2, 3) does not fit there (could not broadcast",
    ),
    (
        lambda: (leaf(2) * np.array([1j, 1])).backward(np.ones(2)),
        "multiply: an input that is real has a complex gradient, because it met complex numbers. Take the real part",
    ),
    (lambda: mt.grad(1.0, [leaf(1)]), "grad: got 1.0 and [tensor("),  # type: ignore[arg-type]
    (
        lambda: np.concatenate([leaf(2), leaf(2)]),
        f"numpy.concatenate: a Tensor that requires a gradient would lose it in this call. {CONCAT}",
    ),
    (lambda: np.sum(leaf(2)), f"numpy.sum: a Tensor that requires a gradient would lose it in this call. {CONCAT}"),
    (lambda: mt.gradcheck(F.tanh, [X], eps=0), "gradcheck: eps is 0, expected a number above 0. Leave it out for"),
    (lambda: mt.gradcheck(F.tanh, [np.ones((1,) * 40)]), "gradcheck: an input has more than 32 axes. Reshape it: "),
    # ---- functional -------------------------------------------------------------------------------
    (
        lambda: F.mse_loss(X, X, reduction=X),  # type: ignore[arg-type]
        "mse_loss: reduction is a ndarray of shape (2, 3), expected one of ('mean', 'sum', 'none'). Pass one of them.",
    ),
    (lambda: F.cross_entropy(X, ids(2), ignore_index=0.5), "cross_entropy: ignore_index is 0.5, expected an integer"),  # type: ignore[arg-type]
    (lambda: F.layer_norm(X, 3, eps=math.nan), "layer_norm: eps is nan, expected a number from 0, finite. Change eps."),
    (lambda: F.rms_norm(X, 3.0), "rms_norm: got 3.0, expected a tuple of integers. Pass sizes as in (2, 3)."),  # type: ignore[arg-type]
    (lambda: F.dropout(X, True), "dropout: the dropout rate is True, expected a number in [0, 1). 0 turns dropout off"),
    (lambda: F.dropout(X, site=-1), "dropout: site is -1, expected an integer from 0 to 2**32 - 1. Leave it out."),
    (lambda: F.apply_rope(real(1, 1, 2, 2), ids(2), base=0), "apply_rope: base is 0, expected a positive number. Keep"),
    (lambda: attend(is_causal=1), "attention: is_causal is 1, expected a bool. Pass a bool."),
    (lambda: attend(softcap=math.inf), "attention: softcap is inf, expected a number from 0, finite. Change softcap."),
    (lambda: attend(alibi_slopes=np.full(4, math.nan)), "attention: alibi_slopes are float64, expected finite real"),
    (
        lambda: F.flex_attention(real(1, 1, 1, 1), real(1, 1, 1, 1), real(1, 1, 1, 1), 3),  # type: ignore[arg-type]
        "flex_attention: score_mod is 3, expected a function (score, b, h, q, k, *buffers) -> score. Pass the function",
    ),
    (lambda: masks.prefix(2**63), f"prefix: n is {2**63}, expected 0 or more, below 2**48. Pass such a number."),
    # ---- memory -----------------------------------------------------------------------------------
    (
        lambda: nn.Linear(10**6, 10**6 * 2**20),
        "Linear: a weight of shape (1048576000000, 1000000) float32 needs over 1024 PiB, the machine has ",
    ),
    (
        lambda: nn.Embedding(2**30, 2**20),
        "Embedding: a weight of shape (1073741824, 1048576) float32 needs 4.0 PiB, the machine has ",
    ),
    (lambda: nn.LayerNorm(10**400), "LayerNorm: a weight of shape (an integer of 1329 bits) float32 needs over 1024 "),
    (lambda: nn.SinusoidalPositions(2**40, 64), "sinusoidal_positions: a table of shape (1099511627776, 64) float64 "),
    (lambda: KVCache(2**31, 2, 2, 64, 64, FLOAT32), "KVCache: keys and values of shape (2, 2147483648, 2, 2, 64, 64) "),
    (lambda: tokens().batch(0, 0, 2**60), f"batch: a batch of shape (4, {2**60}, 4) int64 needs over 1024 PiB, the "),
    # ---- layers -----------------------------------------------------------------------------------
    (lambda: nn.Linear(2, 3, bias=None), "Linear: bias is None, expected a bool. Pass a bool."),  # type: ignore[arg-type]
    (lambda: nn.SelfAttention(4, 2)("text"), "MultiHeadAttention: got a builtins.str, expected a Tensor, NumPy array"),
    (lambda: nn.SelfAttention(4, 2)(X), "MultiHeadAttention: query has shape (2, 3), expected (batch, length, 4). "),
    (
        lambda: nn.MultiHeadAttention(4, 2)(leaf(1, 2, 4), cache={}),
        "MultiHeadAttention: cache is {}, expected a KVCache. Make it with model.make_cache(batch_size).",
    ),
    (lambda: KVCache(1, 1, 1, 4, 2, FLOAT32).advance(5), "KVCache: 5 more tokens do not fit, 0 of 4 slots are filled"),
    (
        lambda: KVCache(1, 1, 1, 4, 2, FLOAT32).append(1, leaf(1, 1, 1, 2), leaf(1, 1, 1, 2)),
        "KVCache.append: layer is 1, expected 0 to 0. Make the cache for as many layers as the model has.",
    ),
    (lambda: nn.Linear(2, 3).train(None), "train: mode is None, expected a bool. Pass a bool."),  # type: ignore[arg-type]
    (
        lambda: nn.Linear(2, 3).load_state_dict({"weight": np.ones((3, 2), complex), "bias": np.ones(3)}),
        "load_state_dict: weight has dtype complex128, expected float32. Convert it with array.astype(...).",
    ),
    (lambda: nn.clip_grad_norm_([], math.nan), "clip_grad_norm_: max_norm is nan, expected a number above 0. Pass"),
    # ---- models -----------------------------------------------------------------------------------
    (
        lambda: gpt()(ids(1, 4), labels=np.array([[0, 1, 9, 1]])),
        "GPT: the label at position (0, 2) is 9, expected 0 to 4 or ignore_index -100. Use the tokenizer that the ",
    ),
    (lambda: mt.GPT({}), "GPT: config is {}, expected a GPTConfig. Pass mt.GPTConfig(...)."),  # type: ignore[arg-type]
    (lambda: gpt()(ids(1, 4), cache=3), "GPT: cache is 3, expected a KVCache. Make it with model.make_cache(batch_"),
    (
        lambda: gpt().generate(ids(1, 2), max_new_tokens=1, eos_token_id=5),
        "generate: eos_token_id is 5, expected less than the 5 tokens. Use the tokenizer that the model was made with,",
    ),
    (
        lambda: gpt().generate(ids(1, 2), max_new_tokens=np.timedelta64(2, "s")),
        "generate: max_new_tokens is np.timedelta64(2,'s'), expected an integer of at least 0. Pass such a number.",
    ),
    # ---- optimizers, schedules, metrics -----------------------------------------------------------
    (lambda: optim.SGD(np.ones(2), 0.1), "optim: params is a ndarray, expected an iterable of Parameters. Pass model"),  # type: ignore[arg-type]
    (
        lambda: optimizer().flat.views(np.ones(9, ">f4")),
        "FlatParameters.views: buffer is >f4, expected an array of float32. Make it with np.empty_like(flat.data).",
    ),
    (
        lambda: optimizer().load_state(None, {}),
        "AdamW.load_state: arrays has the names None, expected ['first', 'second']. Load it into the optimizer",
    ),
    (
        lambda: schedules.constant(0.1, warmup_steps=1.5),  # type: ignore[arg-type]
        "schedules.constant: warmup_steps is 1.5, expected an integer from 0. Change warmup_steps.",
    ),
    (lambda: at(schedules.noam)(math.inf, 4), "schedules.noam: d_model is inf, expected an integer from 1. Change d_"),
    (lambda: schedules.cosine(1, 0, 2, 8)(math.nan), "schedule: step is nan, expected an integer from 0. Change step."),  # type: ignore[arg-type]
    (
        lambda: schedules.constant(10**400),
        "schedules.constant: peak is an integer of 1329 bits, expected a number from 0, finite. Change peak.",
    ),
    (lambda: metrics.perplexity(math.nan), "perplexity: loss is nan, expected a number, finite. Change loss."),
    (lambda: metrics.bits_per_byte(math.inf, 1, 1), "bits_per_byte: loss is inf, expected a number, finite. Change "),
    (lambda: metrics.bits_per_byte(1, 2**70, 1), f"bits_per_byte: tokens is {2**70}, expected an integer from 0, bel"),
    # ---- data and training ------------------------------------------------------------------------
    (
        lambda: data.TokenDataset(np.array([0, math.nan, 1]), 1),
        "TokenDataset: tokens must be integers, got float64. Encode the text first.",
    ),
    (lambda: data.TokenDataset(3, 1), "TokenDataset: tokens are 3, expected an array. Encode the text first."),  # type: ignore[arg-type]
    (lambda: data.Corpus("mine", None), "Corpus: read is None, expected a function that gives the text in pieces. "),  # type: ignore[arg-type]
    (lambda: data.Corpus("mine", lambda: [b"x"]).text(), "corpus 'mine': read gives b'x', expected strings. Decode"),  # type: ignore[list-item, return-value]
    (lambda: data.corpus(3), "corpus: got 3, expected a name or a path. Pass a string or a Path."),  # type: ignore[arg-type]
    (lambda: data.CharTokenizer.train(3), "CharTokenizer.train: text is 3, expected strings. Pass a str or pieces."),  # type: ignore[arg-type]
    (
        lambda: data.prepare(data.Corpus("mine", lambda: ["text"]), 3, 1),  # type: ignore[arg-type]
        'prepare: tokenizer is 3, expected a kind or a Tokenizer. Use "char".',
    ),
    (lambda: training.TrainConfig(out_dir="a\0b"), "TrainConfig: out_dir is 'a\\x00b', expected a path. Name a folder"),
    (lambda: training.TrainConfig(learning_rate=math.nan), "TrainConfig: learning_rate is nan, expected a number of"),
    (lambda: mt.Trainer(None, None, None), "Trainer: model is None, expected a Model. Make one first."),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), MESSAGES, ids=[message[:60] for _, message in MESSAGES])
def test_the_message(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(MiniTransformerError) as error:
        call()
    assert str(error.value).startswith(message)


def test_numpy_functions_that_lose_no_gradient_take_tensors() -> None:
    t = leaf(2, 3)
    assert np.shape(t) == (2, 3) and np.ndim(t) == 2
    assert np.array_equal(t, t) and np.allclose(t, t.data)
    assert np.argmax(t) == np.argmax(t.data)
    assert np.zeros_like(t).dtype == np.float32
    np.testing.assert_array_equal(t, t.data)
    assert t.data == pytest.approx(t.data)
    with mt.no_grad():
        assert np.array_equal(np.concatenate([t.detach(), t.detach()]), np.concatenate([t.data, t.data]))


def test_integers_become_float32_not_float16() -> None:
    for kind in (np.int8, np.uint8, bool):
        for function in (np.exp, np.log, np.sqrt, np.sin, np.cos):
            assert function(mt.Tensor(np.ones(2, kind))).dtype == np.float32


def test_more_than_the_machine_has_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "total_memory", lambda: 2 << 20)
    made: list[int] = []
    for size, fits in ((1 << 19, True), ((1 << 19) + 1, False)):
        with pytest.raises(AllocationError) if not fits else pytest.MonkeyPatch.context():
            checks.allocate("test", "an array", (size,), np.float32, lambda: made.append(1))
    assert made == [1]


def test_what_the_system_refuses_to_give_is_said_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MemoryError

    monkeypatch.setattr(checks, "total_memory", lambda: None)
    message = re.escape("test: an array of shape (3, 65536) float64 needs 1.5 MiB, there is not so much. Choose ")
    with pytest.raises(AllocationError, match=message):
        checks.allocate("test", "an array", (3, 1 << 16), np.float64, refuse)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), (1 << 60, "over 1024 PiB")],
)
def test_bytes_are_readable(size: int, text: str) -> None:
    assert checks.readable(size) == text
