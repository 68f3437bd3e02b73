"""The laws of attention: relations that hold for every attention, in any framework, with their checks.

`ALL` lists them, `check_laws(fn)` runs them; docs/laws.md says what each one means.
"""

from minitransformer.testing.laws.check import LawError, check_laws
from minitransformer.testing.laws.law import Law
from minitransformer.testing.laws.report import LawReport, Verdict
from minitransformer.testing.laws.table import ALL

__all__ = ["ALL", "Law", "LawError", "LawReport", "Verdict", "check_laws"]
