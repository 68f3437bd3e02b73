"""One small valid call of every public function: what the fuzzer spoils.

A line for each name; `test_calls.py` fails when a public name has none.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import data, masks, metrics, nn, optim, training
from minitransformer.optim import schedules


class Valid(NamedTuple):
    """A call that works. `writes`: it changes its arguments on purpose."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    writes: bool = False


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Valid:
    return Valid(function, args, kwargs)


def writes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Valid:
    return Valid(function, args, kwargs, writes=True)


def real(*shape: int) -> np.ndarray:
    """Different numbers of both signs."""
    return np.sin(1.0 + np.arange(math.prod(shape))).reshape(shape).astype(np.float32)


def leaf(*shape: int) -> mt.Tensor:
    return mt.Tensor(real(*shape), requires_grad=True)


def ids(*shape: int, below: int = 5) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape) % below


def bools(*shape: int) -> np.ndarray:
    return ids(*shape, below=3) > 0


def some(iterable: Any) -> list[Any]:
    """The first items of what may be long."""
    return list(islice(iterable, 3))


def inside(context: Callable[..., Any]) -> Callable[..., None]:
    def enter(*args: Any, **kwargs: Any) -> None:
        with context(*args, **kwargs):
            pass

    return enter


def layer(make: Callable[[], nn.Module], *args: Any, **kwargs: Any) -> Valid:
    """A forward call of a layer made with the numbers of seed 0."""
    mt.manual_seed(0)
    return call(make(), *args, **kwargs)


def gpt(**changes: Any) -> mt.GPT:
    mt.manual_seed(0)
    return mt.GPT(mt.GPTConfig(**{"vocab_size": 5, "block_size": 6, "n_layer": 1, "n_head": 2, "n_embd": 4, **changes}))


def filled(array: np.ndarray) -> nn.Parameter:
    """A Parameter that has a gradient."""
    p = nn.Parameter(array)
    p.grad = real(*array.shape)
    return p


def optimizer(kind: Callable[..., Any] = optim.AdamW) -> Any:
    return kind([filled(real(2, 3)), filled(real(3))], 0.1)


def at(schedule: Callable[..., Any]) -> Callable[..., list[float]]:
    return lambda *args, **kwargs: [schedule(*args, **kwargs)(step) for step in (0, 1, 5, 9)]


def attended(**options: Any) -> Valid:
    return call(F.scaled_dot_product_attention, leaf(2, 4, 3, 4), leaf(2, 4, 3, 4), leaf(2, 4, 3, 4), **options)


def tokens() -> data.TokenDataset:
    return data.TokenDataset(ids(20), 4)


def text() -> data.Corpus:
    return data.Corpus("mine", lambda: ["some text to read, ", "and more"])


def assigned(t: Any, index: Any, value: Any) -> None:
    t[index] = value


def replaced(t: Any, name: str, value: Any) -> None:
    setattr(t, name, value)


def nested() -> mt.Tensor:
    return mt.tensor(real(2, 3))


# Lines that are refused as they stand: files that are not there, functions that would lose a gradient.
REFUSED = {"from_pretrained", "data.load_tokenizer", "numpy.arctan", "numpy.sum", "optim.Optimizer"}

VALID: dict[str, Callable[[], Valid]] = {
    # ---- minitransformer --------------------------------------------------------------------------
    "GPT": lambda: call(mt.GPT, mt.GPTConfig(vocab_size=5, block_size=6, n_layer=1, n_head=2, n_embd=4)),
    "GPT.forward": lambda: call(gpt(), ids(2, 4), attention_mask=np.ones((2, 4), bool), targets=ids(2, 4)),
    "GPT.forward labels": lambda: call(gpt(positions="rope"), ids(2, 4), labels=ids(2, 4), label_smoothing=0.1),
    "GPT.forward cache": lambda: call(gpt(), ids(2, 4), cache=gpt().make_cache(2)),
    "GPT.make_cache": lambda: call(gpt().make_cache, 2, length=4),
    "GPT.num_targets": lambda: call(gpt().num_targets, targets=ids(2, 4)),
    "GPT.generate": lambda: call(gpt().generate, ids(2, 3), max_new_tokens=2, seed=1),
    "GPT.generate sampling": lambda: call(
        gpt(positions="alibi").generate,
        ids(2, 3),
        max_new_tokens=2,
        do_sample=True,
        temperature=0.7,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        eos_token_id=1,
        attention_mask=np.ones((2, 3), int),
        use_cache=False,
        seed=1,
    ),
    "GPTConfig": lambda: call(
        mt.GPTConfig,
        vocab_size=5,
        block_size=6,
        n_layer=1,
        n_head=2,
        n_embd=4,
        n_kv_head=1,
        n_inner=8,
        dropout=0.1,
        bias=True,
        positions="rope",
        norm="rms",
        ffn="swiglu",
        attention="window",
        window=3,
        tie_weights=False,
        n_global=None,
        stride=None,
    ),
    "ModelOutput": lambda: call(mt.ModelOutput, loss=leaf(1)),
    "Parameter": lambda: call(mt.Parameter, real(2, 3), requires_grad=True),
    "Tensor": lambda: call(mt.Tensor, real(2, 3), requires_grad=True),
    "TrainConfig": lambda: call(
        training.TrainConfig,
        out_dir="run",
        max_steps=2,
        batch_size=2,
        learning_rate=0.1,
        min_learning_rate=0.01,
        warmup_steps=1,
        schedule="linear",
        optimizer="sgd",
        betas=(0.9, 0.99),
        weight_decay=0.1,
        l1=0.0,
        grad_clip=1.0,
        grad_accumulation_steps=1,
        label_smoothing=0.0,
        eval_interval=1,
        save_interval=1,
        early_stopping_patience=2,
        seed=3,
        shards=1,
        threads=1,
        device="cpu",
        eval_batches=2,
        progress=False,
    ),
    "Trainer": lambda: call(
        training.Trainer, gpt(), training.TrainConfig(max_steps=1, progress=False), tokens(), tokens(), callbacks=[]
    ),
    "check_saved_arrays": lambda: call(inside(mt.check_saved_arrays)),
    "concat": lambda: call(mt.concat, [leaf(2, 3), real(1, 3)], dim=0),
    "einsum": lambda: call(mt.einsum, "ij,jk->ik", leaf(2, 3), leaf(3, 2)),
    "from_pretrained": lambda: call(lambda folder: mt.from_pretrained(folder), "absent"),
    "grad": lambda: call(lambda f, x, **kw: mt.grad(f(x), [x], **kw), lambda x: x * x, leaf(2, 3), gradient=real(2, 3)),
    "gradcheck": lambda: call(
        mt.gradcheck,
        lambda *x: x[0].tanh(),
        [real(2, 3)],
        method="central",
        mode="full",
        directions=2,
        eps=1e-3,
        atol=1e-2,
        rtol=1e-2,
        on_kink="raise",
        raise_exception=False,
    ),
    "manual_seed": lambda: call(mt.manual_seed, 3),
    "matmul": lambda: call(mt.matmul, leaf(2, 3), leaf(3, 2)),
    "maximum": lambda: call(mt.maximum, leaf(2, 3), real(3)),
    "minimum": lambda: call(mt.minimum, leaf(2, 3), 0.5),
    "no_grad": lambda: call(inside(mt.no_grad)),
    "set_num_threads": lambda: call(mt.set_num_threads, 2),
    "split": lambda: call(mt.split, leaf(3, 2), 2, dim=0),
    "split sections": lambda: call(mt.split, leaf(3, 2), (1, 2), dim=0),
    "stack": lambda: call(mt.stack, (leaf(2, 3), leaf(2, 3)), dim=1),
    "tensor": lambda: call(mt.tensor, [[1.0, 2.0], [3.0, 4.0]], dtype="float64", requires_grad=True, device="cpu"),
    "use_backend": lambda: call(inside(mt.use_backend), "reference"),
    "where": lambda: call(mt.where, bools(2, 3), leaf(2, 3), 0.0),
    # ---- functional -------------------------------------------------------------------------------
    "functional.Sparse": lambda: call(F.Sparse, range(1, 9, 2), left=1, block=2, origin=np.array([0, 1])),
    "functional.alibi_slopes": lambda: call(F.alibi_slopes, 6),
    "functional.apply_rope": lambda: call(F.apply_rope, leaf(2, 2, 3, 4), ids(3), base=100.0, layout="half"),
    "functional.concat": lambda: call(F.concat, (leaf(2, 3), leaf(2, 2)), 1),
    "functional.cross_entropy": lambda: call(
        F.cross_entropy, leaf(2, 3, 5), ids(2, 3), ignore_index=-100, label_smoothing=0.1, reduction="mean"
    ),
    "functional.dropout": lambda: call(F.dropout, leaf(2, 3), 0.5, True, site=3),
    "functional.einsum": lambda: call(F.einsum, "ij->j", leaf(2, 3)),
    "functional.embedding": lambda: call(F.embedding, ids(2, 3), leaf(5, 4)),
    "functional.expand": lambda: call(F.expand, leaf(2, 1), (3, 2, 2)),
    "functional.flex_attention": lambda: call(
        F.flex_attention,
        leaf(2, 4, 3, 4),
        leaf(2, 2, 3, 4),
        leaf(2, 2, 3, 4),
        lambda score, b, h, q, k, slopes: score * slopes[h],
        masks.create_block_mask(lambda b, h, q, k: k <= q, 2, 4, 3, 3),
        0.5,
        True,
        score_mod_grad=None,
        buffers=(real(4),),
        dropout_p=0.1,
        need_lse=True,
    ),
    "functional.gelu": lambda: call(F.gelu, leaf(2, 3), approximate="tanh"),
    "functional.kl_div": lambda: call(F.kl_div, leaf(2, 3), leaf(2, 3), reduction="batchmean", log_target=True),
    "functional.layer_norm": lambda: call(F.layer_norm, leaf(2, 3, 4), (3, 4), leaf(3, 4), leaf(3, 4), 1e-5),
    "functional.linear": lambda: call(F.linear, leaf(2, 3), leaf(4, 3), leaf(4)),
    "functional.linear_attention": lambda: call(
        F.linear_attention, leaf(2, 4, 3, 4), leaf(2, 2, 3, 4), leaf(2, 2, 3, 5), is_causal=True, feature_map="elu"
    ),
    "functional.log_softmax": lambda: call(F.log_softmax, leaf(2, 3), dim=0),
    "functional.matmul": lambda: call(F.matmul, leaf(2, 2, 3), leaf(3)),
    "functional.maximum": lambda: call(F.maximum, leaf(2, 3), leaf(2, 3)),
    "functional.minimum": lambda: call(F.minimum, leaf(2, 3), leaf(2, 3)),
    "functional.mse_loss": lambda: call(F.mse_loss, leaf(2, 3), real(2, 3), reduction="none"),
    "functional.relu": lambda: call(F.relu, leaf(2, 3)),
    "functional.rms_norm": lambda: call(F.rms_norm, leaf(2, 3), 3, leaf(3), eps=1e-5),
    "functional.scaled_dot_product_attention": lambda: attended(
        attn_mask=bools(2, 1, 3, 3),
        dropout_p=0.1,
        is_causal=True,
        scale=0.3,
        enable_gqa=False,
        causal_align="lower_right",
        window_size=(1, 0),
        sparse=F.Sparse(range(1), left=1),
        softcap=2.0,
        alibi_slopes=real(4),
        key_lengths=np.array([3, 2]),
        need_weights=True,
        need_lse=True,
        dropout_site=3,
    ),
    "functional.scaled_dot_product_attention float mask": lambda: attended(attn_mask=leaf(3, 3)),
    "functional.scaled_dot_product_attention packed": lambda: call(
        F.scaled_dot_product_attention,
        leaf(1, 4, 3, 4),
        leaf(1, 2, 3, 4),
        leaf(1, 2, 3, 5),
        masks.causal(),
        enable_gqa=True,
        cu_seqlens=np.array([0, 2, 3]),
    ),
    "functional.sigmoid": lambda: call(F.sigmoid, leaf(2, 3)),
    "functional.silu": lambda: call(F.silu, leaf(2, 3)),
    "functional.sinusoidal_positions": lambda: call(F.sinusoidal_positions, 3, 5),
    "functional.softmax": lambda: call(F.softmax, leaf(2, 3), -1),
    "functional.split": lambda: call(F.split, leaf(2, 3), 2, -1),
    "functional.stack": lambda: call(F.stack, [leaf(2, 3), real(2, 3)]),
    "functional.swiglu": lambda: call(F.swiglu, leaf(2, 3), leaf(2, 3)),
    "functional.tanh": lambda: call(F.tanh, leaf(2, 3)),
    "functional.where": lambda: call(F.where, bools(2, 3), leaf(2, 3), leaf(3)),
    # ---- masks ------------------------------------------------------------------------------------
    "masks.causal": lambda: call(masks.causal, "lower_right"),
    "masks.create_block_mask": lambda: call(masks.create_block_mask, lambda b, h, q, k: k <= q, 2, None, 3, 3),
    "masks.dense": lambda: call(masks.dense, bools(2, 1, 3, 3)),
    "masks.documents": lambda: call(masks.documents, ids(4), align="upper_left"),
    "masks.from_function": lambda: call(masks.from_function, lambda b, h, q, k: k <= q),
    "masks.global_tokens": lambda: call(masks.global_tokens, [0, 2], None),
    "masks.padding": lambda: call(masks.padding, bools(2, 3)),
    "masks.prefix": lambda: call(masks.prefix, 2),
    "masks.strided": lambda: call(masks.strided, 2, 2, None),
    "masks.window": lambda: call(masks.window, 1, 0, align=None),
    "Mask.dense": lambda: call((masks.causal() & masks.prefix(2)).dense, 2, 1, 3, 3),
    "Mask.mask_mod": lambda: call((masks.causal() | ~masks.prefix(2)).mask_mod, 2, 1, 3, 3),
    "Mask.show": lambda: call(masks.strided(2, 2).show, 3, 3, b=0, h=0),
    "Mask.why": lambda: call((~masks.causal() & masks.window(2, None)).why, 1, 2, b=0, h=0),
    "Mask.&": lambda: call(operator.and_, masks.causal(), masks.prefix(1)),
    "Mask.|": lambda: call(operator.or_, masks.dense(bools(3, 3)), masks.prefix(1)),
    # ---- nn ---------------------------------------------------------------------------------------
    "nn.DecoderLayer": lambda: call(nn.DecoderLayer, 4, 2, 8, 0.1, norm_first=True, activation="gelu"),
    "nn.DecoderLayer.forward": lambda: layer(
        lambda: nn.DecoderLayer(4, 2, 8).eval(), leaf(2, 3, 4), leaf(2, 5, 4), masks.causal(), memory_mask=bools(3, 5)
    ),
    "nn.Dropout": lambda: call(nn.Dropout, 0.5),
    "nn.Dropout.forward": lambda: layer(lambda: nn.Dropout(0.5), leaf(2, 3)),
    "nn.Embedding": lambda: call(nn.Embedding, 5, 4),
    "nn.Embedding.forward": lambda: layer(lambda: nn.Embedding(5, 4), ids(2, 3)),
    "nn.EncoderLayer": lambda: call(nn.EncoderLayer, 4, 2, 8, 0.1, norm_first=False, activation="swiglu"),
    "nn.EncoderLayer.forward": lambda: layer(lambda: nn.EncoderLayer(4, 2, 8).eval(), leaf(2, 3, 4), bools(3, 3)),
    "nn.FeedForward": lambda: call(nn.FeedForward, 4, 8, 0.0, "relu", True),
    "nn.FeedForward.forward": lambda: layer(lambda: nn.FeedForward(4, 8), leaf(2, 4)),
    "nn.KVCache": lambda: call(nn.KVCache, 1, 2, 2, 4, 3, np.dtype(np.float32)),
    "nn.KVCache.append": lambda: call(
        nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).append, 0, leaf(2, 2, 3, 3), leaf(2, 2, 3, 3)
    ),
    "nn.KVCache.reserve": lambda: call(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).reserve, 2, reach=1),
    "nn.KVCache.select": lambda: call(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).select, np.array([1, 1])),
    "nn.DecoderCache": lambda: call(nn.DecoderCache, nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32))),
    "nn.DecoderCache.select": lambda: call(
        nn.DecoderCache(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32))).select, np.array([1, 1])
    ),
    "nn.MemoryCache": lambda: call(nn.MemoryCache, 2),
    "nn.MemoryCache.of": lambda: call(nn.MemoryCache(2).of, 1),
    "nn.MemoryCache.keep": lambda: call(nn.MemoryCache(2).keep, 1, leaf(2, 2, 3, 3), leaf(2, 2, 3, 3)),
    "nn.StateCache": lambda: call(nn.StateCache, 1, 2, 2, 3, np.dtype(np.float32)),
    "nn.StateCache.append": lambda: call(
        nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).append, 0, leaf(2, 2, 4, 3), leaf(2, 2, 4, 3)
    ),
    "nn.StateCache.attend": lambda: call(
        nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).attend,
        0,
        leaf(2, 4, 4, 3),
        leaf(2, 2, 4, 3),
        leaf(2, 2, 4, 3),
    ),
    "nn.StateCache.select": lambda: call(nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).select, np.array([1, 1])),
    "nn.StateCache.advance": lambda: call(nn.StateCache(1, 2, 2, 3, np.dtype(np.float32)).advance, 2),
    "nn.KVCache.advance": lambda: call(nn.KVCache(1, 2, 2, 4, 3, np.dtype(np.float32)).advance, 2),
    "nn.LayerNorm": lambda: call(nn.LayerNorm, (3, 4), eps=1e-5, bias=True),
    "nn.LayerNorm.forward": lambda: layer(lambda: nn.LayerNorm((3, 4)), leaf(2, 3, 4)),
    "nn.Linear": lambda: call(nn.Linear, 3, 4, bias=True),
    "nn.Linear.forward": lambda: layer(lambda: nn.Linear(3, 4), leaf(2, 3)),
    "nn.LinearSelfAttention": lambda: call(nn.LinearSelfAttention, 8, 4, 2, 0.1, True),
    "nn.LinearSelfAttention.forward": lambda: layer(
        lambda: nn.LinearSelfAttention(8, 4, 2), leaf(2, 3, 8), attn_mask=bools(2, 1, 1, 3), rope_positions=ids(3)
    ),
    "nn.LinearSelfAttention.forward cached": lambda: layer(
        lambda: nn.LinearSelfAttention(8, 4, 2),
        leaf(2, 3, 8),
        cache=nn.StateCache(1, 2, 2, 2, np.dtype(np.float32)),
        cache_layer=0,
    ),
    "nn.Module": lambda: call(nn.Module),
    "nn.Module.load_state_dict": lambda: writes(
        nn.Linear(3, 4).load_state_dict, {"weight": real(4, 3), "bias": real(4)}, strict=True
    ),
    "nn.Module.named_modules": lambda: call(lambda prefix: some(nn.Linear(3, 4).named_modules(prefix)), "model"),
    "nn.Module.to": lambda: call(lambda target: nn.Linear(3, 4).to(target), "float64"),
    "nn.Module.train": lambda: call(nn.Linear(3, 4).train, True),
    "nn.MultiHeadAttention": lambda: call(nn.MultiHeadAttention, 8, 4, 2, 0.1, True),
    "nn.MultiHeadAttention.forward": lambda: layer(
        lambda: nn.MultiHeadAttention(8, 4, 2),
        leaf(2, 3, 8),
        attn_mask=bools(3, 3),
        is_causal=True,
        causal_align="upper_left",
        window_size=(2, 0),
        sparse=F.Sparse(range(1, 9, 2), block=2, origin=np.array([0, 1])),
        key_lengths=np.array([3, 2]),
        alibi_slopes=real(4),
        rope_positions=ids(3),
        need_weights=True,
    ),
    "nn.MultiHeadAttention.forward cross": lambda: layer(
        lambda: nn.MultiHeadAttention(8, 4), leaf(2, 3, 8), leaf(2, 5, 8), leaf(2, 5, 8)
    ),
    "nn.MultiHeadAttention.forward cache": lambda: layer(
        lambda: nn.MultiHeadAttention(8, 4),
        leaf(2, 3, 8),
        cache=nn.KVCache(1, 2, 4, 6, 2, np.dtype(np.float32)),
        cache_layer=0,
    ),
    "nn.Parameter": lambda: call(nn.Parameter, real(2, 3), False),
    "nn.RMSNorm": lambda: call(nn.RMSNorm, 4, 1e-5),
    "nn.RMSNorm.forward": lambda: layer(lambda: nn.RMSNorm(4), leaf(2, 4)),
    "nn.SelfAttention": lambda: call(nn.SelfAttention, 8, 4),
    "nn.SelfAttention.forward": lambda: layer(lambda: nn.SelfAttention(8, 4), leaf(2, 3, 8), masks.causal()),
    "nn.SinusoidalPositions": lambda: call(nn.SinusoidalPositions, 6, 4),
    "nn.SinusoidalPositions.forward": lambda: layer(lambda: nn.SinusoidalPositions(6, 4), leaf(2, 3, 4)),
    "nn.clip_grad_norm_": lambda: writes(nn.clip_grad_norm_, [filled(real(2, 3)), filled(real(3))], 0.5),
    # ---- optim ------------------------------------------------------------------------------------
    "optim.Adam": lambda: call(optim.Adam, [filled(real(2, 3))], 0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1),
    "optim.AdamW": lambda: call(optim.AdamW, [filled(real(2, 3))], lr=0.1, betas=(0.9, 0.99), weight_decay=0.1),
    "optim.FlatParameters": lambda: call(optim.FlatParameters, (filled(real(2, 3)), filled(real(3)))),
    "optim.FlatParameters.views": lambda: call(optimizer().flat.views, real(9)),
    "optim.FlatParameters.gather": lambda: writes(optimizer().flat.gather, real(9)),
    "optim.Optimizer": lambda: call(optim.Optimizer),
    "optim.Optimizer.load_state": lambda: writes(
        optimizer(optim.Adam).load_state,
        {"first": real(9), "second": real(9) ** 2},
        {"steps": 3, "lr": 0.1, "layout": optimizer().flat.layout},
    ),
    "optim.Optimizer.lr": lambda: call(lambda lr: replaced(optimizer(), "lr", lr), 0.1),
    "optim.Optimizer.step": lambda: call(optimizer(optim.SGD).step, real(9)),
    "optim.SGD": lambda: call(optim.SGD, [filled(real(2, 3))], 0.1, momentum=0.9, weight_decay=0.1),
    "optim.schedules.constant": lambda: call(at(schedules.constant), 0.1, 3),
    "optim.schedules.cosine": lambda: call(at(schedules.cosine), 0.1, 0.01, 2, 8),
    "optim.schedules.linear": lambda: call(at(schedules.linear), 0.1, 0.01, 2, total_steps=8),
    "optim.schedules.noam": lambda: call(at(schedules.noam), 64, 4, factor=2.0),
    "optim.schedules.warmup_stable_decay": lambda: call(at(schedules.warmup_stable_decay), 0.1, 0.01, 2, 8, 3),
    "optim.schedules step": lambda: call(schedules.cosine(0.1, 0.01, 2, 8), 3),
    # ---- metrics ----------------------------------------------------------------------------------
    "metrics.bits_per_byte": lambda: call(metrics.bits_per_byte, 1.5, 10, 30),
    "metrics.perplexity": lambda: call(metrics.perplexity, 1.5),
    # ---- data -------------------------------------------------------------------------------------
    "data.ByteTokenizer": lambda: call(data.ByteTokenizer),
    "data.ByteTokenizer.decode": lambda: call(data.ByteTokenizer().decode, ids(4) + 97),
    "data.ByteTokenizer.encode": lambda: call(data.ByteTokenizer().encode, "text"),
    "data.CharTokenizer": lambda: call(data.CharTokenizer, "text"),
    "data.CharTokenizer.decode": lambda: call(data.CharTokenizer("abcde").decode, ids(4)),
    "data.CharTokenizer.encode": lambda: call(data.CharTokenizer("abcde").encode, "deb"),
    "data.CharTokenizer.from_json": lambda: call(data.CharTokenizer.from_json, data.CharTokenizer("ab").to_json()),
    "data.CharTokenizer.train": lambda: call(data.CharTokenizer.train, ["some", "text"]),
    "data.Corpus": lambda: call(lambda *args, **kw: data.Corpus(*args, **kw).text(), "mine", lambda: ["a", "b"]),
    "data.StreamDecoder.feed": lambda: call(data.ByteTokenizer().stream_decoder().feed, ids(4) + 97),
    "data.TokenDataset": lambda: call(data.TokenDataset, ids(20), 4, tokenizer=None, source={"corpus": "mine"}),
    "data.TokenDataset.batch": lambda: call(tokens().batch, 1, 2, batch_size=3),
    "data.TokenDataset.sequential": lambda: call(lambda size: some(tokens().sequential(size)), 2),
    "data.corpus": lambda: call(data.corpus, "python-docs"),
    "data.load_tokenizer": lambda: call(data.load_tokenizer, "absent"),
    "data.prepare": lambda: call(data.prepare, text(), "char", 2, validation_fraction=0.2, cache_folder=None),
    # ---- Tensor -----------------------------------------------------------------------------------
    **{
        f"Tensor.{name}": (lambda name=name: call(getattr(operator, name), leaf(2, 3), real(2, 3) + 2))
        for name in ("add", "sub", "mul", "truediv", "pow", "eq", "ne", "lt", "le", "gt", "ge")
    },
    **{
        f"Tensor.r{name}": (lambda name=name: call(getattr(operator, name), 2.0, leaf(2, 3)))
        for name in ("add", "sub", "mul", "truediv", "pow")
    },
    **{
        f"Tensor.{name}": (lambda name=name: call(getattr(operator, name), mt.tensor(bools(2, 3)), bools(3)))
        for name in ("and_", "or_", "xor")
    },
    **{
        f"Tensor.{name}": (lambda name=name: call(lambda **kw: getattr(leaf(2, 3), name)(**kw), dim=-1, keepdim=True))
        for name in ("sum", "mean", "max", "min")
    },
    **{
        f"numpy.{name}": (lambda name=name: call(getattr(np, name), leaf(2, 3)))
        for name in ("exp", "log", "sqrt", "tanh", "absolute", "sin", "cos", "arctan", "sum", "shape")
    },
    "Tensor.abs": lambda: call(leaf(2, 3).abs),
    "Tensor.argmax": lambda: call(leaf(2, 3).argmax, 1),
    "Tensor.backward": lambda: call((leaf(2, 3) * 2).backward, gradient=real(2, 3), retain_graph=True),
    "Tensor.data": lambda: writes(lambda value: replaced(leaf(2, 3), "data", value), real(2, 3)),
    "Tensor.detach": lambda: call(leaf(2, 3).detach),
    "Tensor.exp": lambda: call(leaf(2, 3).exp),
    "Tensor.getitem": lambda: call(operator.getitem, leaf(4, 3), (slice(1, 3), ids(2, below=2))),
    "Tensor.getitem slice": lambda: call(lambda *parts: leaf(4, 3)[slice(*parts)], 0, 3, 2),
    "Tensor.invert": lambda: call(operator.invert, mt.tensor(bools(2, 3))),
    "Tensor.item": lambda: call(leaf(1).item),
    "Tensor.iter": lambda: call(lambda t: some(iter(t)), leaf(2, 3)),
    "Tensor.log": lambda: call(leaf(2, 3).log),
    "Tensor.matmul": lambda: call(operator.matmul, leaf(2, 3), leaf(3, 2)),
    "Tensor.neg": lambda: call(operator.neg, leaf(2, 3)),
    "Tensor.numpy": lambda: call(leaf(2, 3).numpy),
    "Tensor.permute": lambda: call(leaf(2, 3, 4).permute, 2, 0, 1),
    "Tensor.permute tuple": lambda: call(leaf(2, 3, 4).permute, (2, 0, -2)),
    "Tensor.repr": lambda: call(repr, leaf(2, 3)),
    "Tensor.requires_grad": lambda: call(lambda value: replaced(leaf(2, 3), "requires_grad", value), True),
    "Tensor.reshape": lambda: call(leaf(2, 3).reshape, 3, -1),
    "Tensor.reshape tuple": lambda: call(leaf(2, 3).reshape, (3, 2)),
    "Tensor.rmatmul": lambda: call(operator.matmul, real(2, 3), leaf(3, 2)),
    "Tensor.setitem": lambda: writes(assigned, nested(), (0, slice(None)), real(3)),
    "Tensor.sigmoid": lambda: call(leaf(2, 3).sigmoid),
    "Tensor.sqrt": lambda: call(leaf(2, 3).sqrt),
    "Tensor.tanh": lambda: call(leaf(2, 3).tanh),
    "Tensor.to": lambda: call(leaf(2, 3).to, "float64"),
    "Tensor.transpose": lambda: call(leaf(2, 3).transpose, 0, -1),
    "Tensor as number": lambda: call(lambda t: (float(t), int(t), bool(t)), mt.tensor(1.0)),
    "numpy.asarray": lambda: call(np.asarray, leaf(2, 3), np.float64),
    "numpy.concatenate": lambda: call(np.concatenate, [mt.tensor([1.0]), mt.tensor([2.0])]),
}


def public_names() -> Iterator[str]:
    """What must have a line in VALID."""
    yield from (name for name in mt.__all__ if callable(getattr(mt, name)))
    for module in ("functional", "nn", "optim", "data"):
        owner = getattr(mt, module)
        yield from (f"{module}.{name}" for name in owner.__all__ if callable(getattr(owner, name)))
    for module in ("masks", "metrics", "optim.schedules"):
        owner = operator.attrgetter(module)(mt)
        for name, value in vars(owner).items():
            if not name.startswith("_") and getattr(value, "__module__", None) == owner.__name__ and name.islower():
                yield f"{module}.{name}"
    yield from (f"Tensor.{name}" for name, value in vars(mt.Tensor).items() if name[0] != "_" and callable(value))
