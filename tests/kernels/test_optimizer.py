"""The optimizer's compiled kernels against the reference: every bit of an update, and what they refuse."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from against_reference import assembly
from hypothesis import example, given
from hypothesis import strategies as st

from minitransformer import threads
from minitransformer.errors import DTypeError, MiniTransformerError, ShapeError
from minitransformer.kernels.optimizer import cpu, reference

DTYPES = st.sampled_from([np.float32, np.float64])
SIZES = st.integers(0, 40) | st.sampled_from(
    [n + by for n in (cpu.LANES, reference.CHUNK) for by in (-1, 0, 1)]
    + [2 * reference.CHUNK + 17]
    + [cpu._CHUNK - 1, cpu._CHUNK + 1, cpu._SMALL, 2 * cpu._SMALL + 3]
)
RATES = st.floats(0, 10) | st.sampled_from([0.0, 1e-3, 1e300])
SHARES = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.9, 0.999])
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-310, 3e38, -1e300]


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = threads._num_threads
    threads.set_num_threads(3)
    yield
    threads._num_threads = before


@st.composite
def arrays(draw: st.DrawFn, count: int) -> tuple[list[np.ndarray], int]:
    """`count` flat arrays of one size and dtype, with special values here and there; and a `num_decayed`."""
    size, dtype, seed = draw(SIZES), draw(DTYPES), draw(st.integers(0, 2**32))
    random = np.random.default_rng(seed)
    found = [(random.standard_normal(size) * 10.0 ** random.integers(-9, 9, size)).astype(dtype) for _ in range(count)]
    for position in draw(st.lists(st.integers(0, size - 1), max_size=6)) if size else ():
        with np.errstate(over="ignore"):
            found[draw(st.integers(0, count - 1))][position] = draw(st.sampled_from(SPECIAL))
    num_decayed = draw(st.sampled_from([0, size, size // 2, min(1, size), max(0, size - 1)]))
    return found, num_decayed


def bits(arrays: list[np.ndarray]) -> list[bytes]:
    """The bytes, with every NaN the same: which of two NaNs goes on is the processor's choice."""
    return [np.where(np.isnan(x), x.dtype.type(math.nan), x).tobytes() for x in arrays]


def outcome(module: ModuleType, name: str, given: list[np.ndarray], *more: Any, **options: Any) -> list[bytes]:
    copies = [x.copy() for x in given]
    getattr(module, name)(*copies, *more, **options)
    return bits(copies)


@pytest.mark.parametrize("name", ["adam_step", "adamw_step"])
@given(
    given_=arrays(4),
    lr=RATES,
    betas=st.tuples(SHARES, SHARES),
    eps=st.sampled_from([1e-8, 1e-300, 1.0]),
    decay=RATES,
    step=st.integers(1, 100_000),
)
def test_adam_gives_the_bits_of_the_reference(
    name: str,
    given_: tuple[list[np.ndarray], int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    step: int,
) -> None:
    found, num_decayed = given_
    options = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "eps": eps,
        "weight_decay": decay,
        "num_decayed": num_decayed,
        "step": step,
    }
    assert outcome(cpu, name, found, **options) == outcome(reference, name, found, **options)


@pytest.mark.parametrize("with_momentum", [False, True])
@given(given_=arrays(3), lr=RATES, momentum=SHARES, decay=RATES)
def test_sgd_gives_the_bits_of_the_reference(
    with_momentum: bool, given_: tuple[list[np.ndarray], int], lr: float, momentum: float, decay: float
) -> None:
    found, num_decayed = given_
    options = {"lr": lr, "momentum": momentum, "weight_decay": decay, "num_decayed": num_decayed}
    found, more = (found, ()) if with_momentum else (found[:2], (None,))
    assert outcome(cpu, "sgd_step", found, *more, **options) == outcome(reference, "sgd_step", found, *more, **options)


@given(given_=arrays(2), l1=RATES)
@example(given_=([np.array([-0.0, 0.0]), np.array([-0.0, math.nan])], 2), l1=1.0)
def test_l1_gives_the_bits_of_the_reference(given_: tuple[list[np.ndarray], int], l1: float) -> None:
    found, num_decayed = given_
    assert outcome(cpu, "add_l1", found, l1, num_decayed) == outcome(reference, "add_l1", found, l1, num_decayed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_threads_change_no_bit(dtype: Any) -> None:
    found = [np.random.default_rng(n).standard_normal(5 * cpu._CHUNK + 77).astype(dtype) ** 2 for n in range(4)]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    results = []
    for number in (1, 2, 4, 7):
        threads.set_num_threads(number)
        bits_ = outcome(cpu, "adamw_step", found, num_decayed=2 * cpu._CHUNK + 5, **options)
        results.append((cpu.squared_norm(found[0]), bits_))
    assert all(result == results[0] for result in results)


@given(given_=arrays(1))
def test_the_norm_is_summed_in_float64(given_: tuple[list[np.ndarray], int]) -> None:
    (x,), _ = given_
    with np.errstate(all="ignore"):
        exact = math.fsum(np.square(x, dtype=np.float64)) if np.isfinite(np.square(x, dtype=np.float64)).all() else None
    norm = cpu.squared_norm(x)
    if exact is None or exact > 1e307:
        np.testing.assert_equal(norm, reference.squared_norm(x))
    else:
        assert norm == pytest.approx(exact, rel=1e-14, abs=0)


@given(given_=arrays(1), max_norm=st.floats(1e-6, 1e6) | st.just(math.inf))
def test_clipping_agrees_with_the_reference(given_: tuple[list[np.ndarray], int], max_norm: float) -> None:
    (x,), _ = given_
    ours, theirs = x.copy(), x.copy()
    assert cpu.clip_(ours, max_norm) == pytest.approx(reference.clip_(theirs, max_norm), rel=1e-13, nan_ok=True)
    kind = np.finfo(x.dtype)  # the norms are sums in another order: the factors differ by some roundings
    np.testing.assert_allclose(ours, theirs, rtol=2 * kind.eps + 1e-13, atol=2 * float(kind.smallest_subnormal))


def test_a_gradient_in_any_layout_is_read_and_not_written() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "num_decayed": 0}
    gradient = np.arange(5.0)
    expected = outcome(reference, "sgd_step", [np.ones(5), gradient], None, **options)[0]
    locked = gradient.copy()
    locked.flags.writeable = False
    odd = np.frombuffer(b"\0" + gradient.tobytes(), np.uint8)[1:].view(np.float64)  # not aligned, and locked
    for layout in (np.repeat(gradient, 2)[::2], gradient[::-1].copy()[::-1], locked, odd):
        data = np.ones(5)
        cpu.sgd_step(data, layout, None, **options)
        assert bits([data]) == [expected]
        assert cpu.squared_norm(layout) == 30
    np.testing.assert_array_equal(gradient, np.arange(5.0))


ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
LOCKED = np.ones(3)
LOCKED.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cpu.adamw_step(np.ones(3), np.ones(2), np.ones(3), np.ones(3), num_decayed=0, **ADAM),
            ShapeError,
            r"kernels.adamw_step: got arrays of shapes \(2,\) and \(3,\) and \(3,\) and \(3,\), expected flat ones of",
        ),
        (
            lambda: cpu.adam_step(np.ones(3), np.ones(3), np.ones(3), np.ones(3), num_decayed=4, **ADAM),
            ShapeError,
            "kernels.adam_step: num_decayed is 4, expected a number from 0 to 3. Pass optimizer.flat.num_decayed.",
        ),
        (lambda: cpu.add_l1(np.ones(3), np.ones(3), 0.1, -1), ShapeError, "num_decayed is -1"),
        (lambda: cpu.add_l1(LOCKED, np.ones(3), 0.1, 3), ShapeError, r"kernels.add_l1: an array to write to has strid"),
        (lambda: cpu.add_l1(np.ones(6)[::2], np.ones(3), 0.1, 3), ShapeError, r"strides \(16,\) or is locked"),
        (lambda: cpu.squared_norm(np.ones((2, 2))), ShapeError, r"shapes \(2, 2\), expected flat"),
        (lambda: cpu.squared_norm(np.ones(2, np.float16)), DTypeError, "optimizer.loops.squared_norm: got .*float16"),
        (
            lambda: cpu.add_l1(np.ones(2), np.ones(2, np.float32), 0.1, 2),
            DTypeError,
            "expected .*float32.* or .*float64",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], error: type[MiniTransformerError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def packed(dtype: str) -> dict[str, list[str]]:
    """By kernel: the arithmetic that it does on whole registers."""
    names = re.compile(r"\bv?((?:sqrt|div|mul|add|sub)p[sd])\b")
    return {
        name.removeprefix("optimizer.loops."): sorted(set(names.findall(code)))
        for name, code in assembly("optimizer", dtype)
    }


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads the names of x86 instructions")
def test_every_kernel_computes_on_whole_registers() -> None:
    assert packed("float32") == {
        "sgd": ["addps", "mulps", "subps"],
        "sgd_momentum": ["addps", "mulps", "subps"],
        "adam": ["addps", "divps", "mulps", "sqrtps", "subps"],
        "squared_norm": ["addpd", "mulpd"],
        "add_l1": ["addps", "mulps"],
    }
    assert [found[0] for found in packed("float64").values()] == 5 * ["addpd"]
