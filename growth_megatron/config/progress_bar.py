"""Progress of long reads and writes: a bar on a terminal, a line now and then elsewhere.

Owns: bytes, rate and remaining time on standard error, so that what a command prints stays its answer.
Does not own: what is done, and how often it reports.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from growth_megatron.config.units import format_bytes

LINE_INTERVAL_S = 10.0


class BytesCallback(Protocol):
    """Called with the bytes done so far and all of them, and further figures as text; from any thread."""

    def __call__(self, done: int, total: int, figures: str = ...) -> None:
        """``figures``: what else is known, as text."""
        ...


@contextmanager
def bytes_progress(
    label: str, interval_s: float | None = None, stream: TextIO | None = None
) -> Iterator[BytesCallback]:
    """A callback whose reports are shown under ``label`` while the context lasts.

    Off a terminal a line is printed every ``interval_s`` seconds (default: ``LINE_INTERVAL_S``), so that short work
    prints nothing. ``stream``: default standard error.
    """
    console = Console(stderr=True) if stream is None else Console(file=stream)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(label, console, LINE_INTERVAL_S if interval_s is None else interval_s)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn(binary_units=True))
    more = (TextColumn("{task.fields[figures]}"), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *more, console=console) as bar:
        task = bar.add_task(label, total=None, figures="", visible=False)  # work may have nothing to report

        def report(done: int, total: int, figures: str = "") -> None:
            bar.update(task, completed=done, total=total, figures=figures, visible=True)

        yield report


class _Lines:
    def __init__(self, label: str, console: Console, interval_s: float) -> None:
        self._label, self._console, self._interval_s = label, console, interval_s
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int, total: int, figures: str = "") -> None:
        now = time.monotonic()
        if now - self._printed < self._interval_s:
            return
        self._printed = now
        elapsed = max(now - self._started, 1e-9)
        share = 100 * done / total if total else 100.0
        left = f", {elapsed * (total - done) / done:.0f} s left" if done else ""
        self._console.print(
            f"{self._label}: {format_bytes(done)} of {format_bytes(total)} ({share:.0f} %), "
            f"{format_bytes(done / elapsed)}/s{', ' if figures else ''}{figures}{left}",
            highlight=False,
            soft_wrap=True,
        )
