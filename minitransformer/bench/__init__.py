"""Benchmarks beside PyTorch: `step` for one training step, `time_to_loss` for a whole training."""

from minitransformer.bench.recipe import Recipe

__all__ = ["Recipe"]
