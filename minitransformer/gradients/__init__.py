"""Checking gradients: `gradcheck`, the report it makes, and how a function is described to it."""

from minitransformer.gradients.check import GradcheckError, gradcheck
from minitransformer.gradients.function import Function
from minitransformer.gradients.live import gradient_error
from minitransformer.gradients.report import GradcheckReport, Mismatch

__all__ = ["Function", "GradcheckError", "GradcheckReport", "Mismatch", "gradcheck", "gradient_error"]
