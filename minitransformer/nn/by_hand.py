"""What layers that are written twice have in common: may the one by hand run, and on which weights?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minitransformer.autograd import Parameter, watching
from minitransformer.masks import Mask
from minitransformer.nn.attention import MultiHeadAttention
from minitransformer.nn.dropout import Dropout
from minitransformer.nn.feed_forward import FeedForward
from minitransformer.nn.linear import Linear


def is_untouched(
    kind: type,
    norms: Sequence[Any],
    attentions: Sequence[Any],
    ffn: Any,
    dropouts: Sequence[Any],
    heads: type = MultiHeadAttention,
) -> bool:
    """Whether nobody watches every op, all norms are of `kind` and all `attentions` of `heads`, and no other part is a
    module of another kind.
    """
    if watching.get() is not None or not (_are(FeedForward, ffn) and _are(heads, *attentions)):
        return False
    linears = [part for attn in attentions for part in (attn.qkv, attn.out)]
    return (
        _are(Linear, ffn.up, ffn.down, *linears)
        and _are(Dropout, ffn.dropout, *dropouts)
        and _are(kind, *norms)
        and all(norm.eps == norms[0].eps for norm in norms)
    )


def _are(kind: type, *parts: Any) -> bool:
    return all(type(part) is kind and "forward" not in vars(part) for part in parts)


def selects(mask: Any) -> bool:
    """Whether `mask` says which keys may be attended to, and adds nothing to scores, which can have a gradient."""
    return mask is None or isinstance(mask, Mask) or getattr(mask, "dtype", None) == np.bool_


def sublayer_weights(norm: Any, into: Linear, out: Linear) -> tuple[Parameter | None, ...]:
    """The six arrays of a sublayer, in the order of ops."""
    return norm.weight, getattr(norm, "bias", None), into.weight, into.bias, out.weight, out.bias
