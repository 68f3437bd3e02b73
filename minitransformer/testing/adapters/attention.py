"""Attention functions as the laws see them: NumPy arrays in and out, layout (B, H, T, D), our names for options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer import functional as F
from minitransformer import random
from minitransformer.autograd import Tensor
from minitransformer.checks import check_choice, shown
from minitransformer.errors import ConfigError, DTypeError, ShapeError, nearest, require
from minitransformer.gradients import Function
from minitransformer.gradients.function import problem_of
from minitransformer.kernels import use_backend
from minitransformer.kernels.gpu.arrays import check_device
from minitransformer.testing.adapters import functions
from minitransformer.threads import get_num_threads, set_num_threads

# What an attention can do besides softmax(q k^T / sqrt(D)) v. Laws name what they need of it.
ABILITIES = {
    "additive_mask": "attn_mask may be float: it is added to the scores, and -inf excludes",
    "alibi_slopes": "alibi_slopes (H,): slope * distance is subtracted from the scores",
    "attn_mask": "attn_mask bool, broadcasting to (B, H, T, S), True = may attend",
    "cross": "T and S may differ",
    "cu_seqlens": "cu_seqlens: several documents in one row, by their cumulative lengths",
    "dropout_p": "dropout_p, with seed: the same seed drops the same weights",
    "enable_gqa": "enable_gqa: fewer key heads than query heads, each serving a group in a row",
    "is_causal": "is_causal",
    "key_lengths": "key_lengths (B,): keys from there on are masked",
    "lower_right": "causal_align='lower_right' where T and S or lengths differ",
    "need_lse": "need_lse: the log-sum-exp of the scores (B, H, T) is returned too",
    "need_weights": "need_weights: the weights (B, H, T, S) are returned too",
    "rope_positions": "rope_positions (positions of queries, of keys): q and k are rotated first",
    "scale": "scale: another factor than 1 / sqrt(D)",
    "softcap": "softcap c: scores s become c tanh(s / c)",
    "threads": "threads: how many threads it computes with",
    "upper_left": "causal_align='upper_left' where T and S or lengths differ",
    "value_width": "v may have another width than q and k",
    "window_size": "window_size (left, right), both including the own position",
}
# The abilities that a parameter of a function stands for, where they are not one of its name.
_BY_PARAMETER = {"attn_mask": ("attn_mask", "additive_mask"), "causal_align": ("upper_left", "lower_right")}


@dataclass(frozen=True)
class Attention:
    """An attention function under test.

    `call(q, k, v, **options)` returns the output (B, H, T, Dv), or a tuple with the weights and the log-sum-exp
    behind it, as `need_weights` and `need_lse` ask. `pull` returns that output with a function from an upstream
    gradient to (dq, dk, dv); None if there is no backward. `supports` names its `ABILITIES`, and nothing else
    is asked of it. `dtype` is that of the problems to be drawn, `bitwise` names the laws that are to hold to
    the last bit; all others are held to rounding.
    """

    name: str
    call: Callable[..., Any]
    pull: Callable[..., tuple[Any, Callable[[np.ndarray], Any]]] | None
    supports: frozenset[str]
    dtype: np.dtype
    bitwise: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for ability in self.supports - ABILITIES.keys():
            problem = f"{shown(ability)} is no ability of an attention"
            raise ConfigError("adapters", problem, nearest(str(ability), ABILITIES))
        if self.dtype not in (np.float32, np.float64):
            problem = f"dtype is {self.dtype}, expected float32 or float64"
            raise DTypeError("adapters", problem, "Pass one of them")

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
        """What `call` returns, after a look at its type, shape and dtype: `DTypeError`, `ShapeError`."""
        result = self.call(q, k, v, **options)
        (B, H, T, _), S = q.shape, k.shape[2]
        shapes: dict[str, tuple[int, ...]] = {"output": (B, H, T, v.shape[3])}
        if options.get("need_weights"):
            shapes["weights"] = (B, H, T, S)
        if options.get("need_lse"):
            shapes["log-sum-exp"] = (B, H, T)
        arrays = result if isinstance(result, tuple) else (result,)
        if len(arrays) != len(shapes):
            problem = f"returned {len(arrays)} arrays, expected {len(shapes)}: {', '.join(shapes)}"
            raise ShapeError(self.name, problem, "Return what was asked for, in this order")
        for (what, shape), array in zip(shapes.items(), arrays, strict=True):
            self._check(what, array, shape, q.dtype)
        return result

    def gradients(
        self, dout: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any
    ) -> tuple[np.ndarray, ...]:
        """(out, dq, dk, dv) of one forward and its backward; the same errors, `ConfigError` without a backward."""
        if self.pull is None:
            raise ConfigError(self.name, "has no backward", "Give one: numpy_function(forward, backward)")
        out, back = self.pull(q, k, v, **options)
        self._check("output", out, (*q.shape[:3], v.shape[3]), q.dtype)
        gradients = back(dout)
        if not isinstance(gradients, (tuple, list)) or len(gradients) < 3:
            raise ShapeError(self.name, "backward returned no three gradients", "Return (dq, dk, dv)")
        for name, g, x in zip(("dq", "dk", "dv"), gradients, (q, k, v), strict=False):
            self._check(name, g, x.shape, x.dtype)
        return out, *gradients[:3]

    def _check(self, what: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
        if not isinstance(array, np.ndarray):
            problem = f"the {what} is a {type(array).__name__}, expected a NumPy array"
            raise DTypeError(self.name, problem, "Tensors of a framework go through adapters.attention")
        if array.shape != shape:
            swapped = array.ndim == len(shape) == 4 and (shape[0], shape[2], shape[1], shape[3]) == array.shape
            hint = "That is (B, T, H, D): swap axes 1 and 2" if swapped else "Keep the layout (B, H, T, D)"
            raise ShapeError(self.name, f"the {what} has shape {array.shape}, expected {shape}", hint)
        if array.dtype != dtype:
            problem = f"the {what} is {array.dtype}, the inputs are {dtype}"
            raise DTypeError(self.name, problem, "Compute in the dtype of the inputs, or choose it: dtype=...")


def numpy_function(
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    name: str | None = None,
    supports: Collection[str] | None = None,
    dtype: npt.DTypeLike = np.float64,
) -> Attention:
    """An attention written with NumPy.

    Alone, forward(q, k, v, **options) returns the output; without a backward only the forward halves of laws
    run. With a backward it is a pair as `gradcheck` takes it: forward returns (out, saved), and
    backward(dout, saved) returns (dq, dk, dv). What it `supports` is read off its parameters unless given.
    """
    if backward is None:
        return Attention(name or _name(forward), forward, None, _abilities(forward, supports), np.dtype(dtype))

    def pull(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[Any, Callable[[Any], Any]]:
        out, saved = forward(q, k, v, **options)
        return out, lambda dout: backward(dout, saved)

    def call(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
        return forward(q, k, v, **options)[0]

    return Attention(name or _name(forward), call, pull, _abilities(forward, supports), np.dtype(dtype))


def attention(
    fn: Callable[..., Any],
    framework: str,
    *,
    name: str | None = None,
    supports: Collection[str] | None = None,
    dtype: npt.DTypeLike = np.float64,
    bitwise: Collection[str] = (),
) -> Attention:
    """An attention fn(q, k, v, **options) on tensors of a framework, which also differentiates it.

    `framework` is "minitransformer", "torch", "jax", "autograd" or "mygrad". Options that are arrays come as
    tensors to torch, and as NumPy arrays to the others.
    """
    check_choice("adapters.attention", "framework", framework, tuple(_WRAPPERS))

    def wrapped(q: np.ndarray, k: np.ndarray, v: np.ndarray, options: dict[str, Any]) -> Function:
        converted = {n: _converted(framework, x) for n, x in options.items()}

        def attend(q: Any, k: Any, v: Any) -> Any:
            return fn(q, k, v, **converted)

        return _WRAPPERS[framework](attend, (q, k, v))

    def call(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
        outs = wrapped(q, k, v, options).value(q, k, v)
        return outs if len(outs) > 1 else outs[0]

    def pull(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> tuple[Any, Callable[[Any], Any]]:
        (out, *_), back = wrapped(q, k, v, options).pull(q, k, v)
        return out, lambda dout: back((dout,))

    supported = _abilities(fn, supports)
    return Attention(name or _name(fn), call, pull, supported, np.dtype(dtype), frozenset(bitwise))


_WRAPPERS: dict[str, Callable[[Callable[..., Any], Sequence[Any]], Function]] = {
    "minitransformer": lambda fn, inputs: problem_of(fn, inputs).function,
    "torch": lambda fn, inputs: functions.torch(fn),
    "jax": lambda fn, inputs: functions.jax(fn),
    "autograd": lambda fn, inputs: functions.autograd(fn),
    "mygrad": lambda fn, inputs: functions.mygrad(fn),
}


def ours(backend: str | None = None, *, dtype: npt.DTypeLike = np.float64, device: str = "cpu") -> Attention:
    """`F.scaled_dot_product_attention` on `device`, served by the kernels `backend` (None: as the array decides)."""
    check_device("adapters.ours", device)

    def attend(
        q: Any, k: Any, v: Any, *, seed: int = 0, threads: int | None = None, rope_positions: Any = None, **options: Any
    ) -> Any:
        if rope_positions is not None:
            q, k = (F.apply_rope(x, positions) for x, positions in zip((q, k), rope_positions, strict=True))
        q, k, v = (moved(x) for x in (q, k, v))
        options["attn_mask"] = moved(options.get("attn_mask"))
        chosen: AbstractContextManager[Any] = nullcontext() if backend is None else use_backend(backend)
        with random.scope(seed, 0), _threads(threads, get_num_threads, set_num_threads), chosen:
            results = F.scaled_dot_product_attention(q, k, v, **options)
        if device == "cpu":
            return results
        return tuple(x.to("cpu") for x in results) if isinstance(results, tuple) else results.to("cpu")

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) and x.dtype.kind == "f" else x

    name = f"minitransformer({', '.join(filter(None, (backend, device if device != 'cpu' else None)))})"
    return attention(attend, "minitransformer", name=name, supports=ABILITIES, dtype=dtype, bitwise=_OUR_BITS)


# Our kernel treats every (row, head) by itself and in one order, and a masked key as a weight of 0.
_OUR_BITS = ("L1", "L6", "L8", "L16", "L19", "L20")


@contextmanager
def _threads(n: int | None, count: Callable[[], int], change: Callable[[int], None]) -> Iterator[None]:
    """`n` threads inside, by the functions that tell and set their number; None changes nothing."""
    if n is None:
        yield
        return
    before = count()
    change(n)
    try:
        yield
    finally:
        change(before)


def torch_sdpa(*, dtype: npt.DTypeLike = np.float64) -> Attention:
    """torch.nn.functional.scaled_dot_product_attention, on the CPU.

    Its is_causal is that of the upper left corner. It refuses is_causal beside a mask, so the two are then
    handed over as one mask.
    """
    package = require("torch", extra="peers", purpose="adapters.torch_sdpa")

    def attend(
        q: Any,
        k: Any,
        v: Any,
        *,
        seed: int = 0,
        threads: int | None = None,
        causal_align: str | None = None,
        attn_mask: Any = None,
        is_causal: bool = False,
        **options: Any,
    ) -> Any:
        if is_causal and attn_mask is not None:
            below = package.ones(q.shape[2], k.shape[2], dtype=package.bool).tril()
            is_bool = attn_mask.dtype == package.bool
            attn_mask = attn_mask & below if is_bool else attn_mask.masked_fill(~below, -package.inf)
            is_causal = False
        package.manual_seed(seed)  # inside a fork of the generator: see `functions.torch`
        with _threads(threads, package.get_num_threads, package.set_num_threads):
            sdpa = package.nn.functional.scaled_dot_product_attention
            return sdpa(q, k, v, attn_mask, is_causal=is_causal, **options)

    supports = "additive_mask attn_mask cross dropout_p enable_gqa is_causal scale threads upper_left value_width"
    name = f"torch {package.__version__} scaled_dot_product_attention"
    return attention(attend, "torch", name=name, supports=supports.split(), dtype=dtype)


def jax_sdpa(*, dtype: npt.DTypeLike = np.float32) -> Attention:
    """jax.nn.dot_product_attention on the CPU. Float32 unless told otherwise: its softmax always is."""
    package = require("jax", extra="peers", purpose="adapters.jax_sdpa")

    # Compiled as a whole: op by op, JAX needs seconds for every new shape.
    @functools.partial(package.jit, static_argnames=("need_lse", "scale", "is_causal", "local_window_size"))
    def compiled(q: Any, k: Any, v: Any, *, need_lse: bool, **options: Any) -> Any:
        swapped = (x.swapaxes(1, 2) for x in (q, k, v))
        result = package.nn.dot_product_attention(*swapped, return_residual=need_lse, **options)
        return tuple(x.swapaxes(1, 2) for x in result) if need_lse else result.swapaxes(1, 2)

    def attend(
        q: Any,
        k: Any,
        v: Any,
        *,
        attn_mask: Any = None,
        key_lengths: Any = None,
        window_size: Any = None,
        causal_align: str | None = None,
        enable_gqa: bool = False,
        need_lse: bool = False,
        **options: Any,
    ) -> Any:
        if attn_mask is not None:
            attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
            options["mask" if attn_mask.dtype == bool else "bias"] = attn_mask
        if key_lengths is not None:
            options["key_value_seq_lengths"] = key_lengths.astype(np.int32)
        if window_size is not None:
            far = q.shape[2] + k.shape[2]
            options["local_window_size"] = tuple(far if reach is None else reach for reach in window_size)
        return compiled(q, k, v, need_lse=need_lse, **options)

    supports = "additive_mask attn_mask cross enable_gqa is_causal key_lengths need_lse scale upper_left window_size"
    name = f"jax {package.__version__} dot_product_attention"
    return attention(attend, "jax", name=name, supports=supports.split(), dtype=dtype)


def as_attention(fn: Any) -> Attention:
    """What `check_laws` was given, as an `Attention`: one of them, our own function, or one on NumPy arrays."""
    if isinstance(fn, Attention):
        return fn
    if fn is F.scaled_dot_product_attention:
        return ours()
    if fn in (ours, torch_sdpa, jax_sdpa):
        return fn()
    if not callable(fn):
        problem = f"got a {type(fn).__name__}, expected an attention function"
        raise DTypeError("check_laws", problem, "Pass fn(q, k, v, **options), or an adapter: adapters.torch_sdpa()")
    return numpy_function(fn)


def _abilities(fn: Callable[..., Any], supports: Collection[str] | None) -> frozenset[str]:
    """Those given, or those that the keyword parameters of `fn` stand for; T != S and Dv != D are then presumed."""
    if supports is not None:
        return frozenset(supports)
    found = {"cross", "value_width"}
    parameters = inspect.signature(fn).parameters
    for parameter in parameters:
        found.update(_BY_PARAMETER.get(parameter, (parameter,)))
    if "seed" not in parameters:
        found.discard("dropout_p")  # without a seed nothing can be said of one call
    return frozenset(found & ABILITIES.keys())


def _converted(framework: str, option: Any) -> Any:
    if framework != "torch" or not isinstance(option, np.ndarray):
        return option
    return require("torch", extra="peers", purpose="adapters.attention").tensor(np.array(option))


def _name(fn: Any) -> str:
    fn = fn.func if isinstance(fn, functools.partial) else fn
    return getattr(fn, "__name__", type(fn).__name__)
