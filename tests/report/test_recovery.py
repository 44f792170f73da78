"""Where a run's loss was back after a growth, in losses that are known."""

from __future__ import annotations

from typing import Any

from growth_megatron.report.recovery import Recovery, recovered_training, recovered_validation

GROWTH = {"kind": "growth", "step": 40, "validation_loss_before": 3.0}


def _train(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "consumed_tokens": 100 * step, "loss": loss}


def _validation(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "consumed_tokens": 100 * step, "validation_loss": loss}


def test_the_training_loss_is_back_when_a_mean_over_ten_records_is() -> None:
    before = [_train(step, 3.0) for step in range(1, 41)]
    after = [_train(step, 4.0) for step in range(41, 51)] + [_train(51, 2.0)]  # one lucky batch
    assert recovered_training([*before, GROWTH, *after], GROWTH) is None
    after += [_train(step, 3.0) for step in range(52, 80)]
    # the last 4.0 is of step 50, and the 2.0 makes up for one of them
    assert recovered_training([*before, GROWTH, *after], GROWTH) == Recovery(19, 1900, 3.0)


def test_the_validation_loss_is_back_at_the_first_that_is_not_above() -> None:
    records = [_train(40, 3.0), GROWTH, _validation(40, 4.0), _validation(50, 3.1), _validation(60, 3.0)]
    assert recovered_validation(records, GROWTH) == Recovery(20, 2000, 3.0)


def test_what_a_later_growth_did_is_not_the_earlier_ones_recovery() -> None:
    later = {"kind": "growth", "step": 60}
    records = [_train(40, 3.0), GROWTH, _train(50, 3.5), _train(60, 3.4), later, _train(70, 2.0)]
    assert recovered_training(records, GROWTH) is None
    assert recovered_training(records, later) == Recovery(10, 1000, 3.4)
