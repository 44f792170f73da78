"""Traces of some steps, one file a rank, and what the device's memory was used for.

Owns: torch's profiler around the steps of ``logging.profile_steps``, its files in RUN/profiles.
Does not own: which steps are done (``train.loop``), times that are always measured (``train.metrics``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = "profiles"
_LOG = logging.getLogger(__name__)
_MEMORY_ENTRIES = 200_000


class StepProfiler:
    """Records the steps from ``first`` to ``last`` that one stage does.

    Args:
        folder: of the files, made when there are some; a stage that ends within the range ends its files.
        rank: whose files these are.
        say: told before torch's profiler begins and ends, which takes a while and has lines of its own.
    """

    def __init__(self, folder: Path, first: int, last: int, rank: int, say: Callable[[str], None]) -> None:
        self._folder, self._rank, self._range, self._say = folder, rank, range(first, last + 1), say
        self._profile: Any = None
        self._mark: Any = None
        self._began = 0

    def begin_step(self, step: int) -> None:
        """Call before a step, which is the run's ``step``-th."""
        if step not in self._range:
            return
        if self._profile is None:
            self._start(step)
        self._mark = torch.profiler.record_function(f"step {step}")
        self._mark.__enter__()

    def end_step(self, step: int) -> str | None:
        """Call after it; says where the files are once the last step is done."""
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        return self.finish(step) if step >= self._range[-1] else None

    def finish(self, step: int) -> str | None:
        """Write what was recorded up to ``step``, if anything was, and say where it is."""
        if self._profile is None:
            return None
        profile, self._profile = self._profile, None
        steps = f"steps_{self._began:08d}_to_{step:08d}"
        trace, memory = (self._folder / f"{steps}_rank_{self._rank}.{end}" for end in ("trace.json", "memory.pickle"))
        self._say(f"writing the profile of steps {self._began} to {step}")
        profile.stop()
        written = [_written(trace, profile.export_chrome_trace)]
        if torch.cuda.is_available():
            written.append(_written(memory, torch.cuda.memory._dump_snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
        if not all(written):
            return None
        viewers = "chrome://tracing or ui.perfetto.dev"
        if torch.cuda.is_available():
            viewers += ", memory in pytorch.org/memory_viz"
        return f"steps {self._began} to {step} profiled, a file of each rank in {self._folder}: {viewers}"

    def _start(self, step: int) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_ENTRIES)
        self._say(f"profiling steps {step} to {self._range[-1]}")
        self._began = step
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profile.start()


def _written(path: Path, write: Callable[[str], object]) -> bool:
    """Whether the file is there, whole; a run does not end for want of a profile."""
    beside = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(exist_ok=True)
        write(str(beside))
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        _LOG.warning("%s was not written: %s", path, error)
        return False
    return True
