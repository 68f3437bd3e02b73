"""Optimizers: steps, their errors, state that resumes bit for bit, kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.autograd import Op, Parameter
from minitransformer.errors import CheckpointError, ConfigError, DTypeError, GradientError, ShapeError
from minitransformer.kernels.optimizer import reference
from minitransformer.optim import SGD, Adam, AdamW, Optimizer

Make = Callable[[Any], Optimizer]
MAKERS = {
    "sgd": lambda params: SGD(params, 0.1, weight_decay=0.1),
    "momentum": lambda params: SGD(params, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda params: Adam(params, 0.1, weight_decay=0.1),
    "adamw": lambda params: AdamW(params, 0.1, weight_decay=0.1),
}
every_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=6)
STEPS = st.integers(0, 3)
SEEDS = st.integers(0, 2**32)

square = Op("square", lambda x: (x * x, x), lambda dout, x: (2 * x * dout,))


def parameters(shapes: list[tuple[int, ...]], seed: int = 0, dtype: Any = np.float32) -> list[Parameter]:
    random = np.random.default_rng(seed)
    return [Parameter(np.asarray(random.standard_normal(shape), dtype)) for shape in shapes]


def gradient_for(optimizer: Optimizer, seed: int) -> np.ndarray:
    data = optimizer.flat.data
    return np.random.default_rng(seed).standard_normal(data.size).astype(data.dtype)


@pytest.mark.parametrize("kind", [Adam, AdamW])
@given(seed=SEEDS, decay=st.sampled_from([0.0, 0.1]))
def test_adam_is_its_formula(kind: type[Adam], seed: int, decay: float) -> None:
    weight, bias = parameters([(2, 3), (4,)], seed, np.float64)
    lr, (beta1, beta2), eps = 0.1, (0.9, 0.99), 1e-3
    optimizer = kind([weight, bias], lr, (beta1, beta2), eps, decay)
    data, decayed = np.concatenate([weight.data.ravel(), bias.data]), np.arange(10) < 6  # biases do not decay
    first = second = np.zeros(10)
    for step in range(1, 4):
        gradient = gradient_for(optimizer, seed + step)
        optimizer.step(gradient)
        if kind is AdamW:
            data = data - lr * decay * data * decayed
        else:
            gradient = gradient + decay * data * decayed
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        data = data - lr * (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + eps)
        np.testing.assert_allclose(optimizer.flat.data, data, rtol=1e-12, atol=1e-12)


@every_optimizer
@given(shapes=SHAPES, seed=SEEDS)
def test_gathered_gradients_and_a_flat_gradient_give_the_same_bits(
    make: Make, shapes: list[tuple[int, ...]], seed: int
) -> None:
    gathering, given_flat = make(parameters(shapes)), make(parameters(shapes))
    for step in range(3):
        gradient = gradient_for(given_flat, seed + step)
        kept = gradient.copy()
        for p, view in zip(gathering.flat.params, gathering.flat.views(gradient), strict=True):
            p.grad = view.copy()
        gathering.step()
        given_flat.step(gradient)
        assert gradient.tobytes() == kept.tobytes()
    assert gathering.flat.data.tobytes() == given_flat.flat.data.tobytes()


@every_optimizer
def test_a_missing_grad_counts_as_zeros(make: Make) -> None:
    shapes: list[tuple[int, ...]] = [(2, 2), (3, 2)]
    missing, zeros = make(parameters(shapes)), make(parameters(shapes))
    for optimizer in (missing, zeros):
        optimizer.step(gradient_for(optimizer, 0))
        optimizer.flat.params[0].grad = np.ones((2, 2), np.float32)
    zeros.flat.params[1].grad = np.zeros((3, 2), np.float32)
    missing.step()
    zeros.step()
    assert missing.flat.data.tobytes() == zeros.flat.data.tobytes()


@every_optimizer
def test_only_parameters_with_two_dimensions_decay(make: Make) -> None:
    vector, matrix, number = params = parameters([(3,), (3, 3), ()])
    before = [p.data.copy() for p in params]
    optimizer = make(params)
    optimizer.step(np.zeros_like(optimizer.flat.data))
    np.testing.assert_array_equal(vector.data, before[0])
    np.testing.assert_array_equal(number.data, before[2])
    assert np.all((matrix.data - before[1]) * before[1] < 0)  # towards zero


@every_optimizer
def test_backward_after_a_step_is_refused(make: Make) -> None:
    (p,) = parameters([()])
    optimizer = make([p])
    loss = square(p)
    loss.backward()
    stale = square(p)
    optimizer.step()
    with pytest.raises(GradientError, match="square needs was written to after the forward pass"):
        stale.backward()
    optimizer.zero_grad()
    assert p.grad is None
    square(p).backward()  # a new forward pass is welcome
    assert p.grad is not None


@every_optimizer
def test_it_finds_the_minimum(make: Make) -> None:
    (p,) = parameters([()])
    optimizer = make([p])
    for step in range(300):
        optimizer.lr = 0.1 * (1 - step / 300)
        square(p).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert abs(p.item()) < 0.01


def test_a_step_without_any_gradient() -> None:
    with pytest.raises(GradientError, match=r"no parameter has a gradient\. Call loss\.backward\(\)"):
        SGD(parameters([(2,)]), 0.1).step()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_parameters_that_left_the_buffer_are_noticed(dtype: Any) -> None:
    (p,) = parameters([(2, 2)])
    optimizer = SGD([p], 0.1)
    p.rebind(p.data.astype(dtype))
    with pytest.raises(GradientError, match=rf"shape \(2, 2\) and dtype {np.dtype(dtype)} has left"):
        optimizer.step(np.ones(4, np.float32))


def test_the_newest_optimizer_owns_the_parameters() -> None:
    (p,) = parameters([(2, 2)])
    old, new = SGD([p], 0.1), SGD([p], 0.1)
    new.step(np.ones(4, np.float32))
    with pytest.raises(GradientError, match="only one for each parameter"):
        old.step(np.ones(4, np.float32))


@pytest.mark.parametrize("position", [0, 1])
def test_freezing_and_unfreezing_afterwards_is_noticed(position: int) -> None:
    params = parameters([(2,), (2,)])
    params[1].requires_grad = False
    optimizer = SGD(params, 0.1)
    params[position].requires_grad = not params[position].requires_grad
    with pytest.raises(GradientError, match="requires_grad of a parameter has changed"):
        optimizer.step(np.ones(2, np.float32))


@pytest.mark.parametrize(
    ("gradient", "error", "message"),
    [
        (np.ones(3, np.float32), ShapeError, r"gradient has shape \(3,\), expected \(4,\)"),
        (np.ones((2, 2), np.float32), ShapeError, r"gradient has shape \(2, 2\), expected \(4,\)"),
        (np.ones(4), DTypeError, "gradient is float64, expected float32"),
        ([1, 1, 1, 1], DTypeError, "gradient is list, expected float32"),
    ],
)
def test_flat_gradients_that_do_not_fit(gradient: Any, error: type[Exception], message: str) -> None:
    optimizer = AdamW(parameters([(2, 2)]), 0.1)
    before = optimizer.flat.data.copy()
    with pytest.raises(error, match=message):
        optimizer.step(gradient)
    assert optimizer.steps == 0
    np.testing.assert_array_equal(optimizer.flat.data, before)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (np.ones(4, np.float32), ShapeError, r"a \.grad has shape \(4,\), its parameter \(2, 2\)"),
        (np.ones((2, 2)), DTypeError, r"shape \(2, 2\) is float64, expected float32"),
    ],
)
def test_grads_that_do_not_fit(grad: np.ndarray, error: type[Exception], message: str) -> None:
    (p,) = parameters([(2, 2)])
    optimizer = SGD([p], 0.1)
    p.grad = grad
    with pytest.raises(error, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD(p, -0.1), "SGD: lr is -0.1, expected a number from 0, finite"),
        (lambda p: SGD(p, math.nan), "lr is nan"),
        (lambda p: SGD(p, True), "lr is True"),
        (lambda p: SGD(p, "fast"), "lr is 'fast'"),
        (lambda p: SGD(p, 0.1, momentum=1), "momentum is 1, expected a number from 0, below 1"),
        (lambda p: Adam(p, math.inf), "Adam: lr is inf"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), r"betas\[1\] is 1.0, expected a number from 0, below 1"),
        (lambda p: Adam(p, betas=(-0.1, 0.9)), r"betas\[0\] is -0.1"),
        (lambda p: Adam(p, betas=0.9), "betas is 0.9, expected two numbers"),
        (lambda p: AdamW(p, eps=0), "AdamW: eps is 0, expected a number above 0"),
        (lambda p: AdamW(p, eps=math.nan), "eps is nan"),
        (lambda p: AdamW(p, weight_decay=-1), "weight_decay is -1"),
    ],
)
def test_hyperparameters_that_make_no_sense(make: Make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(parameters([(2,)]))


def test_lr_is_checked_when_assigned() -> None:
    optimizer = SGD(parameters([(2,)]), 0.1)
    with pytest.raises(ConfigError, match="SGD: lr is -1"):
        optimizer.lr = -1
    assert optimizer.lr == 0.1


# ------------------------------------------------------------------------------------------------------ state


@every_optimizer
@given(shapes=SHAPES, seed=SEEDS, before=STEPS, after=STEPS)
def test_a_resumed_run_has_the_same_bits(
    make: Make, shapes: list[tuple[int, ...]], seed: int, before: int, after: int
) -> None:
    whole = make(parameters(shapes))
    for step in range(before):
        whole.lr = 0.1 / (step + 1)
        whole.step(gradient_for(whole, seed + step))
    resumed = make(parameters(shapes, seed=1))
    resumed.flat.data[...] = whole.flat.data
    arrays, numbers = whole.state()
    whole.step(gradient_for(whole, seed + before))  # what was saved must not follow
    resumed.load_state(arrays, numbers)
    resumed.step(gradient_for(whole, seed + before))
    for step in range(before + 1, before + 1 + after):
        for optimizer in (whole, resumed):
            optimizer.step(gradient_for(optimizer, seed + step))
    assert resumed.flat.data.tobytes() == whole.flat.data.tobytes()
    assert resumed.state()[1] == whole.state()[1]
    for name, array in whole.state()[0].items():
        assert resumed.state()[0][name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("arrays", "numbers", "message"),
    [
        ({"third": np.zeros(6, np.float32)}, {}, r"arrays has the names \['first', 'second', 'third'\]"),
        ({}, {"momentum": 1}, r"numbers has the names \['layout', 'lr', 'momentum', 'steps'\]"),
        ({"second": np.zeros(5, np.float32)}, {}, r"second is float32 \(5,\), expected float32 \(6,\)"),
        ({"second": np.zeros(6)}, {}, r"second is float64 \(6,\), expected float32 \(6,\)"),
        ({}, {"layout": 1}, "the state belongs to parameters of other shapes or order"),
        ({}, {"steps": -1}, "steps is -1, expected an integer from 0"),
        ({}, {"steps": 1.5}, "steps is 1.5, expected an integer from 0"),
        ({}, {"lr": math.nan}, "lr is nan"),
    ],
)
def test_states_that_do_not_fit(arrays: dict[str, Any], numbers: dict[str, Any], message: str) -> None:
    optimizer = AdamW(parameters([(2, 3)]), 0.1)
    optimizer.step(np.ones(6, np.float32))
    before = optimizer.state()
    changed_arrays = {name: array + 1 for name, array in before[0].items()}
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state({**changed_arrays, **arrays}, {**before[1], "lr": 0.2, **numbers})
    after = optimizer.state()
    assert after[1] == before[1]
    for name, array in before[0].items():
        np.testing.assert_array_equal(after[0][name], array)


def test_the_state_of_another_layout() -> None:
    with pytest.raises(CheckpointError, match="other shapes or order"):
        SGD(parameters([(2, 3)]), 0.1).load_state(*SGD(parameters([(3, 2)]), 0.1).state())


# ---------------------------------------------------------------------------------------------------- kernels


@every_optimizer
@pytest.mark.parametrize("size", [0, 1, 7, 1000])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_parts_change_no_bit(make: Make, size: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> bytes:
        optimizer = make(parameters([(size, 1), (size,)]))
        for step in range(3):
            optimizer.step(gradient_for(optimizer, step))
        return optimizer.flat.data.tobytes()

    whole = run()
    monkeypatch.setattr(reference, "CHUNK", chunk)
    assert run() == whole


@given(size=st.integers(0, 300), chunk=st.integers(1, 100), seed=SEEDS)
def test_the_squared_norm_is_summed_in_float64(size: int, chunk: int, seed: int) -> None:
    flat = (np.random.default_rng(seed).standard_normal(size) * 1e18).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CHUNK", chunk)
        total = reference.squared_norm(flat)
    assert total == pytest.approx(math.fsum(float(x) ** 2 for x in flat), rel=1e-14)


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_overflow_travels_as_a_value(make: Make, bad: float) -> None:
    optimizer = make(parameters([(3, 1)]))
    for _ in range(2):
        optimizer.step(np.array([bad, 0, 1], np.float32))  # a warning would be an error
    assert np.isfinite(optimizer.flat.data[0]) == math.isfinite(bad)
    assert np.all(np.isfinite(optimizer.flat.data[1:]))
    assert reference.squared_norm(np.array([bad], np.float64)) == pytest.approx(bad**2, nan_ok=True)


@given(num_decayed=st.integers(0, 5))
def test_l1_adds_the_sign(num_decayed: int) -> None:
    data = np.array([-2.0, 0.0, 3.0, -0.0, 5.0])
    gradient = np.ones(5)
    reference.add_l1(gradient, data, 0.25, num_decayed)
    expected = np.array([0.75, 1, 1.25, 1, 1.25])
    expected[num_decayed:] = 1
    np.testing.assert_array_equal(gradient, expected)
