"""What growth saved: runs against a baseline at equal loss.

Owns: a run's loss curves, the cost at which a loss is reached, speed-ups over seeds, the sentence that says it.
Does not own: the picture (``report.plots``), metrics (``train.metrics``).

Cost is cumulative over a run, so that of the base model counts; a run that starts from another run's checkpoint goes on
with its counters, and its curve is that run's up to there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.tables import columns
from growth_megatron.config.units import fixed
from growth_megatron.errors import DataError, GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.report.comparable import differences
from growth_megatron.report.joined import joined_records
from growth_megatron.report.plots import smooth

COSTS = {"flops": "FLOPs", "flops_6nd": "FLOPs (6 N D)", "consumed_tokens": "tokens"}
LOSSES = {"validation": "held-out loss", "train": "smoothed training loss"}
_NAMES = {"validation": "validation_loss", "train": "loss"}
_WINDOW = 25
"""A smoothed training loss is a mean over one of so many parts of the records to both sides."""


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
    grown_at: Mapping[str, float] = field(default_factory=dict)
    """By kind of cost, what had been spent when it grew last; empty if it did not."""
    stopped_at: int | None = None
    """The step, where the run is not complete."""
    config: RunConfig | None = None
    """With which it ended; None where that is not known."""


@dataclass(frozen=True)
class SpeedUp:
    """One run against one of the baseline, at the lowest loss that both reach."""

    loss: float
    run_cost: float
    baseline_cost: float
    before_growth: bool = False
    """The run was at that loss before it grew last, so its cost says nothing of that growth."""

    @property
    def value(self) -> float:
        """sp = cost of the baseline / cost of the run - 1 (arXiv 2405.15319); 0.5: the baseline needs 1.5 times it."""
        return self.baseline_cost / self.run_cost - 1


def read_run(directory: str | Path) -> Run:
    """The curves of a run directory, after those of the runs that it branched off.

    Raises: DataError where there are no metrics, or no losses in them.
    """
    path = Path(directory)
    records = joined_records(path)
    curves = {}
    for kind, name in _NAMES.items():
        found = [r for r in records if r["kind"] == kind and r.get(name) is not None and r["consumed_tokens"] > 0]
        kept = _smoothed(found) if kind == "train" else found
        if len(kept) < 2:
            continue
        costs = {
            cost: tuple(float(record[cost]) for record in kept)
            for cost in COSTS
            if all(record.get(cost) is not None for record in kept)
        }
        curves[kind] = Curve(tuple(record[name] for record in kept), costs)
    if not curves:
        raise DataError(f"{path} has fewer than two losses in its metrics; let the run go on first")
    placed = [record for record in records if record["kind"] in _NAMES and record.get("step") is not None]
    last = max(record["step"] for record in placed)
    complete = any(r["kind"] == "event" and r.get("event") == "done" and r.get("step", 0) >= last for r in records)
    return Run(path, curves, _grown_at(records, placed), None if complete else last, _config_of(path))


def _config_of(directory: Path) -> RunConfig | None:
    try:
        return load_config(directory / "config.yaml").config
    except (GrowthMegatronError, OSError):
        return None  # of another version, or gone; the losses are what counts


def _smoothed(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Training records with means of their neighbours as losses, only where there are as many on both sides.

    No mean goes across a growth, whose jump it would hide.
    """
    smoothed: list[dict[str, Any]] = []
    for stage in dict.fromkeys(record["stage"] for record in records):
        part = [record for record in records if record["stage"] == stage]
        reach = min(max(1, len(records) // _WINDOW), (len(part) - 1) // 2)
        losses = smooth([record["loss"] for record in part], reach)
        smoothed += [{**part[at], "loss": losses[at]} for at in range(reach, len(part) - reach)]
    return smoothed


def _grown_at(records: Sequence[Mapping[str, Any]], placed: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    steps = [record["step"] for record in records if record["kind"] == "growth"]
    before = [record for record in placed if steps and record["step"] <= max(steps)]
    return {cost: max(found) for cost in COSTS if (found := [r[cost] for r in before if r.get(cost) is not None])}


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


def speed_up(run: Run, baseline: Run, loss: str, cost: str) -> SpeedUp:
    """``run`` against ``baseline`` at the lowest ``loss`` that both reach, so that nothing is extrapolated."""
    own, other = run.curves[loss], baseline.curves[loss]
    level = max(own.best, other.best)
    spent = cost_of(own, cost, level)
    return SpeedUp(level, spent, cost_of(other, cost, level), spent <= run.grown_at.get(cost, 0.0))


def speed_ups(runs: Sequence[Run], baseline: Sequence[Run], loss: str, cost: str) -> list[SpeedUp]:
    """Of each run against the baseline's of the same place in its list, else against each of them."""
    same = len(runs) == len(baseline)
    pairs = zip(runs, baseline, strict=True) if same else ((run, other) for run in runs for other in baseline)
    return [
        speed_up(run, other, loss, cost)
        for run, other in pairs
        if all(loss in each.curves and cost in each.curves[loss].costs for each in (run, other))
    ]


def compare(groups: Mapping[str, Sequence[Run]], baseline: Sequence[Run]) -> dict[str, Any]:
    """Figures of each group of runs (seeds of one thing) against ``baseline``, as JSON-able data."""
    return {
        "baseline": [str(run.directory) for run in baseline],
        "not_complete": {
            str(run.directory): run.stopped_at
            for run in (*baseline, *(run for runs in groups.values() for run in runs))
            if run.stopped_at is not None
        },
        "differences": {name: _differences(name, runs[0], baseline[0]) for name, runs in groups.items()},
        "groups": {
            name: {
                "runs": [str(run.directory) for run in runs],
                "final": {loss: [r.curves[loss].losses[-1] for r in runs if loss in r.curves] for loss in LOSSES},
                "speed_ups": {loss: dict(_by_cost(runs, baseline, loss)) for loss in LOSSES},
            }
            for name, runs in groups.items()
        },
    }


def _differences(name: str, run: Run, other: Run) -> list[str]:
    """Of the first seeds alone: others of a group are meant to have the same settings."""
    if run.config is None or other.config is None:
        return []
    return differences(name, run.config, "the baseline", other.config)


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
    """A table, a sentence for each group, and what makes them weaker."""
    rows = [("", "runs", *LOSSES.values(), "speed-up at equal", *(f"in {name}" for name in COSTS.values()))]
    for name, group in figures["groups"].items():
        head = [name, str(len(group["runs"])), *(_spread(group["final"][loss]) for loss in LOSSES)]
        for kind in [loss for loss in LOSSES if group["speed_ups"][loss]] or ["train"]:
            found = group["speed_ups"][kind]
            ups = [_percent(found[cost]) if cost in found else "n/a" for cost in COSTS]
            rows.append((*head, LOSSES[kind], *ups))
            head = [""] * len(head)
    sentences = [sentence(name, group, len(figures["baseline"])) for name, group in figures["groups"].items()]
    sentences += [
        f"warning: {run} is not complete, its last record is of step {step:,}: its losses are not those of its end"
        for run, step in figures["not_complete"].items()
    ]
    sentences += [text for said in figures["differences"].values() for text in said]
    return "\n".join([*columns(rows, right=(1, 2, 3, 5, 6, 7)), "", *sentences])


def _kind(group: Mapping[str, Any]) -> str:
    return "validation" if group["speed_ups"]["validation"] else "train"


def sentence(name: str, group: Mapping[str, Any], baselines: int) -> str:
    """What a person may quote, with the loss it holds at; ``baselines`` is the number of the baseline's runs."""
    kind = _kind(group)
    found = group["speed_ups"][kind].get("flops")
    if found is None:
        return f"{name}: it and the baseline have no kind of loss in common with the FLOPs it took"
    pairs = found["of"]
    losses = [each["loss"] for each in pairs]
    level = f"{losses[0]:.4f}" if len(pairs) == 1 else f"{min(losses):.4f} to {max(losses):.4f}"
    share = 1 / (1 + found["mean"])
    need = "as many" if abs(share - 1) < 5e-4 else f"{1 - share:.1%} fewer" if share < 1 else f"{share - 1:.1%} more"
    than = "as" if need == "as many" else "than"
    each = f"{pairs[0]['run_cost']:.3g} against {pairs[0]['baseline_cost']:.3g}, " if len(pairs) == 1 else ""
    all_pairs = "" if len(group["runs"]) == baselines else " (each with each)"
    early = sum(pair["before_growth"] for pair in pairs)
    of_which = "" if len(pairs) == 1 else f" in {early} of {len(pairs)} pairs"
    return (
        f"{name} comes to a {LOSSES[kind]} of {level} with {need} FLOPs {than} the baseline ({each}the base's "
        f"counted): a speed-up of {_percent(found)} over {len(pairs)} pair{'s' if len(pairs) > 1 else ''} of "
        f"runs{all_pairs}"
        + (f"; it was there before it grew{of_which}, so that says nothing of the growth" if early else "")
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return fixed(statistics.fmean(values)) + spread


def _percent(found: Mapping[str, Any]) -> str:
    spread = "" if found["deviation"] is None else f" ({found['least']:+.1%} to {found['most']:+.1%})"
    return f"{found['mean']:+.1%}{spread}"
