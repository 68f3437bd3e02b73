"""TrainConfig: every setting that makes no sense is refused by name; schedules rise and fall as told."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import ConfigError
from minitransformer.training import TrainConfig

SCHEDULES = ("cosine", "linear", "constant", "noam", "warmup_stable_decay")
COUNTS = {
    "max_steps": 0,
    "batch_size": 1,
    "warmup_steps": 0,
    "grad_accumulation_steps": 1,
    "eval_interval": 1,
    "eval_batches": 1,
    "save_interval": 1,
    "early_stopping_patience": 1,
    "shards": 1,
    "threads": 1,
}
NUMBERS = ("learning_rate", "min_learning_rate", "weight_decay", "l1", "grad_clip", "label_smoothing")

BAD: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, f"{name} is {value!r}, expected a whole number of at least {least}. Change {name}.")
        for name, least in COUNTS.items()
        for value in (least - 1, 1.0, "3", True)
    ),
    *(
        ({name: value}, f"{name} is {value!r}, expected a number of at least 0. Change {name}.")
        for name in NUMBERS
        for value in (-0.1, math.nan, math.inf, "3", None, True)
    ),
    ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected a number of at least 0 and below 1. Change label_s"),
    ({"betas": 0.9}, "betas is 0.9, expected two numbers. Pass (0.9, 0.99)."),
    ({"betas": (0.9,)}, "betas is (0.9,), expected two numbers. Pass (0.9, 0.99)."),
    ({"betas": "ab"}, "betas is 'ab', expected two numbers. Pass (0.9, 0.99)."),
    ({"betas": (0.9, 1)}, "betas is 1, expected a number of at least 0 and below 1. Change betas."),
    ({"seed": -1}, "seed is -1, expected an integer from 0 to 2**64 - 1. Pass such a seed."),
    ({"seed": 2**64}, "seed is 18446744073709551616, expected an integer from 0 to 2**64 - 1. Pass such a seed."),
    ({"schedule": "cosin"}, f"schedule is 'cosin', expected one of {SCHEDULES}. Pass one of them."),
    ({"optimizer": None}, "optimizer is None, expected one of ('adamw', 'adam', 'sgd'). Pass one of them."),
    ({"out_dir": 3}, "out_dir is 3, expected a path. Name a folder."),
    ({"progress": 1}, "progress is 1, expected a bool. Pass a bool."),
    (
        {"learning_rate": 1e-5},
        "min_learning_rate 0.0001 is above learning_rate 1e-05. Lower min_learning_rate too.",
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda x: str(x)[:40])
def test_a_setting_that_makes_no_sense_is_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig(**bad)
    assert str(error.value).startswith(f"TrainConfig: {message}")


def test_a_device_need_not_be_there_before_it_is_used_but_must_have_a_name() -> None:
    assert TrainConfig(device="cuda").device == "cuda"  # as in the config of a run from another machine
    with pytest.raises(ConfigError, match=r"TrainConfig: device is 'tpu', expected one of \('auto'"):
        TrainConfig(device="tpu")


def test_a_constant_rate_may_be_below_the_least_rate_which_it_does_not_use() -> None:
    assert TrainConfig(schedule="constant", learning_rate=1e-5).learning_rate_schedule()(500) == 1e-5


def test_paths_numpy_seeds_and_lists_are_kept_as_what_json_holds() -> None:
    config = TrainConfig(out_dir=Path("runs") / "a", seed=np.int64(3), betas=[0.8, 0.9])
    assert (config.out_dir, config.seed, config.betas) == (str(Path("runs") / "a"), 3, (0.8, 0.9))
    assert TrainConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 60),
    warmup=st.integers(0, 80),
    peak=st.floats(1e-4, 1),
    share=st.floats(0, 1),
)
def test_rates_rise_through_the_warm_up_and_then_never(
    schedule: str, total: int, warmup: int, peak: float, share: float
) -> None:
    config = TrainConfig(
        schedule=schedule, max_steps=total, warmup_steps=warmup, learning_rate=peak, min_learning_rate=share * peak
    )
    rates = [config.learning_rate_schedule()(step) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-12) for rate in rates)
    top = min(warmup, total)
    assert all(b > a for a, b in pairwise(rates[:top]))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(rates[top:]))
    if warmup < total and schedule != "noam":
        assert rates[top] == pytest.approx(peak, rel=1e-12)
    if schedule != "noam" and warmup < total:
        assert min(rates[top:]) >= share * peak * (1 - 1e-12)


def test_noam_peaks_at_the_end_of_the_warm_up_and_falls_as_an_inverse_root() -> None:
    rate = TrainConfig(schedule="noam", warmup_steps=10, learning_rate=0.5).learning_rate_schedule()
    assert rate(9) == pytest.approx(0.5, rel=1e-12)
    assert rate(39) == pytest.approx(0.25, rel=1e-12)


def test_warmup_stable_decay_falls_over_the_last_fifth() -> None:
    config = TrainConfig(
        schedule="warmup_stable_decay", max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.0
    )
    rate = config.learning_rate_schedule()
    assert {rate(step) for step in range(10, 80)} == {1.0}
    assert rate(90) == pytest.approx(0.5)


def test_an_unknown_field_gives_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"^TrainConfig: has no field 'lr_rate'\. "):
        TrainConfig(lr_rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"^TrainConfig: has no field 'max_step'\. Did you mean 'max_steps'\?$"):
        TrainConfig(max_step=1)  # type: ignore[call-arg]
    assert dataclasses.replace(TrainConfig(), max_steps=7) == TrainConfig(max_steps=7)
