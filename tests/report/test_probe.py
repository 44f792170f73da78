"""The ranking of candidates, from losses that are known."""

from __future__ import annotations

from typing import Any

import pytest

from growth_megatron.report.probe import Candidate, behind, candidate, conclusions, ranked, render_ranking

BATCHES = [0.3 * (-1) ** step for step in range(20)]
"""What the batches differ by, the same for all candidates: far more than the candidates do."""


def _candidate(name: str, level: float, held: tuple[tuple[int, float], ...] = (), **more: Any) -> Candidate:
    train = tuple(level + noise for noise in BATCHES)
    return Candidate(name, "4 layers x 64", more.pop("start", None), held, train, more.pop("flops", 1e9))


def test_the_held_out_loss_at_the_end_ranks_and_not_the_one_at_the_start() -> None:
    kept = _candidate("kept", 3.0, ((10, 2.95), (20, 2.94)), start=3.0)
    stacked = _candidate("stacked", 2.9, ((10, 2.95), (20, 2.90)), start=4.0)
    assert ranked([kept, stacked]) == [stacked, kept]
    text = render_ranking([stacked, kept], 3.0)
    assert "stacked is ahead after 20 steps" in text
    assert "the loss at the start would have chosen another one" in text


def test_without_held_out_losses_of_all_the_last_training_losses_rank() -> None:
    one, two = _candidate("one", 3.0, ((20, 1.0),)), _candidate("two", 2.9)
    assert ranked([one, two]) == [two, one]


def test_the_distance_is_taken_batch_by_batch() -> None:
    gap, error = behind(_candidate("b", 3.01), _candidate("a", 3.0))
    assert gap == pytest.approx(0.01)
    assert error == pytest.approx(0.0, abs=1e-9)  # the batches' own spread of 0.3 is not in it


def test_what_these_batches_do_not_tell_apart_is_said() -> None:
    best = _candidate("best", 3.0)
    noisy = Candidate(
        "noisy", "m", None, (), tuple(loss + 0.1 * (-1) ** (i // 2) for i, loss in enumerate(best.train)), 1
    )
    assert any("noisy is not told apart" in text for text in conclusions([best, noisy]))
    assert not any("told apart" in text for text in conclusions([best, _candidate("worse", 3.2)]))


def test_one_that_falls_faster_is_named_with_the_steps_that_would_tell() -> None:
    best = _candidate("best", 3.0, ((10, 3.01), (20, 3.0)))
    later = _candidate("later", 3.1, ((10, 3.3), (20, 3.05)))
    assert any("later falls faster" in text and "--steps 40" in text for text in conclusions([best, later]))
    level = _candidate("level", 3.1, ((10, 3.05), (20, 3.05)))
    assert not any("faster" in text for text in conclusions([best, level]))


def test_a_candidate_is_done_when_its_run_says_so_and_later_steps_do_not_count() -> None:
    def train(step: int) -> dict[str, Any]:
        return {"kind": "train", "step": step, "loss": float(step), "flops": 100.0 + 5 * step}

    records = [
        {"kind": "growth", "step": 10, "validation_loss_after": 9.0},
        {"kind": "validation", "step": 10, "validation_loss": 9.0},
        *map(train, (11, 12, 13, 14)),
        {"kind": "validation", "step": 12, "validation_loss": 8.0},
        {"kind": "validation", "step": 14, "validation_loss": 7.0},
    ]
    assert candidate("a", "m", records, start=10, steps=3) is None  # stopped between its last step and the end
    records.insert(-1, {"kind": "event", "event": "done", "step": 13})
    found = candidate("a", "m", records, start=10, steps=3)
    assert found == Candidate("a", "m", 9.0, ((2, 8.0),), (11.0, 12.0, 13.0), 15.0)
    assert candidate("a", "m", records, start=10, steps=5) is None
