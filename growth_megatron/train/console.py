"""How a run looks while it goes: a live view on a terminal, aligned lines elsewhere.

Owns: layout, units, remaining time.
Does not own: the records (``train.metrics``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from growth_megatron.config.units import count, duration, fixed, size

Record = Mapping[str, Any]


class Console(Protocol):
    """What is shown while a run goes."""

    def record(self, record: Record) -> None:
        """Show a record of metrics.jsonl."""
        ...

    def progress(self, step: int, stage: str) -> None:
        """A step is done that has no record."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


def open_console(stage_steps: Mapping[str, int], total_flops: float | None = None) -> Console:
    """The live view if standard output is a terminal, else lines."""
    output = RichConsole()
    position = Position(stage_steps, total_flops)
    if output.is_terminal and not output.is_dumb_terminal:
        return LiveConsole(output, position)
    return LineConsole(position)


def geometry(value: Any) -> str:
    """A model in a few words, from the mapping that a growth record carries."""
    if not isinstance(value, Mapping):
        return str(value)
    layers, hidden = value.get("num_layers"), value.get("hidden_size")
    return f"{layers} layers x {hidden}" if hidden is not None else f"{layers} layers"


class Position:
    """Where the run is, and how long it still takes."""

    def __init__(self, stage_steps: Mapping[str, int], total_flops: float | None) -> None:
        self.stage_steps = dict(stage_steps)
        self._steps_before = 0  # of the run that this one branched off, as soon as a record tells
        self.total_flops = total_flops
        self.step = 0
        self.stage = next(iter(self.stage_steps))
        self._pace = Pace()
        self._flops_pace = Pace()

    def move(self, step: int, stage: str | int) -> None:
        """Take the step and stage that the run is at."""
        name = list(self.stage_steps)[stage] if isinstance(stage, int) else stage
        if name != self.stage:  # another model, another speed
            self._pace, self._flops_pace = Pace(), Pace()
        self.step, self.stage = step, name

    def measure(self, record: Record) -> None:
        """Move to a training record, and take its FLOPs at this moment; saves and validations between two are time."""
        self.move(record["step"], record["stage"])
        now = time.monotonic()
        self._steps_before = record["step"] - record["stage_step"] - self._steps_of_earlier_stages
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
        return None if pace is None else (self.stage_length - self.stage_step) / pace

    def run_eta_s(self, record: Record) -> float | None:
        """Seconds to the end of the run: the FLOPs left at the present pace, since later models are larger."""
        if self.step - self.stage_step + self.stage_length == self.total_steps:
            return self.stage_eta_s(record)
        if self.total_flops is None or not self._flops_pace.per_s:
            return None
        return float((self.total_flops - record["flops"]) / self._flops_pace.per_s)


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


def train_values(record: Record) -> dict[str, str]:
    """What is shown of a training record, by label, in the order of display."""
    mfu = record.get("mfu")
    rate = record.get("learning_rate")
    tflops = record.get("tflops_per_s")
    return {
        "loss": fixed(record.get("loss")),
        "lr": "n/a" if rate is None else f"{rate:.2e}",
        "grad norm": fixed(record.get("grad_norm"), 3),
        "tokens/s": count(record.get("tokens_per_s")),
        "TFLOP/s per device": "n/a" if tflops is None else f"{tflops:.3g}",
        "MFU": "n/a" if mfu is None else f"{100 * mfu:.1f} %",
        "memory": size(record.get("memory_bytes")),
    }


def event_line(record: Record) -> str:
    """One line for a record of any kind but train."""
    kind = record["kind"]
    text = _EVENT_TEXTS.get(kind, _other_text)(record)
    at = "" if record.get("step") is None else f"step {record['step']}  "
    return f"{kind:<10}  {at}{text}"


def _learn_text(record: Record) -> str:
    values = [f"{label} {value}" for label, value in train_values(record).items() if value != "n/a"]
    return f"{record['stage']}  maps {record['phase_step']}/{record['phase_steps']}  {'  '.join(values)}"


def _validation_text(record: Record) -> str:
    flops = record.get("flops")
    cost = "" if flops is None else f"  after {count(record.get('consumed_tokens'))} tokens, {flops:.3g} FLOPs"
    return f"validation loss {fixed(record.get('validation_loss'))}{cost}"


def _checkpoint_text(record: Record) -> str:
    seconds, written = record.get("seconds"), record.get("bytes")
    text = f"saved {record.get('path', '')}  {size(written)} in {duration(seconds)}"
    if seconds and written:
        text += f" ({size(written / seconds)}/s)"
    blocking = record.get("blocking_seconds")
    return text if blocking is None or seconds is None or blocking > 0.9 * seconds else (
        f"{text}, training waited {duration(blocking)}"
    )  # fmt: skip


def _growth_text(record: Record) -> str:
    source, target = geometry(record.get("source_geometry")), geometry(record.get("target_geometry"))
    text = f"{record.get('operator')}: {source} -> {target}"
    before, after = record.get("validation_loss_before"), record.get("validation_loss_after")
    if before is not None or after is not None:
        text += f", validation loss {fixed(before)} -> {fixed(after)}"
    if record.get("optimizer_state"):
        text += f", optimizer state {record['optimizer_state']}"
    if record.get("seconds") is not None:  # unknown where a restart came between growth and this record
        text += f", {duration(record['seconds'])}, {size(record.get('bytes_written'))} written"
    return text


def _other_text(record: Record) -> str:
    if record.get("message"):
        return str(record["message"])
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()
                     if k not in ("kind", "step", "time"))  # fmt: skip


def _evaluation_text(record: Record) -> str:
    """The first figure of each task."""
    found = [(task, *next(iter(figures.items()))) for task, figures in record["results"].items() if figures]
    text = ", ".join(f"{task} {metric} {fixed(value)}" for task, metric, value in found)
    return f"{text}  in {duration(record.get('seconds'))}"


_EVENT_TEXTS = {
    "learn": _learn_text,
    "validation": _validation_text,
    "checkpoint": _checkpoint_text,
    "growth": _growth_text,
    "evaluation": _evaluation_text,
}

_WIDTHS = {"loss": 7, "lr": 8, "grad norm": 7, "tokens/s": 5, "TFLOP/s per device": 6, "MFU": 6, "memory": 11}


def _tell(line: str) -> None:
    """In one write: torchrun runs Python unbuffered, where print makes two and other ranks' output gets in between."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


class LineConsole(Console):
    """One aligned line a record, for logs and pipes."""

    def __init__(self, position: Position) -> None:
        self._position = position

    @override
    def record(self, record: Record) -> None:
        if record["kind"] != "train":
            _tell(event_line(record))
            return
        position = self._position
        position.measure(record)
        digits = len(str(position.total_steps))
        values = "  ".join(f"{label} {value:>{_WIDTHS[label]}}" for label, value in train_values(record).items())
        _tell(
            f"step {position.step:>{digits}}/{position.total_steps}  {position.stage} "
            f"{position.stage_step:>{digits}}/{position.stage_length}  {values}  "
            f"{_remaining(position, record)}"
        )

    @override
    def progress(self, step: int, stage: str) -> None:
        pass

    @override
    def close(self) -> None:
        pass


class LiveConsole(Console):
    """Two bars and the last figures at the bottom of the terminal; events scroll by above them."""

    def __init__(self, output: RichConsole, position: Position) -> None:
        self._output = output
        self._position = position
        self._last: Record = {}
        self._live: Live | None = None

    @override
    def record(self, record: Record) -> None:
        if record["kind"] != "train":
            self._output.print(event_line(record), highlight=False, soft_wrap=True, markup=False)
            return
        self._last = record
        self._position.measure(record)
        self.progress(record["step"], record["stage"])

    @override
    def progress(self, step: int, stage: str) -> None:
        self._position.move(step, stage)
        if self._live is None:
            self._live = Live(console=self._output, refresh_per_second=4)
            self._live.start()
        self._live.update(self._view())

    @override
    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _view(self) -> Group:
        position = self._position
        bars = Table.grid(padding=(0, 2), expand=False)
        rows = [("run", position.step, position.total_steps)]
        if len(position.stage_steps) > 1:
            rows.insert(0, (f"stage {position.stage}", position.stage_step, position.stage_length))
        for label, done, total in rows:
            bars.add_row(label, ProgressBar(total=total, completed=done, width=40), f"{done}/{total} steps",
                         f"{100 * done / total:.0f} %")  # fmt: skip
        figures = Table.grid(padding=(0, 3))
        values = train_values(self._last)
        figures.add_row(*(Text(label, style="dim") for label in values))
        figures.add_row(*(Text(value, style="bold" if label == "loss" else "") for label, value in values.items()))
        return Group(bars, Text(_remaining(position, self._last), style="dim"), figures)


def _remaining(position: Position, record: Record) -> str:
    stage, run = position.stage_eta_s(record), position.run_eta_s(record)
    if len(position.stage_steps) == 1 or (run is not None and run == stage):
        return f"ETA {duration(stage)}"
    return f"ETA stage {duration(stage)}" + ("" if run is None else f", run {duration(run)}")
