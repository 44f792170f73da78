"""How a run looks while it goes: a live view on a terminal, aligned lines elsewhere.

Owns: layout. Does not own: the records (``train.metrics``), their wording (``train.record_text``), what follows from
them (``train.position``).
"""

from __future__ import annotations

import itertools
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from growth_megatron.config.units import duration
from growth_megatron.train.position import Position
from growth_megatron.train.record_text import Record, event_line, train_values


class Console(Protocol):
    """What is shown while a run goes."""

    def record(self, record: Record) -> None:
        """Show a record of metrics.jsonl."""
        ...

    def progress(self, step: int, stage: str) -> None:
        """A step is done that has no record."""
        ...

    def rewind(self, records: Sequence[Record]) -> None:
        """The run goes on from these records, which need not be shown."""
        ...

    def phase(self, text: str) -> None:
        """Say what is begun and may take a while."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


def open_console(position: Position) -> Console:
    """The live view if standard output is a terminal, else lines."""
    output = RichConsole()
    if output.is_terminal and not output.is_dumb_terminal:
        return LiveConsole(output, position)
    return LineConsole(position)


def say_phase(text: str) -> None:
    """What ``Console.phase`` says, before there is a console; of rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        _tell(_phase_line(text))


def _phase_line(text: str) -> str:
    return f"{'now':<10}  {text} ..."


def _line(record: Record, position: Position) -> str:
    """The line of a record of any kind but train, with what has become of its loss since the growth."""
    line = event_line(record)
    return line + position.since_growth(record) if record["kind"] == "validation" else line


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
        position = self._position
        position.take(record)
        if record["kind"] != "train":
            _tell(_line(record, position))
            return
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
    def rewind(self, records: Sequence[Record]) -> None:
        self._position.rewind(records)

    @override
    def phase(self, text: str) -> None:
        _tell(_phase_line(text))

    @override
    def close(self) -> None:
        pass


class LiveConsole(Console):
    """Two bars, the last figures and the course of the loss at the bottom of the terminal; events scroll by above."""

    def __init__(self, output: RichConsole, position: Position) -> None:
        self._output = output
        self._position = position
        self._live: Live | None = None

    @override
    def record(self, record: Record) -> None:
        self.take(record)
        if record["kind"] == "train" or record.get("event") == "stage":
            self.show()

    @override
    def progress(self, step: int, stage: str) -> None:
        self._position.move(step, stage)
        self.show()

    @override
    def rewind(self, records: Sequence[Record]) -> None:
        self._position.rewind(records)

    @override
    def phase(self, text: str) -> None:
        self._stop(leaves_view=False)  # what is begun may show a bar of its own
        self._print(_phase_line(text))

    @override
    def close(self) -> None:
        self._stop(leaves_view=True)

    def _stop(self, leaves_view: bool) -> None:
        if self._live is not None:
            self._live.transient = not leaves_view
            self._live.stop()
            self._live = None

    def take(self, record: Record) -> None:
        """As ``record``, without a view where there is none yet."""
        self._position.take(record)
        if record["kind"] != "train":
            self._print(_line(record, self._position))

    def show(self) -> None:
        """Show the view, which from now on follows the run's position by itself."""
        if self._live is None:
            self._live = Live(console=self._output, refresh_per_second=4, get_renderable=self.view)
            self._live.start()

    def _print(self, line: str) -> None:
        # At words, and what goes on is under the text: terminals cut anywhere. A longer path stays whole, to be copied.
        wrapped = textwrap.fill(
            line, self._output.width, subsequent_indent=" " * 12, break_on_hyphens=False, break_long_words=False
        )
        self._output.print(wrapped, highlight=False, soft_wrap=True, markup=False)

    def view(self) -> Group:
        """What the position says, in the width of the terminal."""
        position = self._position
        parts: list[RenderableType] = [self._bars(), Text(_outlook(position), style="dim")]
        if not position.last:
            if not position.finished:
                parts.append(Text(f"first figures at step {position.first_figures:,}", style="dim"))
            return Group(*parts)
        figures = Table.grid(padding=(0, 2))
        values = {label: value for label, value in train_values(position.last).items() if value != "n/a"}
        labels = {"TFLOP/s per device": "TFLOP/s/device"}
        figures.add_row(*(Text(labels.get(label, label), style="dim") for label in values))
        figures.add_row(*(Text(value, style="bold" if label == "loss" else "") for label, value in values.items()))
        parts.append(figures)
        if len(position.losses) > 1:
            parts.append(Text(_loss_line(list(position.losses), min(self._output.width, 100)), style="dim"))
        return Group(*parts)

    def _bars(self) -> Table:
        position = self._position
        rows = [("run", position.step, position.total_steps)]
        if len(position.stage_steps) > 1:
            rows.insert(0, (f"stage {position.stage}", position.stage_step, position.stage_length))
        texts = [(label, f"{done:,}/{total:,} steps", _percent(done, total)) for label, done, total in rows]
        taken = sum(max(len(row[column]) for row in texts) for column in range(3)) + 6
        width = min(40, max(4, self._output.width - taken))
        bars = Table.grid(padding=(0, 2), expand=False)
        for (label, steps, percent), (_, done, total) in zip(texts, rows, strict=True):
            bars.add_row(label, ProgressBar(total=max(total, 1), completed=done, width=width), steps, percent)
        return bars


def _percent(done: int, total: int) -> str:
    return f"{100 * done / max(total, 1):.0f} %"


def _outlook(position: Position) -> str:
    """How long it still takes, what grows then, and whether nothing is heard of the run."""
    if position.finished:
        return "run complete"
    parts = [_remaining(position, position.last) if position.last else "", position.next_growth()]
    silent_s = 0.0 if position.last_time is None else time.time() - position.last_time
    if silent_s > max(60.0, 3 * position.interval_steps * (position.last.get("step_time_s") or 0.0)):
        parts.append(f"last record {duration(silent_s)} ago")
    return "; ".join(part for part in parts if part)


def _loss_line(losses: Sequence[float], width: int) -> str:
    """``loss 5.1203 ▇▅▄▃▂▁ 4.7012``: the stage's last losses, from the first to the last of them."""
    first, last = f"loss {losses[0]:.4f} ", f" {losses[-1]:.4f}"
    return first + sparkline(losses, max(width - len(first) - len(last), 1)) + last


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as at most ``width`` bars, each the mean of its share; a tenth of them, the highest, is cut off."""
    width = min(width, len(values))
    edges = [len(values) * column // width for column in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), sorted(means)[-1 - len(means) // 10]
    scale = (high - low) or 1.0
    return "".join(_BARS[min(int((mean - low) / scale * (len(_BARS) - 1) + 0.5), len(_BARS) - 1)] for mean in means)


_BARS = "▁▂▃▄▅▆▇█"


def _remaining(position: Position, record: Record) -> str:
    stage, run = position.stage_eta_s(record), position.run_eta_s(record)
    if len(position.stage_steps) == 1 or (run is not None and run == stage):
        return f"ETA {duration(stage)}"
    return f"ETA stage {duration(stage)}" + ("" if run is None else f", run {duration(run)}")
