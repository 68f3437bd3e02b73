"""Valid calls of what takes and gives Tensors: `functional`, `masks`, Tensor's methods, NumPy's functions."""

from __future__ import annotations

import operator

import numpy as np
from material import Lines, assigned, attended, bools, call, ids, leaf, nested, real, replaced, some, writes

import minitransformer as mt
import minitransformer.functional as F
from minitransformer import masks

TENSORS: Lines = {
    # ---- functional -------------------------------------------------------------------------------
    "functional.Sparse": lambda: call(F.Sparse, range(1, 9, 2), left=1, block=2),
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
