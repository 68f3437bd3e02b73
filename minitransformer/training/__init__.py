"""Training: the visible loop, the sharded step, the config and the callbacks."""

from minitransformer.training.callbacks import Callback, Progress, TrainResult
from minitransformer.training.config import TrainConfig
from minitransformer.training.step import StepResult, TrainStep, evaluate, make_optimizer
from minitransformer.training.trainer import Trainer

__all__ = [
    "Callback",
    "Progress",
    "StepResult",
    "TrainConfig",
    "TrainResult",
    "TrainStep",
    "Trainer",
    "evaluate",
    "make_optimizer",
]
