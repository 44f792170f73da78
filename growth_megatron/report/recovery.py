"""How long a growth set a run back: where its loss was again what it had been before.

Owns: that point, in the validation losses and in the smoothed training losses.
Does not own: the records (``report.joined``), how it is told (``report.curves``, ``report.page``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_WINDOW = 10  # training records of a mean, where there are as many before the growth


@dataclass(frozen=True)
class Recovery:
    """Where the loss was back: steps and tokens since the growth, and the level (nats per token) that was reached."""

    steps: int
    tokens: int
    level: float


def recovered_validation(records: Sequence[Mapping[str, Any]], growth: Mapping[str, Any]) -> Recovery | None:
    """The first validation after ``growth`` (its record) that is not above the one before it.

    None where there was none, before the next growth. It is as coarse as ``evaluation.interval_steps``.
    """
    level = growth.get("validation_loss_before")
    if level is None:
        return None
    later = _after(records, growth, "validation", "validation_loss")
    back = next((record for record in later if record["validation_loss"] <= level), None)
    return None if back is None else Recovery(*_since(records, growth, back), level)


def recovered_training(records: Sequence[Mapping[str, Any]], growth: Mapping[str, Any]) -> Recovery | None:
    """The first training record after ``growth`` whose mean with those before it is not above the last mean before it.

    A mean is over ten records (over a quarter of those before the growth where they are fewer than forty), none of them
    from across the growth, so a single lucky batch is no recovery. None where there was none, before the next growth.
    """
    before = [r["loss"] for r in records if _is(r, "train", "loss") and r["step"] <= growth["step"]]
    width = min(_WINDOW, max(1, len(before) // 4))
    if not before:
        return None
    level = sum(before[-width:]) / width
    later = _after(records, growth, "train", "loss")
    for end in range(width, len(later) + 1):
        if sum(record["loss"] for record in later[end - width : end]) / width <= level:
            return Recovery(*_since(records, growth, later[end - 1]), level)
    return None


def _after(
    records: Sequence[Mapping[str, Any]], growth: Mapping[str, Any], kind: str, name: str
) -> list[Mapping[str, Any]]:
    """Of one kind, behind the growth and not behind the next."""
    next_step = min((r["step"] for r in records if r["kind"] == "growth" and r["step"] > growth["step"]), default=None)
    return [
        record
        for record in records
        if _is(record, kind, name)
        and record["step"] > growth["step"]
        and (next_step is None or record["step"] <= next_step)
    ]


def _is(record: Mapping[str, Any], kind: str, name: str) -> bool:
    return record["kind"] == kind and record.get(name) is not None


def _since(records: Sequence[Mapping[str, Any]], growth: Mapping[str, Any], back: Mapping[str, Any]) -> tuple[int, int]:
    at = max(
        (r["consumed_tokens"] for r in records if r.get("consumed_tokens") is not None and r["step"] <= growth["step"]),
        default=0,
    )
    return back["step"] - growth["step"], back["consumed_tokens"] - at
