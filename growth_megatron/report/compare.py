"""What growth saved: runs against a baseline at equal loss.

Owns: a run's loss curves, the cost at which a loss is reached, speed-ups over seeds, the sentence that says it.
Does not own: the picture (``report.plots``), metrics (``train.metrics``).

Cost is cumulative over a run, so that of the base model counts; a run that starts from another run's checkpoint goes on
with its counters.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_megatron.config.tables import columns
from growth_megatron.config.units import fixed
from growth_megatron.errors import DataError
from growth_megatron.report.plots import smooth
from growth_megatron.train.metrics import read_metrics

COSTS = {"flops": "FLOPs", "flops_6nd": "FLOPs (6 N D)", "consumed_tokens": "tokens"}
LOSSES = {"validation": "held-out loss", "train": "training loss, smoothed"}


@dataclass(frozen=True)
class Curve:
    """Losses of one run in nats per token, and what each had cost, by kind of cost."""

    losses: tuple[float, ...]
    costs: Mapping[str, tuple[float, ...]]

    @property
    def best(self) -> float:
        """The lowest loss."""
        return min(self.losses)


@dataclass(frozen=True)
class Run:
    """One run: its curves by kind of loss (``LOSSES``), those that it has."""

    directory: Path
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class SpeedUp:
    """One run against one of the baseline, at the lowest loss that both reach."""

    loss: float
    run_cost: float
    baseline_cost: float

    @property
    def value(self) -> float:
        """sp = cost of the baseline / cost of the run - 1 (arXiv 2405.15319); 0.5: the baseline needs 1.5 times it."""
        return self.baseline_cost / self.run_cost - 1


def read_run(directory: str | Path) -> Run:
    """The curves of a run directory.

    Raises: DataError where there are no metrics, or no losses in them.
    """
    path = Path(directory)
    records = read_metrics(path)
    curves = {}
    for kind, name in (("validation", "validation_loss"), ("train", "loss")):
        kept = [r for r in records if r["kind"] == kind and r.get(name) is not None and r["consumed_tokens"] > 0]
        if len(kept) < 2:
            continue
        losses = [record[name] for record in kept]
        if kind == "train":  # not across a growth, whose jump it would hide
            stages = dict.fromkeys(record["stage"] for record in kept)
            parts = [[r[name] for r in kept if r["stage"] == stage] for stage in stages]
            losses = [loss for part in parts for loss in smooth(part, len(kept) // 50)]
        costs = {
            cost: tuple(float(record[cost]) for record in kept)
            for cost in COSTS
            if all(record.get(cost) is not None for record in kept)
        }
        curves[kind] = Curve(tuple(losses), costs)
    if not curves:
        raise DataError(f"{path} has fewer than two losses in its metrics; let the run go on first")
    return Run(path, curves)


def cost_of(curve: Curve, cost: str, loss: float) -> float:
    """What had been spent when ``curve`` first was at ``loss``: interpolated, straight in loss and in the cost's log.

    Raises: ValueError if it never was.
    """
    previous: tuple[float, float] | None = None
    for at, here in zip(curve.losses, curve.costs[cost], strict=True):
        if at <= loss:
            if previous is None or previous[0] <= at:
                return here
            share = (previous[0] - loss) / (previous[0] - at)
            return math.exp((1 - share) * math.log(previous[1]) + share * math.log(here))
        previous = (at, here)
    raise ValueError(f"the lowest loss is {curve.best}, not {loss}")


def speed_up(run: Curve, baseline: Curve, cost: str) -> SpeedUp:
    """``run`` against ``baseline`` at the lowest loss that both reach, so that nothing is extrapolated."""
    loss = max(run.best, baseline.best)
    return SpeedUp(loss, cost_of(run, cost, loss), cost_of(baseline, cost, loss))


def speed_ups(runs: Sequence[Run], baseline: Sequence[Run], loss: str, cost: str) -> list[SpeedUp]:
    """Of each run against the baseline's of the same place in its list, else against each of them."""
    same = len(runs) == len(baseline)
    pairs = zip(runs, baseline, strict=True) if same else ((run, other) for run in runs for other in baseline)
    return [
        speed_up(run.curves[loss], other.curves[loss], cost)
        for run, other in pairs
        if all(loss in each.curves and cost in each.curves[loss].costs for each in (run, other))
    ]


def compare(groups: Mapping[str, Sequence[Run]], baseline: Sequence[Run]) -> dict[str, Any]:
    """Figures of each group of runs (seeds of one thing) against ``baseline``, as JSON-able data."""
    return {
        "baseline": [str(run.directory) for run in baseline],
        "groups": {
            name: {
                "runs": [str(run.directory) for run in runs],
                "final": {loss: [r.curves[loss].losses[-1] for r in runs if loss in r.curves] for loss in LOSSES},
                "speed_ups": {loss: dict(_by_cost(runs, baseline, loss)) for loss in LOSSES},
            }
            for name, runs in groups.items()
        },
    }


def _by_cost(runs: Sequence[Run], baseline: Sequence[Run], loss: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for cost in COSTS:
        found = speed_ups(runs, baseline, loss, cost)
        if found:
            values = [each.value for each in found]
            yield (
                cost,
                {
                    "mean": statistics.fmean(values),
                    "deviation": statistics.stdev(values) if len(values) > 1 else None,
                    "least": min(values),
                    "most": max(values),
                    "of": [vars(each) for each in found],
                },
            )


def render_comparison(figures: Mapping[str, Any]) -> str:
    """A table, and a sentence for each group."""
    rows = [("", "runs", *LOSSES.values(), *(f"speed-up in {name}" for name in COSTS.values()))]
    for name, group in figures["groups"].items():
        found = group["speed_ups"].get("validation") or group["speed_ups"]["train"]
        finals = [_spread(group["final"][loss]) for loss in LOSSES]
        ups = [_percent(found[cost]) if cost in found else "n/a" for cost in COSTS]
        rows.append((name, str(len(group["runs"])), *finals, *ups))
    sentences = [sentence(name, group) for name, group in figures["groups"].items()]
    return "\n".join([*columns(rows, right=range(1, 7)), "", *sentences])


def sentence(name: str, group: Mapping[str, Any]) -> str:
    """What a person may quote, with the loss it holds at."""
    kind = "validation" if group["speed_ups"]["validation"] else "train"
    found = group["speed_ups"][kind].get("flops")
    if found is None:
        return f"{name}: no loss that it and the baseline have in common"
    costs = [(each["run_cost"], each["baseline_cost"], each["loss"]) for each in found["of"]]
    run, baseline, loss = (statistics.fmean(values) for values in zip(*costs, strict=True))
    need = f"{1 - run / baseline:.1%} fewer" if run < baseline else f"{run / baseline - 1:.1%} more"
    return (
        f"{name} comes to a {LOSSES[kind]} of {loss:.4f} with {need} FLOPs than the baseline ({run:.3g} against "
        f"{baseline:.3g}, the base's counted): a speed-up of {_percent(found)} over {len(costs)} "
        f"pair{'s' if len(costs) > 1 else ''} of runs"
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return fixed(statistics.fmean(values)) + spread


def _percent(found: Mapping[str, Any]) -> str:
    spread = "" if found["deviation"] is None else f" ({found['least']:+.1%} to {found['most']:+.1%})"
    return f"{found['mean']:+.1%}{spread}"
