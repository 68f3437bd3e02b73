"""Differentiable operations: forward/backward pairs on plain arrays, registered for autograd."""

from minitransformer.ops import (  # noqa: F401  (importing a module registers its ops)
    activation,
    arithmetic,
    attention,
    decoder_layer,
    dropout,
    embedding,
    encoder_layer,
    gpt_block,
    linear,
    linear_attention,
    loss,
    norm,
    position,
    reduce,
    shape,
)
