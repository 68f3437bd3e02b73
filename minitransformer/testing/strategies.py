"""Hypothesis strategies that draw problems, not seeds: what fails shrinks to something small and simple."""

from minitransformer.testing.arrays import arrays, attention_masks, broadcastable_shapes, shapes, tensors
from minitransformer.testing.batches import model_configs, padded_batches, ragged_batches, token_batches
from minitransformer.testing.problems import attention_problems

__all__ = [
    "arrays",
    "attention_masks",
    "attention_problems",
    "broadcastable_shapes",
    "model_configs",
    "padded_batches",
    "ragged_batches",
    "shapes",
    "tensors",
    "token_batches",
]
