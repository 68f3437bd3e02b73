"""The report as text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from minitransformer.doctor.checks import Result

_WIDTH, _INDENT = 79, 12


def facts_text(report: dict[str, Any]) -> str:
    """The facts, one section a paragraph, its name in the margin."""
    versions = report["versions"]
    first = f"minitransformer {versions['minitransformer']} on Python {versions['python']}, "
    lines = [_wrapped(first + report["platform"]["system"])]
    for title, texts in _sections(report):
        for number, text in enumerate(texts):
            lines.append(_wrapped(text, title if number == 0 else "", _INDENT))
    return "\n".join(lines)


def check_line(result: Result) -> str:
    """One line for a check, and what is wrong below it if it failed."""
    line = f"  {'ok' if result.passed else 'FAILED':<8}{result.name:<28}{result.seconds:7.2f} s"
    return line if result.passed else f"{line}\n{_wrapped(str(result.problem), '', 10)}"


def verdict(results: Sequence[Result]) -> str:
    """The last line: all is well, or what to do about the first check that failed."""
    failed = [result for result in results if not result.passed]
    if not failed:
        return f"all {len(results)} checks passed in {sum(result.seconds for result in results):.1f} s"
    return f"{len(failed)} of {len(results)} checks failed. {failed[0].name}: {failed[0].fix}"


def _sections(report: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    unknown = report["unknown"]

    def known(section: str, name: str, shown: Any = str) -> str:
        value = report[section][name]
        return f"unknown ({unknown[f'{section}.{name}']})" if value is None else shown(value)

    names = [name for name in report["versions"] if name not in ("minitransformer", "python")]
    yield "versions", [", ".join(f"{name} {known('versions', name)}" for name in names)]
    cpu = report["processor"]
    yield (
        "processor",
        [
            f"{known('processor', 'name')} ({cpu['llvm_name']} to LLVM)",
            f"{cpu['cores_available']} of {cpu['cores_present'] or 'an unknown number of'} cores; "
            + (" ".join(cpu["simd"]) or "no SIMD features known here"),
        ],
    )
    yield (
        "memory",
        [f"{known('memory', 'available_bytes', _size)} available, {known('memory', 'total_bytes', _size)} in all"],
    )
    yield "disk", [f"{known('disk', 'free_bytes', _size)} free in {report['disk']['folder']}"]
    yield "BLAS", [_library(library) for library in report["blas"]] or ["none that threadpoolctl knows"]
    pool = report["threads"]["numba"]
    layers = f"threading layer {pool['asked']}, of {', '.join(pool['layers']) or 'none'}"
    yield "threads", [f"{report['threads']['training']} for training; Numba's own {pool['num_threads']} ({layers})"]
    yield "environment", [f"{name}={value}" for name, value in report["environment"].items()] or ["nothing set"]
    yield "kernels", list(_kernels(report))
    yield "CUDA", list(_cuda(report["cuda"]))


def _wrapped(text: str, margin: str = "", indent: int = 0) -> str:
    """Paths and package names stay whole: they are there to be copied."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=margin.ljust(indent),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _library(library: dict[str, Any]) -> str:
    threads = f"{library['num_threads']} thread{'s' if library['num_threads'] != 1 else ''}"
    details = [library.get(name) for name in ("architecture", "threading_layer")]
    words = ", ".join([*(str(detail) for detail in details if detail), threads])
    return f"{library['internal_api']} {library['version'] or 'of unknown version'} ({words})"


def _kernels(report: dict[str, Any]) -> Iterator[str]:
    cache, compiled = report["cache"], report["compiled"]
    if cache["problem"]:
        yield f"not kept between runs: {cache['problem']}"
    else:
        yield f"{cache['kernels']} kept ({_size(cache['bytes'])}) in {cache['folder']}"
    if compiled:
        yield f"{compiled['compiled']} compiled now, {compiled['cached']} from before"


def _cuda(cuda: dict[str, Any]) -> Iterator[str]:
    if cuda["device"]:
        yield f"{cuda['device']}, compute capability {cuda['capability']}, driver for CUDA {cuda['driver']}"
        yield f"not usable: {cuda['problem']}" if cuda["problem"] else f"kernels: {', '.join(cuda['families'])}"
    else:
        yield f"none: {cuda['problem']}"
    if cuda["install"]:
        yield cuda["install"] if cuda["device"] else f"with an NVIDIA GPU: {cuda['install']}"
    yield "simulated GPU: available"


def _size(count: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} bytes"
