"""Which of several growths of one checkpoint is ahead some steps on: their losses, ranked, with what tells them apart.

Owns: the figures of a candidate from the metrics of its run, the ranking, the text.
Does not own: the runs (``commands.probe``), their configurations (``commands.probe_configs``).

Candidates are trained on the same batches, so the difference of two of them is taken batch by batch, which the spread
of the batches themselves cancels out of. Loss just after a growth says little of what follows (arXiv 2604.04281), so
the ranking is by the loss at the end, and the table has both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growth_megatron.config.tables import columns
from growth_megatron.config.units import fixed

_LAST_SHARE = 5
"""One of so many steps of a probe is averaged over at its end."""


@dataclass(frozen=True)
class Candidate:
    """What one growth came to; losses in nats per token, FLOPs those of the probe alone."""

    name: str
    model: str
    loss_at_start: float | None
    """Held-out, before the first step."""
    validation: tuple[tuple[int, float], ...]
    """Held-out loss by step of the probe, the start's left out."""
    train: tuple[float, ...]
    """Of every step of the probe."""
    flops: float

    @property
    def last(self) -> tuple[float, ...]:
        """Training losses of the probe's end."""
        return self.train[-max(1, len(self.train) // _LAST_SHARE) :]

    @property
    def score(self) -> float:
        """What is ranked: the held-out loss at the end, without validation data the mean of the last steps."""
        return self.validation[-1][1] if self.validation else statistics.fmean(self.last)

    @property
    def fall(self) -> float:
        """How far the loss fell over the second half of the probe: of held-out loss where it was seen halfway."""
        half = len(self.train) / 2
        halfway = [loss for step, loss in self.validation if step <= half]
        if halfway:
            return halfway[-1] - self.validation[-1][1]
        middle = self.train[: math.ceil(half)][-len(self.last) :]
        return statistics.fmean(middle) - statistics.fmean(self.last)


def candidate(
    name: str,
    model: str,
    records: Sequence[Mapping[str, Any]],
    start: int,
    steps: int,
    source_loss: float | None = None,
) -> Candidate | None:
    """The figures of the run with these ``records``, begun at step ``start``; None unless it was done ``steps`` on.

    A run that has gone on since still has that on record.

    Args: source_loss: held-out, of the checkpoint; one that does not grow begins with it.
    """
    until = [r for r in records if r.get("step") is not None and start <= r["step"] <= start + steps]
    train = {r["step"]: r for r in until if r["kind"] == "train" and r.get("loss") is not None}
    if not any(r["kind"] == "event" and r.get("event") == "done" and r["step"] == start + steps for r in until):
        return None
    held = {r["step"]: r["validation_loss"] for r in until if r["kind"] == "validation"}
    grown = next((r for r in until if r["kind"] == "growth"), None)
    first = train[min(train)]
    each = (train[start + steps]["flops"] - first["flops"]) / max(1, start + steps - first["step"])
    return Candidate(
        name=name,
        model=model,
        loss_at_start=source_loss if grown is None else grown.get("validation_loss_after"),
        validation=tuple((step - start, loss) for step, loss in sorted(held.items()) if step > start),
        train=tuple(train[step]["loss"] for step in sorted(train)),
        flops=each * steps,
    )


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best first; by the training loss where not all have a held-out one."""
    if all(each.validation for each in candidates):
        return sorted(candidates, key=lambda each: each.score)
    return sorted(candidates, key=lambda each: statistics.fmean(each.last))


def behind(other: Candidate, best: Candidate) -> tuple[float, float | None]:
    """How far ``other`` is behind in training loss at the end, batch by batch: mean and its standard error."""
    gaps = [one - two for one, two in zip(other.last, best.last, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
    return statistics.fmean(gaps), error


def render_ranking(order: Sequence[Candidate], loss_before: float | None) -> str:
    """The table and what may be concluded from it."""
    best, steps = order[0], len(order[0].train)
    rows = [
        ("", "candidate", "model", "held-out at start", f"after {steps} steps", "fell in 2nd half", "training",
         "behind the first", "FLOPs")
    ]  # fmt: skip
    for place, each in enumerate(order, 1):
        gap, error = behind(each, best)
        spread = "" if error is None else f" ± {error:.4f}"
        rows.append(
            (
                str(place),
                each.name,
                each.model,
                fixed(each.loss_at_start),
                fixed(each.validation[-1][1] if each.validation else None),
                f"{each.fall:.4f}",
                f"{statistics.fmean(each.last):.4f}",
                "" if each is best else f"{gap:.4f}{spread}",
                f"{each.flops:.3g}",
            )
        )
    before = "" if loss_before is None else f"; the source's held-out loss is {loss_before:.4f}"
    note = f"training: mean of the last {len(best.last)} steps, the same batches for all{before}"
    return "\n".join([*columns(rows, right=range(3, 9)), note, *conclusions(order)])


def conclusions(order: Sequence[Candidate]) -> list[str]:
    """What the ranking does not settle, one sentence each."""
    best, steps = order[0], len(order[0].train)
    found = [f"candidate {best.name} is ahead after {steps} steps"]
    for other in order[1:]:
        gap, error = behind(other, best)
        if error is not None and gap < 2 * error:
            found.append(f"{other.name} is not told apart from it by these batches (two standard errors)")
        elif other.fall - best.fall > other.score - best.score:
            found.append(
                f"{other.name} falls faster ({other.fall:.4f} against {best.fall:.4f} in the second half) and may be "
                f"ahead after as many steps again: --steps {2 * steps} would tell"
            )
    if best.loss_at_start is not None and any((e.loss_at_start or math.inf) < best.loss_at_start for e in order[1:]):
        found.append("the loss at the start would have chosen another one")
    if max(each.flops for each in order) > 1.05 * min(each.flops for each in order):
        found.append("models of different cost are compared at equal steps; the last column says what each took")
    return found
