"""What a run does about signals, and where each rank writes what it has to say.

Owns: the request to stop early, the end that follows the launcher's, this rank's log file.
Does not own: agreeing on the stop (``train.engine``) and the save that follows it (``train.loop``), hangs
(``train.watchdog``).
"""

from __future__ import annotations

import ctypes
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


LAUNCHER_NOTICES_S = 5.0
"""Within this time the launcher ends the ranks that are left when one is gone."""

_PR_SET_PDEATHSIG = 1


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

    def outlive_no_launcher(self) -> None:
        """Ask for a stop when torchrun's agent dies, too: nobody else would end its ranks (prctl(2), Linux)."""
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if "TORCHELASTIC_RUN_ID" in os.environ and prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def comes_within(self, seconds: float) -> bool:
        """Whether a stop has been asked for, or is within this time."""
        deadline = time.monotonic() + seconds
        while not self.requested and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.requested

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
            text = f"{self.signal_name}: asking all ranks to save and stop after this step (again after 5 s: at once)\n"
            os.write(2, text.encode())


class _PresentStderr:
    """What standard error is at the time: a live view puts lines above itself."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


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
        console = logging.StreamHandler(_PresentStderr())
        console.setLevel(logging.WARNING)
        console.addFilter(logging.Filter("growth_megatron"))
        root.addHandler(console)
    logging.captureWarnings(True)
    faulthandler.enable(file=stream)
    return stream
