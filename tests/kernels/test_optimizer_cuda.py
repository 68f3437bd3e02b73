"""The optimizer's kernels for a GPU against the reference, in the simulator, which rounds as NumPy does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from on_simulator import simulated

import minitransformer as mt
from minitransformer.errors import DeviceError, DTypeError, ShapeError
from minitransformer.kernels.gpu.arrays import SimulatedArray
from minitransformer.kernels.gpu.blocks import Block
from minitransformer.kernels.optimizer import cuda, reference

gpu = simulated(cuda)
RATES = st.floats(0, 10) | st.sampled_from([0.0, 1e-3, 1e300])
SHARES = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, 0.9, 0.999])
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-310, 3e38, -1e300]


@st.composite
def arrays(draw: st.DrawFn, count: int) -> tuple[list[np.ndarray], int]:
    """`count` flat arrays of one size and dtype, with special values here and there; and a `num_decayed`."""
    size, dtype = draw(st.integers(0, 11) | st.just(70)), draw(st.sampled_from([np.float32, np.float64]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = [(random.standard_normal(size) * 10.0 ** random.integers(-9, 9, size)).astype(dtype) for _ in range(count)]
    for position in draw(st.lists(st.integers(0, size - 1), max_size=6)) if size else ():
        with np.errstate(over="ignore"):
            found[draw(st.integers(0, count - 1))][position] = draw(st.sampled_from(SPECIAL))
    return found, draw(st.integers(0, size))


def outcome(module: Any, name: str, given: list[np.ndarray], *more: Any, **options: Any) -> list[bytes]:
    """The bytes that it leaves, with every NaN the same."""
    copies = [x.copy() for x in given]
    with np.errstate(all="ignore"):
        getattr(module, name)(*copies, *more, **options)
    return [np.where(np.isnan(x), x.dtype.type(math.nan), x).tobytes() for x in copies]


@pytest.mark.parametrize("name", ["adam_step", "adamw_step"])
@given(
    arrays(4),
    RATES,
    st.tuples(SHARES, SHARES),
    st.sampled_from([1e-8, 1e-300, 1.0]),
    RATES,
    st.integers(1, 100_000),
)
def test_adam_gives_the_bits_of_the_reference(
    name: str,
    found: tuple[list[np.ndarray], int],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    step: int,
) -> None:
    options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": decay, "step": step}
    options["num_decayed"] = found[1]
    expected = outcome(reference, name, found[0], **options)
    assert outcome(gpu, name, found[0], **options) == outcome(gpu, name, found[0], **options) == expected


def test_a_decay_that_rounds_to_nothing_still_makes_nan_of_infinity() -> None:
    found = [np.array([math.inf, 1.0], np.float32) for _ in range(4)]
    options = {**ADAM, "weight_decay": 1e-60, "num_decayed": 2}
    assert outcome(gpu, "adam_step", found, **options) == outcome(reference, "adam_step", found, **options)


@pytest.mark.parametrize("with_momentum", [False, True])
@given(arrays(3), RATES, SHARES, RATES)
def test_sgd_gives_the_bits_of_the_reference(
    with_momentum: bool, found: tuple[list[np.ndarray], int], lr: float, momentum: float, decay: float
) -> None:
    options = {"lr": lr, "momentum": momentum, "weight_decay": decay, "num_decayed": found[1]}
    given_, more = (found[0], ()) if with_momentum else (found[0][:2], (None,))
    expected = outcome(reference, "sgd_step", given_, *more, **options)
    assert outcome(gpu, "sgd_step", given_, *more, **options) == expected


@given(arrays(2), RATES)
def test_l1_gives_the_bits_of_the_reference(found: tuple[list[np.ndarray], int], l1: float) -> None:
    (gradient, data), num_decayed = found
    given_ = [gradient + 0, data + 0]  # no -0, whose sum with 0 has another sign than with -0
    assert outcome(gpu, "add_l1", given_, l1, num_decayed) == outcome(reference, "add_l1", given_, l1, num_decayed)


@given(arrays(1))
def test_the_norm_is_summed_in_float64(found: tuple[list[np.ndarray], int]) -> None:
    (x,), _ = found
    norm, again = gpu.squared_norm(x), gpu.squared_norm(x)
    assert norm.dtype == np.float64 and norm.shape == () and norm.tobytes() == again.tobytes()
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(norm, reference.squared_norm(x), rtol=1e-13)


@pytest.mark.parametrize("size", [31, 32, 33, 1000])
def test_the_norm_of_several_parts(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 numbers here, and of more if that would make more than five parts."""
    monkeypatch.setattr(cuda, "_PARTS", 5)
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    assert gpu.squared_norm(x) == pytest.approx(math.fsum(x.astype(np.float64) ** 2), rel=1e-14)


def test_blocks_of_whole_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "block_for", lambda *_: Block(64, 32))
    assert gpu.squared_norm(np.arange(1000.0)) == 999 * 1000 * 1999 / 6


@given(arrays(1), st.floats(1e-6, 1e6) | st.just(math.inf))
def test_clipping_agrees_with_the_reference(found: tuple[list[np.ndarray], int], max_norm: float) -> None:
    (x,), _ = found
    ours, theirs = x.copy(), x.copy()
    with np.errstate(all="ignore"):
        norm = reference.clip_(theirs, max_norm)
    assert gpu.clip_(ours, max_norm) == pytest.approx(norm, rel=1e-13, nan_ok=True)
    kind = np.finfo(x.dtype)  # the norms are sums in another order: the factors differ by some roundings
    np.testing.assert_allclose(ours, theirs, rtol=2 * kind.eps + 1e-13, atol=2 * float(kind.smallest_subnormal))


def test_a_norm_stays_on_the_device() -> None:
    gradient = SimulatedArray(np.array([3.0, 4.0]))
    before = SimulatedArray.synchronisations
    norm = cuda.clip_(gradient, 1.0)
    assert isinstance(norm, SimulatedArray) and SimulatedArray.synchronisations == before
    assert float(norm) == 5 and gradient.host.tolist() == pytest.approx([0.6, 0.8])
    tensors = [mt.tensor(np.zeros(1), requires_grad=True).to("simulator") for _ in range(2)]
    for tensor, value in zip(tensors, (3.0, 4.0), strict=True):
        tensor.grad = SimulatedArray(np.array([value]))
    assert mt.nn.clip_grad_norm_(tensors, 1.0) == 5
    assert [float(t.grad) for t in tensors] == pytest.approx([0.6, 0.8])


ADAM = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1, "step": 1}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def test_what_does_not_fit_is_refused() -> None:
    three, two = np.ones(3), np.ones(2)
    with pytest.raises(ShapeError, match=r"kernels.adamw_step: got arrays of shapes \(3,\) and \(2,\) and"):
        gpu.adamw_step(three, two, three, three, num_decayed=0, **ADAM)
    for name, state, settings in (("adam_step", 2, ADAM), ("adamw_step", 2, ADAM), ("sgd_step", 1, SGD)):
        given_ = [np.ones(3) for _ in range(2 + state)]
        message = rf"kernels.{name}: num_decayed is 4, expected a number from 0 to 3\. Pass optimizer"
        with pytest.raises(ShapeError, match=message):
            getattr(gpu, name)(*given_, num_decayed=4, **settings)
        with pytest.raises(ShapeError, match=rf"kernels.{name}: an array to write to is float64 with strides \(16,\)"):
            getattr(gpu, name)(np.ones(6)[::2], *given_[1:], num_decayed=0, **settings)
        with pytest.raises(DeviceError, match=rf"kernels.{name}: got arrays on cpu, expected all of them on one GPU"):
            getattr(cuda, name)(*given_, num_decayed=0, **settings)
        assert all((x == 1).all() for x in given_)
    with pytest.raises(ShapeError, match=r"kernels.add_l1: num_decayed is -1"):
        gpu.add_l1(three, three, 0.1, -1)
    with pytest.raises(ShapeError, match=r"kernels.clip_: got arrays of shapes \(2, 2\), expected N"):
        gpu.clip_(np.ones((2, 2)), 1.0)
    with pytest.raises(DTypeError, match=r"kernels.squared_norm: got float16, expected float32 or float64"):
        gpu.squared_norm(np.ones(2, np.float16))


def test_a_gradient_in_any_layout_is_read() -> None:
    gradient = np.arange(5.0)
    settings: dict[str, Any] = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "num_decayed": 0}
    for layout in (np.repeat(gradient, 2)[::2], gradient[::-1].copy()[::-1]):
        data = np.ones(5)
        gpu.sgd_step(data, layout, None, **settings)
        assert data.tolist() == (1 - 0.5 * gradient).tolist() and gpu.squared_norm(layout) == 30


def test_every_kernel_has_a_name_of_its_own() -> None:
    found = list(cuda.configurations())
    assert len({name for name, _ in found}) == len({id(kernel) for _, kernel in found}) == len(found)
