"""`minitransformer gradcheck` and `verify`: gradients, kernels and the laws of attention, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitransformer.autograd import OPS
from minitransformer.bench.report import describe, machine, progress, table
from minitransformer.checks import check_count
from minitransformer.doctor import checks
from minitransformer.errors import ConfigError, GradientError, nearest
from minitransformer.files import write_json
from minitransformer.gradients import gradcheck
from minitransformer.kernels import FAMILIES, host_implementations
from minitransformer.testing.calls import CALLS

DTYPES = ("float32", "float64")


class Outcome(NamedTuple):
    """One line of the table; `problem` is None for a check that passed, `effort` says how much was compared."""

    what: str
    dtype: str
    effort: str
    problem: str | None


def gradchecks(names: Sequence[str], *, calls: int = 20, seed: int = 0, json_path: Path | None = None) -> bool:
    """Check the gradients of these ops, or of all, at `calls` drawn calls each; print a table; whether all passed.

    Raises `ConfigError` for an op that does not exist.
    """
    for name in names:
        if name not in CALLS:
            raise ConfigError("gradcheck", f"there is no op {name!r}", nearest(name, CALLS))
    check_count("gradcheck", "calls", calls, least=1)
    jobs = [partial(_gradcheck, name, dtype, calls, seed) for name in names or sorted(CALLS) for dtype in DTYPES]
    return _run("gradcheck", jobs, json_path)


def verify(*, examples: int = 50, seed: int = 0, json_path: Path | None = None) -> bool:
    """Every op's gradient, every compiled kernel against its reference, every law of attention for every backend.

    Prints a table; whether all passed. The laws draw up to `examples` problems each; they need Hypothesis.
    """
    check_count("verify", "examples", examples, least=1)
    jobs: list[Callable[[], Outcome]] = [
        partial(_gradcheck, name, dtype, max(1, examples // 10), seed) for name in sorted(CALLS) for dtype in DTYPES
    ]
    for family in sorted(FAMILIES):
        jobs += [partial(_kernels, family, name) for name in host_implementations(family) if name != "reference"]
    jobs += [
        partial(_law, law, backend, dtype, examples)
        for backend in host_implementations("attention")
        for dtype in DTYPES
        for law in _laws()
    ]
    return _run("verify", jobs, json_path)


def _laws() -> Iterator[Any]:
    from minitransformer.testing import laws

    return iter(laws.ALL)


def _gradcheck(name: str, dtype: str, calls: int, seed: int) -> Outcome:
    """One op at some drawn calls; the first that fails is reported.

    Where a drawn call leaves nothing to compare, as far out in the tail of a GELU, another is drawn instead: at
    most one for each call.
    """
    rng = np.random.default_rng(seed)
    compared, worst, passed, refused = 0, 0.0, 0, 0
    while passed < calls:
        inputs, static = CALLS[name](rng)
        cast = [x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x for x in inputs]
        problem = None
        try:
            report = gradcheck(partial(OPS[name], **static), cast, raise_exception=False)
        except GradientError as error:
            refused += 1
            problem = str(error) if refused > calls else None
        else:
            passed += 1
            compared, worst = compared + report.compared, max(worst, report.worst)
            problem = None if report else str(report)
        if problem is not None:
            return Outcome(f"gradient of {name}", dtype, f"{compared} numbers", problem)
    effort = f"{compared} numbers, worst at {worst:.1%} of what is allowed"
    effort += f", {refused} drawn again" * (refused > 0)
    return Outcome(f"gradient of {name}", dtype, effort, None)


def _kernels(family: str, name: str) -> Outcome:
    result = checks.run(f"{family} kernels, {name}", partial(checks.agrees, family, name))
    return Outcome(f"kernels {family}, {name}", "both", "against the reference", result.problem)


def _law(law: Any, backend: str, dtype: str, examples: int) -> Outcome:
    from minitransformer.testing import adapters, check_laws

    report = check_laws(adapters.ours(backend, dtype=dtype), [law], max_examples=examples)
    verdict = report[law.name]
    effort = f"{verdict.examples} problems, {verdict.compared} numbers" if verdict.examples else verdict.reason
    return Outcome(f"{law.name} {law.title}, {backend}", dtype, effort, str(report) if report.failed else None)


def _run(title: str, jobs: Sequence[Callable[[], Outcome]], json_path: Path | None) -> bool:
    facts = machine()
    outcomes = []
    with progress(len(jobs), title, "check") as advance:
        for job in jobs:
            outcomes.append(job())
            advance()
    failed = [outcome for outcome in outcomes if outcome.problem is not None]
    print(describe(facts))
    rows = [[o.what, o.dtype, o.effort, "ok" if o.problem is None else "FAILED"] for o in outcomes]
    print(table([title, "dtype", "compared", ""], rows))
    for outcome in failed:
        print(f"\n{outcome.what}, {outcome.dtype}:\n{outcome.problem}")
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} checks passed")
    if json_path is not None:
        found = [outcome._asdict() for outcome in outcomes]
        write_json(json_path, {"what": title, "machine": facts, "passed": not failed, "outcomes": found})
    return not failed
