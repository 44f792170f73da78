"""Progress of long reads and writes: a bar on a terminal, a line now and then elsewhere.

Owns: bytes, rate and remaining time on standard error, so that what a command prints stays its answer.
Does not own: what is done, and how often it reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from growth_megatron.config.units import format_bytes

BytesCallback = Callable[[int, int], None]
"""Called with the bytes done so far and all of them; from any thread."""

LINE_INTERVAL_S = 10.0


@contextmanager
def bytes_progress(label: str, interval_s: float = LINE_INTERVAL_S) -> Iterator[BytesCallback]:
    """A callback ``(done, total)`` whose reports are shown under ``label`` while the context lasts.

    Off a terminal a line is printed every ``interval_s`` seconds, so that short work prints nothing.
    """
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(label, console, interval_s)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    def __init__(self, label: str, console: Console, interval_s: float) -> None:
        self._label, self._console, self._interval_s = label, console, interval_s
        self._started = self._printed = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed < self._interval_s:
            return
        self._printed = now
        elapsed = now - self._started
        share = 100 * done / total if total else 100.0
        left = f", {elapsed * (total - done) / done:.0f} s left" if done else ""
        self._console.print(
            f"{self._label}: {format_bytes(done)} of {format_bytes(total)} ({share:.0f} %), "
            f"{format_bytes(done / elapsed)}/s{left}",
            highlight=False,
            soft_wrap=True,
        )
