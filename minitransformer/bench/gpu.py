"""`minitransformer bench gpu`: what a first hour on a GPU should tell, in some minutes.

Are the kernels right, what does a launch cost, what can the device do, and how near to that are attention and a
training step? Each part is reported when it ends, and one that fails does not keep the others from running.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minitransformer.bench import gpu_attention, peer
from minitransformer.bench.attention_case import Case
from minitransformer.bench.gpu_attention import rate_of_products, timed_on
from minitransformer.bench.harness import OURS, alternate, compare, milliseconds
from minitransformer.bench.recipe import Ours, Recipe, Theirs
from minitransformer.bench.report import describe, machine
from minitransformer.checks import check_choice
from minitransformer.doctor.kernels import agrees
from minitransformer.files import write_json
from minitransformer.kernels import FAMILIES
from minitransformer.kernels.gpu.arrays import check_device, cupy, move
from minitransformer.kernels.gpu.blocks import empty_kernel
from minitransformer.threads import Workers
from minitransformer.training import TrainConfig

SANITIZER_SECONDS = 120
# What the sanitizer watches: every kernel once, at the small sizes of the self-test.
_EVERY_KERNEL = "from minitransformer.bench.gpu import kernels_agree; kernels_agree('cuda')"


class Amount(NamedTuple):
    """How much work each part is."""

    cases: tuple[Case, ...]
    recipe: Recipe
    rounds: int
    steps: int
    copied: int  # bytes
    launches: int


AMOUNTS = {
    "cuda": Amount(
        gpu_attention.CASES,
        Recipe(n_layer=6, n_head=6, n_embd=384, block_size=256, train=TrainConfig(device="cuda", batch_size=64)),
        rounds=3,
        steps=10,
        copied=2**28,
        launches=1000,
    ),
    "simulator": Amount(  # which shows that all of this runs
        (Case(1, 5, 1, 4),),
        Recipe(n_layer=1, n_head=1, n_embd=4, block_size=3, train=TrainConfig(device="simulator", batch_size=1)),
        rounds=1,
        steps=1,
        copied=2**10,
        launches=3,
    ),
}


def run(*, device: str = "cuda", json_path: str | Path | None = None) -> dict[str, Any]:
    """Run all parts on `device`, print what each found and a short table last, return the figures.

    Raises `DeviceError` or `MissingExtraError` if the device cannot be used, `ConfigError` for another name.
    """
    check_choice("bench gpu", "device", device, ("cuda", "simulator"))
    check_device("bench gpu", device)
    figures: dict[str, Any] = {"what": "gpu", "machine": machine(), "device": _described(device)}
    print(f"{describe(figures['machine'])}\n{figures['device']}", flush=True)
    parts: dict[str, Callable[[str], dict[str, Any]]] = {
        "kernels": kernels_agree,
        "memory": _sanitized,
        "launch": _launch,
        "rates": _rates,
        "attention": lambda device: gpu_attention.measure(device, AMOUNTS[device].cases, AMOUNTS[device].rounds),
        "step": _step,
    }
    for name, part in parts.items():
        started = time.perf_counter()
        try:
            figures[name] = part(device)
        except Exception as error:  # noqa: BLE001 (compilers and drivers raise errors of their own kinds)
            figures[name] = {"failed": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    if json_path is not None:
        write_json(Path(json_path), figures)
    print("\n".join(_summary(figures)))
    return figures


def kernels_agree(device: str) -> dict[str, Any]:
    """Every function of every family that has GPU kernels against the reference: which failed, and how."""
    families = [family for family, implementations in FAMILIES.items() if "cuda" in implementations]
    wrong = {}
    for family in families:
        try:
            agrees(family, "cuda", device)
        except Exception as error:  # noqa: BLE001 (as above)
            wrong[family] = f"{type(error).__name__}: {error}"
    return {"families": families, "wrong": wrong}


def _sanitized(device: str) -> dict[str, Any]:
    """Every kernel once under NVIDIA's compute-sanitizer, which watches memory; the simulator does by itself."""
    tool = shutil.which("compute-sanitizer")
    if device != "cuda" or tool is None:
        return {"skipped": "the simulator checks every access" if device != "cuda" else "no compute-sanitizer here"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", _EVERY_KERNEL]
    try:
        done = subprocess.run(
            command,
            env=peer.child_environment(),
            capture_output=True,
            text=True,
            timeout=SANITIZER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"it took more than {SANITIZER_SECONDS} s"}
    end = "; ".join(done.stdout.splitlines()[-3:])
    return {"failed": f"exit {done.returncode}: {end}"} if done.returncode else {"found": end}


def _launch(device: str) -> dict[str, Any]:
    """Microseconds of the host for a launch with three arrays and a number, and of the device for what it launches."""
    kernel = empty_kernel()
    a, b, c = (move(np.ones(32, np.float32), device) for _ in range(3))

    def work() -> None:
        kernel((1, 1, 1), a, b, c, 32)

    on_device = timed_on(device, work, 20)
    launches = AMOUNTS[device].launches
    started = time.perf_counter()
    for _ in range(launches):
        work()
    host = (time.perf_counter() - started) / launches
    timed_on(device, work, 1)  # waits for all of them
    return {"host_us": 1e6 * host, "device_us": 1e6 * float(np.median(on_device))}


def _rates(device: str) -> dict[str, Any]:
    """What the device reaches in a float32 product of square matrices, and in a copy, read and write counted."""
    source = move(np.ones(AMOUNTS[device].copied // 4, np.float32), device)
    target = np.empty_like(source)

    def copy() -> None:
        target[...] = source

    timed_on(device, copy, 3)
    seconds = float(np.median(timed_on(device, copy, 20)))
    return {"gemm_tflops": rate_of_products(device) / 1e12, "copy_gb_per_s": 2 * source.nbytes / seconds / 1e9}


def _step(device: str) -> dict[str, Any]:
    """A training step, ours and PyTorch's in turns."""
    recipe, steps = AMOUNTS[device].recipe, AMOUNTS[device].steps
    with ExitStack() as stack:
        sides = {OURS: Ours(recipe, stack.enter_context(Workers(1))).steps}
        if peer.installed():
            sides["torch"] = Theirs(stack.enter_context(peer.process()), recipe).steps
        blocks = {name: (lambda block, take=take: take(block * steps, steps)) for name, take in sides.items()}
        results = alternate("bench step", blocks, AMOUNTS[device].rounds)
    seconds = {name: [block.seconds for block in taken] for name, taken in results.items()}
    losses = {name: taken[-1].losses[-1] for name, taken in results.items()}
    return {"sides": {name: milliseconds(s) for name, s in seconds.items()}, "last_loss": losses, **compare(seconds)}


def _described(device: str) -> str:
    if device != "cuda":
        return "the simulator: no figure below says anything of a GPU"
    properties = cupy().cuda.runtime.getDeviceProperties(cupy().cuda.Device().id)
    name, capability = properties["name"].decode(), f"{properties['major']}.{properties['minor']}"
    return f"{name}, compute capability {capability}, {properties['totalGlobalMem'] / 2**30:.0f} GiB"


def _summary(figures: dict[str, Any]) -> Iterator[str]:
    """The last lines: what each part found, and the table of attention."""
    for name in ("kernels", "memory", "launch", "rates", "step"):
        found = figures[name]
        if "failed" in found:
            line = f"FAILED: {found['failed']}"
        elif name == "kernels":
            wrong = "; ".join(f"{family}: {problem}" for family, problem in found["wrong"].items())
            line = f"WRONG: {wrong}" if wrong else f"agree with the reference: {', '.join(found['families'])}"
        elif name == "step":
            line = ", ".join(f"{side} {ms['median']:.2f} ms" for side, ms in found["sides"].items())
        else:
            line = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
            )
        yield f"{name:10}{line}"
    attention = figures["attention"]
    yield gpu_attention.text_of(attention) if "cases" in attention else f"attention FAILED: {attention['failed']}"
