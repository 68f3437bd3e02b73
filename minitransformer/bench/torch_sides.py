"""What the other process does with PyTorch, one class a job; methods take and return what JSON can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minitransformer.bench.attention_case import Case
from minitransformer.bench.decode import model_of
from minitransformer.bench.gemm import PRODUCTS, Rates, drawn, gflops
from minitransformer.bench.harness import timed
from minitransformer.bench.memory import peak_of
from minitransformer.bench.recipe import Block, Recipe, time_steps
from minitransformer.bench.torch_models import TWINS, ModuleTrainer
from minitransformer.bench.torch_twin import Decoder, HalfTwin, Twin, one_line, torch_device
from minitransformer.errors import ConfigError, require


def torch_with(threads: int) -> Any:
    """The module, computing on so many threads."""
    torch = require("torch", extra="peers", purpose="the PyTorch twin")
    torch.set_num_threads(threads)
    return torch


class Train:
    """The twin, from untrained weights. `ConfigError` for what cannot be compiled."""

    def __init__(self, recipe: dict[str, Any], threads: int, compiled: bool) -> None:
        torch_with(threads)
        self._recipe = Recipe.from_dict(recipe)
        model, self._data, self._validation = self._recipe.build()
        self._twin: Any
        if self._recipe.model == "gpt":
            self._twin = Twin(model.config, model.state_dict(), self._recipe.train, compiled=compiled)
        else:
            self._twin = ModuleTrainer(TWINS[self._recipe.model](model), self._recipe.train)
        if compiled:
            try:
                self._twin.loss(self._recipe.batches(self._data, 0)[0]).backward()
            except (RuntimeError, OSError, ImportError) as error:
                fix = "It needs a C++ compiler; leave out --torch-compile to do without"
                raise ConfigError("torch.compile", f"cannot compile the loss here ({one_line(error)})", fix) from error

    def steps(self, first: int, count: int) -> Block:
        return time_steps(self._twin, self._recipe, self._data, first, count)

    def evaluate(self) -> float:
        loss: float = self._twin.evaluate(self._recipe.validation_batches(self._validation))
        return loss


class TrainHalf:
    """One of the two processes that take every step together, on one thread each."""

    def __init__(self, recipe: dict[str, Any], rank: int, rendezvous: str) -> None:
        torch_with(1)
        self._recipe = Recipe.from_dict(recipe)
        model, self._data, _ = self._recipe.build()
        train = self._recipe.train
        self._twin = HalfTwin(model.config, model.state_dict(), train, rank=rank, rendezvous=rendezvous)

    def steps(self, first: int, count: int) -> Block:
        return time_steps(self._twin, self._recipe, self._data, first, count)


class Attention:
    """torch's scaled_dot_product_attention."""

    def __init__(self, case: Sequence[Any], threads: int) -> None:
        self._torch = torch = torch_with(threads)
        self._case = Case(*case)
        q, k, v, self._dout = (torch.from_numpy(array) for array in self._case.inputs().values())
        self._qkv = [x.requires_grad_() for x in (q, k, v)]
        mask = self._case.mask()
        self._mask = None if mask is None else torch.from_numpy(mask)

    def _forward(self) -> Any:
        function = self._torch.nn.functional.scaled_dot_product_attention
        return function(*self._qkv, attn_mask=self._mask, is_causal=self._case.causal)

    def _both(self) -> tuple[Any, ...]:
        out = self._forward()
        return (out, *self._torch.autograd.grad(out, self._qkv, self._dout))

    def time(self, passes: str, count: int) -> list[float]:
        if passes != "forward":
            return timed(self._both, count)
        with self._torch.inference_mode():
            return timed(self._forward, count)

    def save(self, folder: str) -> None:
        for name, x in zip(("out", "dq", "dk", "dv"), self._both(), strict=True):
            np.save(Path(folder) / f"{name}.npy", x.detach().numpy())


class DeviceAttention:
    """One of torch's kernels of attention on a device, timed by the device's clock."""

    def __init__(self, case: Sequence[Any], theirs: Sequence[Any], device: str) -> None:
        torch = self._torch = require("torch", extra="peers", purpose="the PyTorch twin")
        self._case, (kernel, dtype, tf32) = Case(*case), theirs
        self._device = torch_device(device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        self._backend = getattr(torch.nn.attention.SDPBackend, kernel)
        moved = (torch.from_numpy(array) for array in self._case.inputs().values())
        q, k, v, self._dout = (x.to(self._device, getattr(torch, dtype)) for x in moved)
        self._qkv = [x.requires_grad_() for x in (q, k, v)]
        mask = self._case.mask()
        self._mask = None if mask is None else torch.from_numpy(mask).to(self._device)
        try:
            self._both()
        except RuntimeError as error:
            problem = f"{kernel} in {dtype} does not serve this case on {self._device} ({one_line(error)})"
            raise ConfigError("torch", problem, "Leave it out") from error

    def _forward(self) -> Any:
        with self._torch.nn.attention.sdpa_kernel(self._backend):
            attention = self._torch.nn.functional.scaled_dot_product_attention
            return attention(*self._qkv, attn_mask=self._mask, is_causal=self._case.causal)

    def _both(self) -> tuple[Any, ...]:
        out = self._forward()
        return (out, *self._torch.autograd.grad(out, self._qkv, self._dout))

    def time(self, passes: str, count: int) -> list[float]:
        if passes != "forward":
            return self._timed(self._both, count)
        with self._torch.inference_mode():
            return self._timed(self._forward, count)

    def _timed(self, work: Callable[[], object], count: int) -> list[float]:
        if self._device == "cpu":
            return timed(work, count)
        cuda = self._torch.cuda
        pairs = [(cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in pairs:
            begin.record()
            work()
            end.record()
        cuda.synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairs]

    def save(self, folder: str) -> None:
        for name, x in zip(("out", "dq", "dk", "dv"), self._both(), strict=True):
            np.save(Path(folder) / f"{name}.npy", x.detach().float().cpu().numpy())


class Gemm:
    """The products of linear layers as torch's matmul computes them, into arrays made once."""

    def __init__(self, layers: Sequence[Sequence[Any]], rows: int, square: int, threads: int) -> None:
        torch = torch_with(threads)
        self._products = []
        for name, width_in, width_out in layers:
            weight = torch.from_numpy(drawn(width_out, width_in))
            x, dy = torch.from_numpy(drawn(rows, width_in)), torch.from_numpy(drawn(rows, width_out))
            operands = ((x, weight.T), (dy, weight), (dy.T, x))
            self._products += [(f"{name} {kind}", *pair) for kind, pair in zip(PRODUCTS, operands, strict=True)]
        a, b = (torch.from_numpy(drawn(square, square)) for _ in range(2))
        self._products.append(("square", a, b.T))
        self._torch = torch

    def rates(self) -> Rates:
        torch, rates = self._torch, {}
        for name, a, b in self._products:
            out = torch.empty(a.shape[0], b.shape[1])
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            rates[name] = gflops(flops, partial(torch.matmul, a, b, out=out))
        return rates


class Decode:
    """The twin's greedy decoding from a prompt (B, T), given as lists."""

    def __init__(self, recipe: dict[str, Any], prompt: list[list[int]], max_new_tokens: int) -> None:
        self._torch = torch_with(1)
        model = model_of(Recipe.from_dict(recipe))
        self._decoder = Decoder(model.config, model.state_dict(), Recipe.from_dict(recipe).train.device)
        self._prompt, self._count = np.array(prompt, np.int64), max_new_tokens

    def tokens(self) -> list[list[int]]:
        tokens: list[list[int]] = self._decoder.generate(self._prompt, self._count).tolist()
        return tokens

    def time(self, threads: int, count: int) -> list[float]:
        self._torch.set_num_threads(threads)
        return timed(lambda: self._decoder.generate(self._prompt, self._count), count)


class StepMemory:
    """The memory of the twin's training."""

    def __init__(self, recipe: dict[str, Any], threads: int) -> None:
        torch_with(threads)
        self._recipe, self._threads = recipe, threads

    def peak(self, steps: int) -> dict[str, int]:
        return peak_of(lambda: Train(self._recipe, self._threads, compiled=False).steps(0, steps))
