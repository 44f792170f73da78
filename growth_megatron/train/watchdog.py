"""The end of a run in which nothing moves: within a bound, with one message that names the rank that is behind.

Owns: the thread that watches this rank, the marks by which ranks see each other, the bound, the message, the end.
Does not own: what counts as moving (``train.loop``, ``train.stages``), this rank's log (``train.resilience``).

A rank that is stopped, or whose node has gone, leaves all others waiting in a collective, where no exception reaches
them. So a thread of each rank writes a mark of what the rank is doing into the store that the ranks have met at. When a
rank has not moved for its bound, the first to notice reads all marks, says which ranks do not answer or are behind, and
all of them end; the launcher ends the rest.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import IO, Any

import torch.distributed as dist

from growth_megatron.config.words import listed
from growth_megatron.errors import EXIT_FAULT
from growth_megatron.parallel import collectives
from growth_megatron.parallel.keep_alive import keep_alive

TRAINING = "training"
LONGEST_STEPS = 20
"""A step may take this many times the longest one so far."""
_LEAST_S = 300.0
_LEAST_OTHERWISE_S = 1800.0  # the first step's compilation, a save or a growth of hundreds of gigabytes
_BEATS = 10  # marks within a bound, at least
_OBSERVED_BEATS = 3  # without a new mark a rank does not answer
_STORE_TIMEOUT = timedelta(seconds=10)
_PREFIX = "growth_megatron/watchdog"


@dataclass(frozen=True)
class Mark:
    """What a rank was doing when its watchdog last wrote."""

    rank: int
    host: str
    process: int
    step: int
    doing: str
    still_s: float
    beat: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} (process {self.process} on {self.host}; last seen {self.doing}, step {self.step:,}, "
            f"not moving for {self.still_s:.0f} s)"
        )


def bound_s(timeout_s: float | None, doing: str, longest_step_s: float) -> float:
    """Seconds for which a rank may not move: what is configured, else by what it does and its longest step so far."""
    if timeout_s is not None:
        return timeout_s
    least_s = _LEAST_S if doing == TRAINING and longest_step_s else _LEAST_OTHERWISE_S
    return max(least_s, LONGEST_STEPS * longest_step_s)


def diagnosis(earlier: Sequence[Mark | None], later: Sequence[Mark | None]) -> str:
    """Which ranks are to blame, from the marks of all ranks at two moments some beats apart; None: none was written."""
    pairs = enumerate(zip(earlier, later, strict=True))
    silent = [rank for rank, (before, after) in pairs if after is None or before == after]
    if silent:
        return "no answer from " + listed([str(later[rank] or f"rank {rank}") for rank in silent])
    marks = [mark for mark in later if mark is not None]
    last = max(marks, key=lambda mark: (mark.step, mark.still_s))
    behind = [mark for mark in marks if (mark.step, mark.doing) != (last.step, last.doing)]
    if behind:
        return f"others are at {last.doing}, step {last.step:,}; behind: " + listed([str(mark) for mark in behind])
    return f"all ranks are at the same place: {last.doing}, step {last.step:,}; a collective or the hardware hangs"


class Watchdog:
    """Ends this process when it has not moved for its bound; ``alive`` says that it has."""

    def __init__(self, log: IO[str], timeout_s: float | None = None) -> None:
        self._log, self._timeout_s = log, timeout_s
        self._rank, self._ranks = collectives.rank(), collectives.world_size()
        self._moved_at, self._step, self._doing = time.monotonic(), 0, "starting"
        self._longest_step_s = 0.0
        self._beats = 0
        self._ended = threading.Event()
        self._store: Any = None
        if self._ranks > 1:
            met_at: Any = dist.distributed_c10d._get_default_store()
            self._store = met_at.clone()  # a connection of this thread
            self._store.set_timeout(_STORE_TIMEOUT)
            if port := os.environ.get("MASTER_PORT", ""):  # a node that is cut off must notice
                keep_alive(int(port))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def alive(self, doing: str = TRAINING, step: int | None = None) -> None:
        """This rank has moved, and does this from now on."""
        now = time.monotonic()
        if self._doing == TRAINING:
            self._longest_step_s = max(self._longest_step_s, now - self._moved_at)
        self._moved_at, self._doing = now, doing
        self._step = self._step if step is None else step

    def close(self) -> None:
        """Watch no more."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @property
    def _bound_s(self) -> float:
        return bound_s(self._timeout_s, self._doing, self._longest_step_s)

    def _mark(self) -> Mark:
        still_s = time.monotonic() - self._moved_at
        return Mark(self._rank, socket.gethostname(), os.getpid(), self._step, self._doing, still_s, self._beats)

    def _watch(self) -> None:
        self._pause(0.0)  # a first mark, so that a rank is known by more than its number from the start
        while not self._ended.is_set():
            answers = self._pause(self._beat_s)
            if time.monotonic() - self._moved_at > self._bound_s and not self._ended.is_set():
                self._end(self._diagnose() if answers else "the store that the ranks met at does not answer")

    @property
    def _beat_s(self) -> float:
        return min(self._bound_s / _BEATS, 10.0)

    def _pause(self, seconds: float) -> bool:
        """Wait, then write a mark; False if that failed. Time for which this process was stopped does not count."""
        # Should something hold the interpreter, which this thread needs, the log says what; other ranks end this one.
        faulthandler.dump_traceback_later(seconds + 2 * self._bound_s, file=self._log)
        before = time.monotonic()
        self._ended.wait(seconds)
        excess = time.monotonic() - before - seconds
        if excess > self._beat_s:
            self._moved_at += excess
        self._beats += 1
        if self._store is None:
            return True
        try:
            self._store.set(f"{_PREFIX}/{self._rank}", json.dumps(asdict(self._mark())))
        except RuntimeError:  # torch's DistStoreError; it may be back before the bound
            return False
        return True

    def _diagnose(self) -> str | None:
        """What is to be said; None if another rank says it."""
        if self._store is None:
            return f"this is its only rank: {self._doing}, step {self._step:,}"
        try:
            if self._store.add(f"{_PREFIX}/ending", 1) > 1:
                for _ in range(2 * _OBSERVED_BEATS):  # the first to notice still reads our marks
                    self._pause(self._beat_s)
                return None
            earlier = self._marks()
            for _ in range(_OBSERVED_BEATS):
                self._pause(self._beat_s)
            return diagnosis(earlier, self._marks())
        except RuntimeError as error:
            return f"the store that the ranks met at does not answer ({error})"

    def _marks(self) -> list[Mark | None]:
        keys = [f"{_PREFIX}/{rank}" for rank in range(self._ranks)]
        return [Mark(**json.loads(self._store.get(key))) if self._store.check([key]) else None for key in keys]

    def _end(self, said: str | None) -> None:
        faulthandler.dump_traceback(file=self._log)
        if said is not None:
            still_s = time.monotonic() - self._moved_at
            text = (
                f"growth-megatron train: nothing has moved for {still_s:.0f} s (bound: {self._bound_s:.0f} s, "
                f"run.timeout_s or {LONGEST_STEPS} times the longest step): {said}. Ending; stacks of rank "
                f"{self._rank} follow, those of the others are in {self._log.name.replace(f'_{self._rank}.', '_N.')}. "
                "Re-run the same command to resume; were the pause right, raise run.timeout_s\n"
            )
            os.write(2, text.encode())
            faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_FAULT)
