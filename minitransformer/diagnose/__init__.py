"""The first bad op: where NaN or infinity began, kept as a small file and run again."""

from minitransformer.diagnose.archive import load, save
from minitransformer.diagnose.bad_op import BadOp, range_text
from minitransformer.diagnose.find import first_bad_op
from minitransformer.diagnose.report import report
from minitransformer.diagnose.shrink import shrunk

__all__ = ["BadOp", "first_bad_op", "load", "range_text", "report", "save", "shrunk"]
