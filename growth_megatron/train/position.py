"""Where a run is, from its records: step, stage, pace, remaining time, what became of the last growth.

Owns: what follows from records and a configuration. Does not own: how it looks (``train.console``).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from growth_megatron.config.lines import geometry_changes
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.units import duration
from growth_megatron.train.plan import flops_of_stages
from growth_megatron.train.record_text import Record

_LOSSES = 600


def position_of(config: RunConfig) -> Position:
    """The start of a run."""
    models = [stage.model for stage in config.stages]
    growths = {
        stage.name: words
        for source, stage in zip(models, config.stages[1:], strict=False)
        if (words := _growth_words(source, stage.model))
    }
    steps = {stage.name: stage.num_steps for stage in config.stages}
    flops = dict(zip(steps, map(float, flops_of_stages(config)), strict=True))
    return Position(steps, flops, config.logging.interval_steps, growths)


def _growth_words(source: ModelConfig, target: ModelConfig) -> str:
    changes = geometry_changes(source, target)
    if len(changes) == 1 and source.num_layers != target.num_layers:
        return f"{source.num_layers} -> {target.num_layers} layers"
    return ", ".join(changes)


class Position:
    """Where the run is, what it had last, and how long it still takes.

    Args:
        stage_steps: steps of each stage by name, in order.
        stage_flops: of each stage, for the time the run still needs; without them only the stage's is known.
        interval_steps: from one training record to the next.
        growths: by the name of a stage, what grows before it, as ``8 -> 32 layers``.
    """

    def __init__(
        self,
        stage_steps: Mapping[str, int],
        stage_flops: Mapping[str, float] = MappingProxyType({}),
        interval_steps: int = 10,
        growths: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.stage_steps = dict(stage_steps)
        self.stage_flops = stage_flops
        self.interval_steps = interval_steps
        self.growths = growths
        self._reset()

    def _reset(self) -> None:
        self._steps_before = 0  # of the run that this one branched off, as soon as a record tells
        self.step = 0
        self.stage = next(iter(self.stage_steps))
        self.finished = False
        self.last_time: float | None = None
        self._growth: Record = {}
        self._begin_stage()

    def _begin_stage(self) -> None:
        self.losses: deque[float] = deque(maxlen=_LOSSES)
        self._measure_anew()

    def _measure_anew(self) -> None:
        """For another model, or another process, of which what was measured says nothing."""
        self.last: Record = {}
        self._pace, self._flops_pace = Pace(), Pace()

    def move(self, step: int, stage: str) -> None:
        """Take the step and stage that the run is at."""
        if stage != self.stage:
            self._begin_stage()
        self.step, self.stage = step, stage
        self.stage_steps.setdefault(stage, 0)

    def _move_to(self, record: Record) -> None:
        self.move(record["step"], record.get("stage", self.stage))
        if record.get("stage_step") is not None:
            self._steps_before = record["step"] - record["stage_step"] - self._steps_of_earlier_stages

    def take(self, record: Record) -> None:
        """Take what a record of any kind says."""
        self.last_time = record.get("time")
        self.finished = record.get("event") == "done"
        if record["kind"] == "train":
            self._move_to(record)
            self._measure(record)
            self.last = record
            if record.get("loss") is not None:
                self.losses.append(record["loss"])
        elif record["kind"] == "growth":
            self._growth = record
        elif record.get("event") == "stage":
            self._move_to(record)
            self._measure_anew()  # a process that resumes within the stage keeps its losses

    def rewind(self, records: Sequence[Record]) -> None:
        """Take what a run has, which goes on from there; its pace is that of another process."""
        self._reset()
        for record in records:
            self.take(record)
        self._pace, self._flops_pace = Pace(), Pace()

    def since_growth(self, record: Record) -> str:
        """What has become of a validation loss since the last growth, or nothing."""
        loss, before = record.get("validation_loss"), self._growth.get("validation_loss_before")
        after = self._growth.get("validation_loss_after")
        if loss is None or after is None or record.get("step") == self._growth.get("step"):
            return ""
        told = f"{loss - after:+.4f} since the growth"
        return f"  ({told})" if before is None else f"  ({told}, {loss - before:+.4f} to before it)"

    def next_growth(self) -> str:
        """What grows next and when, or nothing."""
        names = list(self.stage_steps)
        following = names[names.index(self.stage) + 1 :][:1]
        left = self.stage_length - self.stage_step
        if not following or following[0] not in self.growths or left <= 0:
            return ""
        eta = self.stage_eta_s(self.last)
        about = "" if eta is None else f", about {duration(eta)}"
        return f"grows {self.growths[following[0]]} in {left:,} steps{about}"

    @property
    def first_figures(self) -> int:
        """The step of the next training record."""
        return (self.step // self.interval_steps + 1) * self.interval_steps

    def _measure(self, record: Record) -> None:
        """Take a training record's step and FLOPs at its time; saves and validations between two count as time."""
        now = record["time"] if record.get("time") is not None else time.monotonic()
        self._pace.add(now, record["step"])
        if record.get("flops") is not None:
            self._flops_pace.add(now, record["flops"])

    @property
    def total_steps(self) -> int:
        """The step at which the run ends."""
        return self._steps_before + sum(self.stage_steps.values())

    @property
    def stage_step(self) -> int:
        """Steps done of the present stage."""
        return self.step - self._steps_before - self._steps_of_earlier_stages

    @property
    def _steps_of_earlier_stages(self) -> int:
        names = list(self.stage_steps)
        return sum(self.stage_steps[name] for name in names[: names.index(self.stage)])

    @property
    def stage_length(self) -> int:
        """Steps of the present stage."""
        return self.stage_steps[self.stage]

    def stage_eta_s(self, record: Record) -> float | None:
        """Seconds to the end of the stage."""
        pace = self._pace.per_s or (1 / record["step_time_s"] if record.get("step_time_s") else None)
        return None if pace is None else max(self.stage_length - self.stage_step, 0) / pace

    def run_eta_s(self, record: Record) -> float | None:
        """Seconds to the end of the run: the FLOPs left at the present pace, since later models are larger."""
        if self.step - self.stage_step + self.stage_length == self.total_steps:
            return self.stage_eta_s(record)
        if self.stage not in self.stage_flops or not self._flops_pace.per_s:
            return None
        names = list(self.stage_steps)
        later = sum(self.stage_flops.get(name, 0.0) for name in names[names.index(self.stage) + 1 :])
        here = self.stage_flops[self.stage] * max(1 - self.stage_step / max(self.stage_length, 1), 0)
        return (here + later) / self._flops_pace.per_s


class Pace:
    """Smoothed progress per second of a growing count."""

    def __init__(self) -> None:
        self.per_s: float | None = None
        self._last: tuple[float, float] | None = None

    def add(self, now: float, value: float) -> None:
        """Take the count's value at a time, in seconds."""
        if self._last is not None and value > self._last[1] and now > self._last[0]:
            pace = (value - self._last[1]) / (now - self._last[0])
            self.per_s = pace if self.per_s is None else 0.8 * self.per_s + 0.2 * pace
        self._last = (now, value)
