"""Progress of a long pass over files: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0


def duration(seconds: float) -> str:
    """``h:mm:ss``, as rich prints it."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class PreparationProgress:
    """Documents, tokens, MB/s of text and the time left, judged by the bytes on disk read so far."""

    def __init__(self, total_bytes: int, stream: TextIO | None = None) -> None:
        self.documents = self.tokens = self.text_bytes = self.disk_bytes = 0
        self._total_bytes = max(1, total_bytes)
        self._stream = stream or sys.stderr
        self._start = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._bar_task = self._bar.add_task("preparing", total=self._total_bytes, figures="")

    def __enter__(self) -> PreparationProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def figures(self) -> str:
        speed = self.text_bytes / 1e6 / max(self.seconds, 1e-9)
        return f"{self.documents:,} documents, {self.tokens:,} tokens, {speed:.1f} MB/s"

    def add(self, documents: int, tokens: int, text_bytes: int, disk_bytes: int) -> None:
        self.documents += documents
        self.tokens += tokens
        self.text_bytes += text_bytes
        self.disk_bytes += disk_bytes
        if self._bar:
            self._bar.update(self._bar_task, completed=self.disk_bytes, figures=self.figures())
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            left = self.seconds * (self._total_bytes - self.disk_bytes) / max(1, self.disk_bytes)
            share = self.disk_bytes / self._total_bytes
            print(f"{share:.0%}  {self.figures()}, {duration(left)} left", file=self._stream, flush=True)
