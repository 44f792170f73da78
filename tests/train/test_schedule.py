"""The learning rate is a function of the step alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from growth_megatron.config.schedule_schema import ScheduleConfig
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.schedule import learning_rate, schedule_position


def _rates(total: int, **settings: object) -> list[float]:
    schedule = ScheduleConfig(learning_rate=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(schedule, step, total) for step in range(total)]


def test_warm_up_is_linear_to_the_peak_for_every_kind() -> None:
    for kind in ("cosine", "wsd", "constant"):
        assert _rates(40, kind=kind, warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_the_minimum_at_its_end_and_stays() -> None:
    rates = _rates(100, kind="cosine", min_learning_rate=0.1, decay_steps=60)
    assert rates == sorted(rates, reverse=True)
    assert rates[30] == pytest.approx(0.55)
    assert rates[60:] == [pytest.approx(0.1)] * 40


def test_wsd_is_flat_and_falls_linearly_over_the_last_steps() -> None:
    rates = _rates(100, kind="wsd", decay_steps=20)
    assert rates[:81] == [1.0] * 81
    assert rates[90] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(0.05)
    assert _rates(100, kind="wsd")[89:91] == [1.0, 1.0]


def test_a_grown_stage_restarts_or_continues_the_schedule(growing_config: Path) -> None:
    restarted = load_config(growing_config).config
    assert schedule_position(restarted, 0, 5) == (5, 6)
    assert schedule_position(restarted, 1, 1) == (1, 4)
    continued = load_config(growing_config, ["stages.grown.growth.schedule=continue"]).config
    assert schedule_position(continued, 0, 5) == (5, 10)
    assert schedule_position(continued, 1, 1) == (7, 10)
