"""What came out of one run: its final figures, from metrics.jsonl.

Owns: the summary of a run, its text.
Does not own: the loss curve's picture (``report.plots``), writing metrics (``train.metrics``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.tables import columns
from growth_megatron.config.units import count, duration, fixed, size
from growth_megatron.errors import DataError, GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.model.cost import parameter_count
from growth_megatron.report.joined import joined_records
from growth_megatron.report.plots import plot_loss
from growth_megatron.report.recovery import Recovery, recovered_training, recovered_validation
from growth_megatron.train.record_text import geometry

__all__ = ["GrowthSummary", "RunSummary", "StageSummary", "plot_loss", "render_summary", "summarise"]

Record = Mapping[str, Any]
_NEEDED = {
    "train": ("step", "stage", "stage_step", "consumed_tokens", "flops"),
    "validation": ("step", "consumed_tokens"),
    "growth": ("step",),
}


@dataclass(frozen=True)
class StageSummary:
    """One stage, as far as it got. FLOPs and tokens are the stage's own; losses in nats per token."""

    name: str
    geometry: Mapping[str, Any] | None
    steps: int
    tokens: int
    flops: float
    seconds: float
    first_loss: float | None
    last_loss: float | None
    best_validation_loss: float | None
    last_validation_loss: float | None
    tokens_per_s: float | None

    @property
    def parameters(self) -> int | None:
        """Parameters of the stage's model, where its geometry is known."""
        return None if self.geometry is None else parameter_count(ModelConfig(**self.geometry)).total


@dataclass(frozen=True)
class GrowthSummary:
    """One growth and the whole run's cost up to it."""

    step: int
    operator: str
    source: str
    target: str
    optimizer_state: str | None
    loss_before: float | None
    loss_after: float | None
    tokens: int
    flops: float
    recovered: Recovery | None = None
    """Where the training loss, smoothed, was back at what it had been before."""
    recovered_validation: Recovery | None = None


@dataclass(frozen=True)
class RunSummary:
    """Final figures of a run. ``seconds`` is time spent training, without pauses between sessions."""

    directory: Path
    steps: int
    tokens: int
    flops: float
    seconds: float
    stages: tuple[StageSummary, ...]
    growths: tuple[GrowthSummary, ...]
    final_validation_loss: float | None
    best_validation_loss: float | None
    peak_memory_bytes: float | None
    events: tuple[str, ...] = field(default=(), repr=False)
    """What went wrong on the way: numbers that were not finite."""

    @property
    def verdict(self) -> str:
        """The one line that a growing run is about."""
        if not self.growths:
            return f"validation loss {fixed(self.final_validation_loss)} at {self.flops:.3g} FLOPs"
        growth = self.growths[0]
        base, grown = growth.loss_before, self.final_validation_loss
        if base is None or grown is None:
            return "no validation loss on both sides of the growth, so nothing can be said of it; set data.validation"
        relation = "below" if grown < base else "NOT below" if grown > base else "equal to"
        return (
            f"grown model's validation loss {grown:.4f} is {relation} the base's {base:.4f}, "
            f"at {self.flops:.3g} FLOPs in all ({growth.flops:.3g} of them the base's)"
        )


def summarise(run_directory: str | Path, records: Sequence[Record] | None = None) -> RunSummary:
    """Figures of a run that is done, stopped or still going.

    Args: records: of the run after its parents' (``report.joined``); default: they are read.
    Raises:
        DataError: no metrics there, or none of a training step yet.
    """
    directory = Path(run_directory)
    records = joined_records(directory) if records is None else records
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise DataError(f"{directory} has no training step in its metrics yet; let the run go on first")
    _check_records(directory, records)
    growths = [record for record in records if record["kind"] == "growth"]
    names = list(dict.fromkeys(record["stage"] for record in train))
    geometries = _geometries(directory, train, growths)
    stages: list[StageSummary] = []
    for name in names:
        stages.append(_stage(name, geometries.get(name), records, stages))
    validation = _values(records, "validation_loss")
    return RunSummary(
        directory=directory,
        steps=sum(stage.steps for stage in stages),
        tokens=sum(stage.tokens for stage in stages),
        flops=sum(stage.flops for stage in stages),
        seconds=sum(stage.seconds for stage in stages),
        stages=tuple(stages),
        growths=tuple(_growth(record, records) for record in growths),
        final_validation_loss=validation[-1] if validation else None,
        best_validation_loss=min(validation, default=None),
        peak_memory_bytes=max(_values(train, "memory_bytes"), default=None),
        events=tuple(r["message"] for r in records if r["kind"] == "event" and r.get("event") == "non_finite"),
    )


def _check_records(directory: Path, records: Sequence[Record]) -> None:
    for record in records:
        for name in _NEEDED.get(record["kind"], ()):
            if record.get(name) is None:
                raise DataError(
                    f"{directory}: the {record['kind']} record of step {record.get('step')} has no {name}; the metrics "
                    "were damaged, remove that line"
                )


def render_summary(summary: RunSummary) -> str:
    """The summary as plain text, one table of stages and one line a growth."""
    rows = [
        ("stage", "model", "parameters", "steps", "tokens", "FLOPs", "train loss", "validation", "tokens/s", "time"),
    ]
    for stage in summary.stages:
        rows.append(
            (
                stage.name,
                "n/a" if stage.geometry is None else geometry(stage.geometry),
                count(stage.parameters),
                str(stage.steps),
                count(stage.tokens),
                f"{stage.flops:.3g}",
                f"{fixed(stage.first_loss, 3)} -> {fixed(stage.last_loss, 3)}",
                f"{fixed(stage.last_validation_loss)} (best {fixed(stage.best_validation_loss)})",
                count(stage.tokens_per_s),
                duration(stage.seconds),
            )
        )
    lines = [f"run {summary.directory}", "", *columns(rows, right=range(2, 10)), ""]
    for growth in summary.growths:
        lines.append(
            f"growth at step {growth.step} ({count(growth.tokens)} tokens): {growth.operator}, "
            f"{growth.source} -> {growth.target}, optimizer state {growth.optimizer_state}, "
            f"validation loss {fixed(growth.loss_before)} before, {fixed(growth.loss_after)} after"
            + ("" if growth.recovered is None else f"; training loss back after {growth.recovered.steps} steps")
        )
    lines.append(
        f"total: {summary.steps} steps, {count(summary.tokens)} tokens, {summary.flops:.3g} FLOPs, "
        f"{duration(summary.seconds)}, peak memory {size(summary.peak_memory_bytes)}"
    )
    lines += [f"warning: {message}" for message in summary.events]
    return "\n".join([*lines, summary.verdict])


def _stage(
    name: str, geometry_: Mapping[str, Any] | None, records: Sequence[Record], before: Sequence[StageSummary]
) -> StageSummary:
    train = [record for record in records if record["kind"] == "train" and record["stage"] == name]
    start, last_step = train[0]["step"] - train[0]["stage_step"], train[-1]["step"]
    # Validation just after a growth is at the step of the stage's start, and names its stage.
    validation = [
        record
        for record in records
        if record["kind"] == "validation" and record.get("stage", name if record["step"] > start else None) == name
        and (record["step"] <= last_step or "stage" in record)
    ]  # fmt: skip
    end = _furthest([*train, *validation])
    losses, validation_losses = _values(train, "loss"), _values(validation, "validation_loss")
    rates = sorted(_values(train, "tokens_per_s"))
    return StageSummary(
        name=name,
        geometry=geometry_,
        steps=end["step"] - start,
        tokens=end["consumed_tokens"] - sum(stage.tokens for stage in before),
        flops=end["flops"] - sum(stage.flops for stage in before),
        seconds=_busy_seconds(train),
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        best_validation_loss=min(validation_losses, default=None),
        last_validation_loss=validation_losses[-1] if validation_losses else None,
        tokens_per_s=rates[len(rates) // 2] if rates else None,
    )


def _furthest(records: Sequence[Record]) -> Record:
    """The latest record that says how far the run is; training records come only every so many steps."""
    return max((r for r in records if r.get("flops") is not None), key=lambda r: r["step"])


def _busy_seconds(train: Sequence[Record]) -> float:
    """Time of the steps; a record's step time stands for all steps since the record before it."""
    previous, total = 0, 0.0
    for record in train:
        total += (record["stage_step"] - previous) * (record.get("step_time_s") or 0.0)
        previous = record["stage_step"]
    return total


def _values(records: Sequence[Record], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _growth(record: Record, records: Sequence[Record]) -> GrowthSummary:
    step = record["step"]
    reached = _furthest([r for r in records if r["kind"] in ("train", "validation") and r["step"] <= step])
    return GrowthSummary(
        step=step,
        operator=str(record.get("operator")),
        source=geometry(record.get("source_geometry")),
        target=geometry(record.get("target_geometry")),
        optimizer_state=record.get("optimizer_state"),
        loss_before=record.get("validation_loss_before"),
        loss_after=record.get("validation_loss_after"),
        tokens=reached["consumed_tokens"],
        flops=reached["flops"],
        recovered=recovered_training(records, record),
        recovered_validation=recovered_validation(records, record),
    )


def _geometries(directory: Path, train: Sequence[Record], growths: Sequence[Record]) -> dict[str, Mapping[str, Any]]:
    """Geometry of each stage: of the run's configuration, else, as of a parent's stages, of the growths beside it."""
    found: dict[str, Mapping[str, Any]] = {}
    for growth in growths:
        before = [record["stage"] for record in train if record["step"] <= growth["step"]]
        after = [record["stage"] for record in train if record["step"] > growth["step"]]
        found |= {name: growth["source_geometry"] for name in before[-1:] if name not in found}
        found |= dict.fromkeys(after[:1], growth["target_geometry"])
    try:
        config = load_config(directory / "config.yaml").config
    except (GrowthMegatronError, OSError):
        return found
    return found | {stage.name: stage.model.model_dump() for stage in config.stages}
