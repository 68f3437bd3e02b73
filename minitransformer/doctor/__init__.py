"""`minitransformer doctor`: what this machine and installation are, whether they work, and what to do if not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from shutil import get_terminal_size
from typing import Any

from minitransformer.doctor import checks
from minitransformer.doctor.facts import cache_facts, gather
from minitransformer.doctor.text import check_line, facts_text, verdict
from minitransformer.files import json_bytes
from minitransformer.kernels import compiled


def run(*, as_json: bool, compile_all: bool) -> bool:
    """Print the report on stdout, as text or as one JSON object; whether every check passed.

    `compile_all` first compiles every kernel for every dtype, and then the cache has to be usable. A
    terminal on stderr gets a progress bar.
    """
    report: dict[str, Any] = {"compiled": _compile() if compile_all else None}
    report |= gather()
    if not as_json:
        print(f"{facts_text(report)}\n\nself-test", flush=True)
    results = []
    for result in _results(compile_all):
        results.append(result)
        if not as_json:
            _print_above_the_bar(check_line(result))
    passed = all(result.passed for result in results)
    if as_json:
        report |= {"checks": [result._asdict() for result in results], "passed": passed}
        print(json_bytes("the report", report, indent=2).decode(), end="")
    else:
        print(verdict(results))
    return passed


def _compile() -> dict[str, int]:
    """How many kernels had to be compiled, and how many were kept from before."""
    jobs = list(compiled.all_kernels())
    fresh = 0
    with _bar(jobs, "compiling") as bar:
        for job in bar:
            bar.set_postfix_str(job.name)
            fresh += job.run()
    return {"compiled": fresh, "cached": len(jobs) - fresh}


def _results(compile_all: bool) -> Iterator[checks.Result]:
    todo = checks.all_checks()
    if compile_all:
        todo = {"kernel cache": _kept, **todo}
    with _bar(todo, "checking") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            yield checks.run(name, todo[name])


def _kept() -> None:
    """Compiling into a cache needs one."""
    if problem := cache_facts()["problem"]:
        what, _, fix = problem.partition(". ")
        raise checks.CheckFailed("kernel cache", f"nothing that was compiled is kept: {what}", fix or checks.REINSTALL)


def _bar(todo: Any, what: str) -> Any:
    from tqdm import tqdm

    size = get_terminal_size()  # 80 x 24 where a terminal does not tell, and tqdm would stay silent
    return tqdm(
        todo,
        what,
        leave=False,
        mininterval=0,
        ncols=size.columns,
        nrows=size.lines,
        bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}|{postfix}",
        disable=not sys.stderr.isatty(),
    )


def _print_above_the_bar(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
