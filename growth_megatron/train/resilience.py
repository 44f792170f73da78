"""What a run does about signals and hangs.

Owns: the request to stop early, the dump of all stacks when nothing moves, this rank's log file.
Does not own: agreeing on the stop (``train.engine``) and the save that follows it (``train.loop``).
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import IO

from growth_megatron.errors import EXIT_FAULT

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_S = 5.0
"""A scheduler that signals every process of a job reaches a rank twice: directly, and through its launcher."""

HANG_TIMEOUT_S = 900


class StopRequest:
    """Set by the first of ``STOP_SIGNALS``; another one, later, ends the process at once, without saving."""

    def __init__(self, rank: int = 0) -> None:
        self._tells = rank == 0
        self._finished = False
        self._first_at = 0.0
        self.requested = False
        self.signal_name = ""

    def install(self) -> None:
        """Handle ``STOP_SIGNALS`` from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def finish(self) -> None:
        """All is saved: signals change nothing any more. torchrun's agent sends one to the rank that leaves last."""
        self._finished = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._finished:
            return
        now = time.monotonic()
        if self.requested and now - self._first_at < SAME_REQUEST_S:
            return
        if self.requested:
            os.write(2, b"second signal: ending without saving\n")
            os._exit(EXIT_FAULT)
        self._first_at = now
        self.requested, self.signal_name = True, signal.Signals(number).name
        if self._tells:
            text = f"{self.signal_name}: saving after this step, then stopping (again, 5 s later: stop at once)\n"
            os.write(2, text.encode())


class Watchdog:
    """Writes the stacks of all threads to this rank's log when nothing has moved for ``HANG_TIMEOUT_S``."""

    def __init__(self, log: IO[str]) -> None:
        self._log = log

    def alive(self) -> None:
        """Something moved; the clock starts anew."""
        faulthandler.dump_traceback_later(HANG_TIMEOUT_S, repeat=True, file=self._log)

    def close(self) -> None:
        """No more dumps."""
        faulthandler.cancel_dump_traceback_later()


def open_rank_log(run_directory: Path, rank: int) -> IO[str]:
    """RUN/logs/rank_N.log, which takes this rank's warnings and, on a hang or crash, its stacks."""
    folder = run_directory / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    stream = open(folder / f"rank_{rank}.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (open as long as the process)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in root.handlers:
        old.close()
    root.handlers = [handler]
    if rank == 0:
        # People see our own warnings; those of libraries go to the file alone.
        console = logging.StreamHandler(sys.stderr)
        console.setLevel(logging.WARNING)
        console.addFilter(logging.Filter("growth_megatron"))
        root.addHandler(console)
    logging.captureWarnings(True)
    faulthandler.enable(file=stream)
    return stream
