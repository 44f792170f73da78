"""``growth-megatron watch``: needs no torch."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from rich.console import Console as RichConsole

from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.config.load import read_config
from growth_megatron.errors import EXIT_OK, DataError, GrowthMegatronError
from growth_megatron.train.console import LiveConsole, open_console
from growth_megatron.train.metrics import MetricsTail
from growth_megatron.train.position import Position, position_of
from growth_megatron.train.record_text import Record

_EVENTS = 10
_PAUSE_S = 0.5


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers, "watch", "growth-megatron watch runs/quickstart", "growth-megatron watch runs/quickstart --once"
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--once", action="store_true", help="show where it stands and end")


def run(options: argparse.Namespace) -> int:
    directory = Path(options.run)
    tail = MetricsTail(directory)
    _, records = tail.read()
    if not records and not (directory / "config.yaml").exists():
        raise DataError(f"{directory} is no run directory; give the run.directory of a configuration that is trained")
    position = _position(directory, records)
    if options.once:
        console = LiveConsole(RichConsole(), position)
        _tell_last(console, records)
        RichConsole().print(console.view())
        return EXIT_OK
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it
        _follow(tail, records, position)
    return EXIT_OK


def _follow(tail: MetricsTail, records: Sequence[Record], position: Position) -> None:
    """Show what comes until the run is complete."""
    console = open_console(position)
    if isinstance(console, LiveConsole):
        _tell_last(console, records)
        console.show()
    else:
        for record in records:
            console.record(record)
    shown: list[Record] = list(records)
    try:
        while not position.finished:
            time.sleep(_PAUSE_S)
            anew, records = tail.read()
            if anew:  # a resumed run: what it has of what was shown stays
                kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(shown, records, strict=False)))
                shown, records = list(records[:kept]), records[kept:]
                console.rewind(shown)
            for record in records:
                console.record(record)
            shown += records
    finally:
        console.close()


def _tell_last(console: LiveConsole, records: Sequence[Record]) -> None:
    """Tell the last events as they would have been told, and take all else."""
    events = [number for number, record in enumerate(records) if record["kind"] != "train"][-_EVENTS:]
    first = events[0] if events else len(records)
    console.rewind(records[:first])
    for record in records[first:]:
        console.take(record)


def _position(directory: Path, records: Sequence[Record]) -> Position:
    """The run's start by its configuration, or by its records where this version cannot read that."""
    try:
        return position_of(read_config(directory / "config.yaml").config)
    except GrowthMegatronError:
        steps: dict[str, int] = {}
        for record in records:
            if record["kind"] == "train":
                steps[record["stage"]] = record["stage_step"]
        return Position(steps or {"main": 0})
