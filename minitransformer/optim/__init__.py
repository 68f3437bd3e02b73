"""Optimizers over one flat buffer, and learning rate schedules."""

from minitransformer.optim import schedules
from minitransformer.optim.flat import FlatParameters
from minitransformer.optim.optimizers import SGD, Adam, AdamW, Optimizer

__all__ = ["SGD", "Adam", "AdamW", "FlatParameters", "Optimizer", "schedules"]
