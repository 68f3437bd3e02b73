"""Learning rate schedules: their shapes, and the settings they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.errors import ConfigError
from minitransformer.optim import schedules

DECAYS = {
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "warmup_stable_decay": lambda p, m, w, t: schedules.warmup_stable_decay(p, m, w, t, t - w),
}


@pytest.mark.parametrize("make", DECAYS.values(), ids=DECAYS)
@given(peak=st.floats(1e-6, 10), ratio=st.floats(0, 1), warmup=st.integers(0, 20), decay=st.integers(0, 20))
def test_a_schedule_rises_to_the_peak_and_falls_to_the_minimum(
    make: Callable[..., schedules.Schedule], peak: float, ratio: float, warmup: int, decay: int
) -> None:
    lowest, total = ratio * peak, warmup + decay
    schedule = make(peak, lowest, warmup, total)
    rates = [schedule(step) for step in range(total + 5)]
    close = 1e-12 * peak
    for step in range(warmup):
        assert rates[step] == pytest.approx(peak * (step + 1) / (warmup + 1))
    if decay:
        assert rates[warmup] == pytest.approx(peak)
    falling = rates[warmup:]
    assert all(later <= sooner + close for sooner, later in pairwise(falling))
    assert all(lowest - close <= rate <= peak + close for rate in falling)
    assert rates[total:] == [lowest] * 5
    assert sum(falling[:decay]) == pytest.approx(  # both shapes are point-symmetric about their middle
        decay * (peak + lowest) / 2 + (peak - lowest) / 2 * (decay > 0)
    )


def test_warmup_stable_decay_stays_at_the_peak() -> None:
    schedule = schedules.warmup_stable_decay(1.0, 0.2, 3, 12, 4)
    rates = [schedule(step) for step in range(14)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 6, 0.8, 0.6, 0.4, 0.2, 0.2])


@given(warmup=st.integers(0, 20), step=st.integers(0, 100))
def test_constant(warmup: int, step: int) -> None:
    assert schedules.constant(0.5, warmup)(step) == pytest.approx(0.5 * min(1, (step + 1) / (warmup + 1)))


@given(d_model=st.integers(1, 1000), warmup=st.integers(1, 50))
def test_noam_peaks_where_its_two_branches_meet(d_model: int, warmup: int) -> None:
    schedule = schedules.noam(d_model, warmup, factor=2.0)
    rates = [schedule(step) for step in range(3 * warmup)]
    assert int(np.argmax(rates)) == warmup - 1
    assert rates[warmup - 1] == pytest.approx(2 / math.sqrt(d_model * warmup))
    assert rates[0] == pytest.approx(rates[warmup - 1] / warmup)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.constant(-1), "schedules.constant: peak is -1, expected a number from 0"),
        (lambda: schedules.constant(1, 1.5), "warmup_steps is 1.5, expected an integer from 0"),
        (lambda: schedules.linear(math.nan, 0, 0, 1), "schedules.linear: peak is nan"),
        (lambda: schedules.linear(1, 2, 0, 1), "min_lr is 2, expected at most 1, the peak"),
        (lambda: schedules.cosine(1, -1, 0, 1), "schedules.cosine: min_lr is -1"),
        (lambda: schedules.cosine(1, 0, -1, 1), "warmup_steps is -1, expected an integer from 0"),
        (lambda: schedules.cosine(1, 0, 2, 1), "warmup_steps is 2, expected at most 1, the total_steps"),
        (lambda: schedules.cosine(1, 0, 0, True), "total_steps is True"),
        (
            lambda: schedules.warmup_stable_decay(1, 0, 2, 9, 8),
            r"warmup_steps \+ decay_steps is 10, expected at most 9, the total_steps",
        ),
        (lambda: schedules.warmup_stable_decay(1, 0, 2, 9, -1), "decay_steps is -1"),
        (lambda: schedules.noam(0, 1), "schedules.noam: d_model is 0, expected an integer from 1"),
        (lambda: schedules.noam(8, 0), "warmup_steps is 0, expected an integer from 1"),
        (lambda: schedules.noam(8, 1, -1), "factor is -1"),
    ],
)
def test_schedules_that_make_no_sense(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
