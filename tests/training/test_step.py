"""The sharded step: shards add up to the whole gradient, threads change no bit, bad numbers change nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BLOCK, OPTIONS, V, gpt, token_ids, train_config

import minitransformer as mt
from minitransformer import nn, random
from minitransformer.autograd import Op, Parameter
from minitransformer.errors import NonFiniteError
from minitransformer.models import ModelOutput
from minitransformer.threads import Workers, single_threaded_blas
from minitransformer.training import StepResult, TrainStep, evaluate, make_optimizer
from minitransformer.training.step import Batch, cut

SEEDS = st.integers(0, 2**32)
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def rows_of(B: int, seed: int, ignored: float = 0.0) -> Batch:
    """A batch of B rows, of whose targets a drawn share is ignored, differently many in each row."""
    rng = np.random.default_rng(seed)
    dropped = rng.random((B, BLOCK)) < 2 * ignored * rng.random((B, 1))
    targets = np.where(dropped, -100, token_ids(B, BLOCK, seed + 1))
    return {"input_ids": token_ids(B, BLOCK, seed), "targets": targets}


def one_step(
    model: nn.Module, batches: Sequence[Batch], *, step: int = 3, **settings: Any
) -> tuple[StepResult, np.ndarray, np.ndarray]:
    """Result, gradient and parameters after one step in training mode; not clipped unless told."""
    config = train_config(**{"grad_clip": 0, **settings})
    optimizer = make_optimizer(model, config)
    model.name_call_sites()
    model.train()
    with single_threaded_blas(), Workers(config.threads or 1) as workers:
        train_step = TrainStep(model, optimizer, config, workers)
        return train_step(batches, step), train_step.gradient.copy(), optimizer.flat.data.copy()


# --- cutting and adding ----------------------------------------------------------------------------------


@given(B=st.integers(1, 20), shards=st.integers(1, 25), seed=SEEDS)
def test_shards_are_the_rows_in_order_nearly_equal_and_never_empty(B: int, shards: int, seed: int) -> None:
    batch = rows_of(B, seed)
    pieces = cut(batch, shards)
    sizes = [len(rows["input_ids"]) for _, rows in pieces]
    assert len(pieces) == min(B, shards)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert [first for first, _ in pieces] == np.cumsum([0, *sizes[:-1]]).tolist()
    for name, array in batch.items():
        np.testing.assert_array_equal(np.concatenate([rows[name] for _, rows in pieces]), array)


def whole(model: mt.GPT, batch: Batch, seed: int, step: int, **kwargs: Any) -> tuple[float, np.ndarray]:
    """Loss and flat gradient of the batch in one piece, in the order of the optimizer's buffer."""
    model.name_call_sites()
    model.train()
    parameters = sorted(model.parameters(), key=lambda p: p.ndim < 2)
    with random.scope(seed, step):
        loss = model(**batch, **kwargs).loss
        return loss.item(), np.concatenate([g.ravel() for g in mt.grad(loss, parameters)])


@pytest.mark.parametrize("chosen", OPTIONS.values(), ids=OPTIONS)
def test_shards_give_the_gradient_of_the_whole_batch_for_every_option(chosen: dict[str, Any]) -> None:
    check_shards(chosen | {"dropout": 0.3}, 6, 4, 0.3, 0.1, seed=1)


@given(
    B=st.integers(1, 9),
    shards=st.integers(1, 10),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    dropout=st.sampled_from([0.0, 0.3]),
    seed=SEEDS,
)
def test_shards_give_the_gradient_of_the_whole_batch(
    B: int, shards: int, ignored: float, smoothing: float, dropout: float, seed: int
) -> None:
    check_shards({"dropout": dropout}, B, shards, ignored, smoothing, seed)


def check_shards(chosen: dict[str, Any], B: int, shards: int, ignored: float, smoothing: float, seed: int) -> None:
    """Dropout agrees too: masks are those of the row in the whole batch, whatever the shards."""
    batch = rows_of(B, seed, ignored)
    loss, gradient = whole(gpt(**chosen), batch, seed, 3, label_smoothing=smoothing)
    result, sharded, _ = one_step(gpt(**chosen), [batch], shards=shards, label_smoothing=smoothing, seed=seed)
    np.testing.assert_allclose(sharded, gradient, **CLOSE)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert result.grad_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-11)


def test_every_dropout_site_and_row_has_a_mask_of_its_own() -> None:
    """Equal rows get different gradients of their embeddings, and so do equal layers."""
    batch = {"input_ids": np.full((4, BLOCK), 1), "targets": np.full((4, BLOCK), 2)}
    losses = {one_step(gpt(dropout=0.5), [batch], shards=s, step=t)[0].loss for s in (1, 4) for t in range(3)}
    assert len({round(loss, 9) for loss in losses}) == 3  # the step matters, the shards do not
    model = gpt(dropout=0.5)
    model.train()
    with random.scope(0, 0):
        logits = model(batch["input_ids"]).logits.data
    assert len({row.tobytes() for row in logits}) == 4


@given(seed=SEEDS, ignored=st.sampled_from([0.0, 0.6]), dropout=st.sampled_from([0.0, 0.3]), shards=st.integers(1, 5))
def test_accumulated_batches_are_one_batch_divided_by_all_targets_once(
    seed: int, ignored: float, dropout: float, shards: int
) -> None:
    batch = rows_of(12, seed, ignored)
    halves = [{name: array[rows] for name, array in batch.items()} for rows in (slice(0, 6), slice(6, 12))]
    settings = {"shards": shards, "seed": seed}
    result, gradient, _ = one_step(gpt(dropout=dropout), [batch], **settings)
    in_two, accumulated, _ = one_step(gpt(dropout=dropout), halves, **settings)
    np.testing.assert_allclose(accumulated, gradient, **CLOSE)
    assert in_two.loss == pytest.approx(result.loss, rel=1e-12)


def test_a_batch_without_targets_has_loss_and_gradient_zero() -> None:
    batch = rows_of(4, 0)
    batch["targets"][:] = -100
    result, gradient, _ = one_step(gpt(), [batch])
    assert result == (0, 0, 0)
    assert not gradient.any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shards", [1, 4, 7])
def test_threads_change_no_bit(dtype: str, dropout: float, shards: int) -> None:
    results = []
    for threads in (1, 2, 3):
        batches = [rows_of(6, 1, 0.3), rows_of(6, 2)]
        result, gradient, data = one_step(gpt(dtype, dropout=dropout), batches, shards=shards, threads=threads)
        results.append((result, gradient.tobytes(), data.tobytes()))
    assert results[0] == results[1] == results[2]


# --- what is done with the gradient ----------------------------------------------------------------------


def test_l1_adds_the_sign_of_every_weight_with_two_dimensions() -> None:
    model, batch = gpt(), rows_of(4, 0)
    start = make_optimizer(model, train_config()).flat
    data, decayed = start.data.copy(), start.num_decayed
    _, plain, _ = one_step(gpt(), [batch])
    _, with_l1, _ = one_step(gpt(), [batch], l1=0.25)
    expected = 0.25 * np.sign(data)
    expected[decayed:] = 0
    np.testing.assert_allclose(with_l1 - plain, expected, atol=1e-12)


@pytest.mark.parametrize("limit", [0.05, 1e3, 0])
def test_the_whole_gradient_is_clipped_by_its_norm(limit: float) -> None:
    (loss, norm, _), plain, _ = one_step(gpt(), [rows_of(4, 0)])
    (same_loss, same_norm, _), clipped, _ = one_step(gpt(), [rows_of(4, 0)], grad_clip=limit)
    assert (same_loss, same_norm) == (loss, norm)
    expected = plain * (limit / norm) if limit == 0.05 else plain
    np.testing.assert_allclose(clipped, expected, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_update_is_the_optimizers_at_the_rate_of_the_step(optimizer: str) -> None:
    settings = {"optimizer": optimizer, "weight_decay": 0.2, "warmup_steps": 8}
    _, gradient, data = one_step(gpt(), [rows_of(4, 0)], step=2, **settings)
    config = train_config(**settings)
    by_hand = make_optimizer(gpt(), config)
    by_hand.lr = config.learning_rate_schedule()(2)
    by_hand.step(gradient)
    assert by_hand.flat.data.tobytes() == data.tobytes()


# --- numbers that are not finite -------------------------------------------------------------------------


def refused(model: nn.Module, batch: Batch, **settings: Any) -> str:
    """The message of a step that is refused, after checking that it has changed nothing."""
    config = train_config(**settings)
    optimizer = make_optimizer(model, config)
    data, (state, numbers) = optimizer.flat.data.tobytes(), optimizer.state()
    with Workers(1) as workers, pytest.raises(NonFiniteError) as error:
        TrainStep(model, optimizer, config, workers)([batch], 6)
    assert optimizer.flat.data.tobytes() == data
    again, again_numbers = optimizer.state()
    assert again_numbers == numbers
    assert {name: array.tobytes() for name, array in again.items()} == {n: a.tobytes() for n, a in state.items()}
    return str(error.value)


ADVICE = "The last checkpoint is kept. Start again with a lower learning rate or a longer warm-up."


@pytest.mark.parametrize(("bad", "name"), [(math.nan, "nan"), (math.inf, "infinity")])
def test_a_loss_that_is_not_finite_stops_and_updates_nothing(bad: float, name: str) -> None:
    model = gpt()
    weights = model.blocks[0].ffn.up.weight.data.copy()
    weights[0, 0] = bad
    model.blocks[0].ffn.up.weight.data = weights
    message = refused(model, rows_of(4, 0))
    where = "in weight, parameter blocks.0.ffn.up.weight"
    begin = f"train: the loss is nan at step 7: linear in blocks.0.ffn.up is given {name} that no op made, {where} (x: "
    assert message.startswith(begin)
    assert message.endswith(f"; row 0 of the batch. {ADVICE}")


def op_with_gradient(value: float) -> Op:
    """sum(x), whose gradient is claimed to be `value` everywhere."""
    return Op("claims", lambda x: (x.sum(), x), lambda dout, x: (np.full_like(x, value),))


class Claims(nn.Module):
    """Two parameters, the second with a gradient as claimed."""

    def __init__(self, value: float) -> None:
        self.fine, self.bad = Parameter(np.ones((2, 2))), Parameter(np.ones((2, 3)))
        self._op = op_with_gradient(value)

    def num_targets(self, **batch: Any) -> int:
        return 1

    def forward(self, input_ids: Any) -> ModelOutput:
        return ModelOutput(loss=self.fine.sum() + self._op(self.bad))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"grad_clip": 0}, {"l1": 0.1}])
def test_a_gradient_that_is_not_finite_names_its_parameter_and_updates_nothing(
    value: float, settings: dict[str, Any]
) -> None:
    message = refused(Claims(value), {"input_ids": np.zeros((1, 1), int)}, **settings)
    assert message == (
        f"train: the gradient of bad is not finite at step 7: the backward of claims in Claims makes "
        f"{'nan' if math.isnan(value) else 'infinity'} from finite numbers (dout: float64 () from 1 to 1; x, parameter "
        f"bad: float64 (2, 3) from 1 to 1); row 0 of the batch. {ADVICE}"
    )


def test_a_gradient_whose_norm_overflows_is_told_apart() -> None:
    message = refused(Claims(1e200), {"input_ids": np.zeros((1, 1), int)})
    assert message == (
        "train: the gradient of the whole model (its norm overflows) is not finite at step 7, and no single op makes "
        f"it so: finite parts overflow in their sum. {ADVICE}"
    )


@pytest.mark.parametrize(("optimizer", "state"), [("sgd", "velocity"), ("adamw", "first: .*; second")])
def test_an_update_that_is_not_finite_names_the_parameter_and_what_went_in(optimizer: str, state: str) -> None:
    model = Claims(1e150)
    settings = {"optimizer": optimizer, "learning_rate": 1e308, "schedule": "constant", "warmup_steps": 0}
    config = train_config(**settings, betas=(0.9, 0.0), grad_clip=0)
    with Workers(1) as workers, pytest.raises(NonFiniteError) as error:
        TrainStep(model, make_optimizer(model, config), config, workers)([{"input_ids": np.zeros((1, 1), int)}], 6)
    pattern = (
        r"train: the update of step 7 makes the parameter (fine|bad) not finite \((SGD|AdamW), rate 1e\+308; "
        rf"parameter: float64 .*inf; gradient: float64 .*; {state}: float64 .*\)\. "
    )
    assert re.fullmatch(pattern + re.escape(ADVICE), str(error.value))


# --- evaluation ------------------------------------------------------------------------------------------


@given(seed=SEEDS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), threads=st.integers(1, 3))
def test_evaluation_is_the_mean_over_all_targets_in_eval_mode(seed: int, sizes: list[int], threads: int) -> None:
    batches = [rows_of(B, seed + i, 0.4) for i, B in enumerate(sizes)]
    together = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    expected = gpt()(**together).loss.item()
    model = gpt(dropout=0.5)
    model.train()
    with Workers(threads) as workers:
        assert evaluate(model, batches, workers) == pytest.approx(expected, rel=1e-12)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_restores_training_when_it_fails() -> None:
    model = gpt()
    model.train()
    with Workers(1) as workers, pytest.raises(IndexError, match="vocabulary size"):
        evaluate(model, [{"input_ids": np.array([[V]]), "targets": np.array([[0]])}], workers)
    assert model.training


def test_evaluation_of_nothing_is_zero() -> None:
    with Workers(1) as workers:
        assert evaluate(gpt(), [], workers) == 0
