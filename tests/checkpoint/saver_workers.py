"""What the tests of ``checkpoint.torch_dist.saver`` run on each rank (``tests.ranks``)."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from growth_megatron.checkpoint.torch_dist import saver
from growth_megatron.checkpoint.torch_dist.saver import start_save
from growth_megatron.errors import CheckpointError
from growth_megatron.parallel import collectives
from growth_megatron.train.engine import Engine
from tests.workers import batches, fresh_engine, stage_of


def overwritten_while_it_is_saved(directory: str, layout: dict[str, Any], apart: bool = True) -> dict[str, Any]:
    """Checksums of one save, and of another whose model and optimizer are overwritten before anything is written.

    One parameter owns its whole storage, so that megatron-core would not copy it; without ``apart`` nobody does.
    """
    stage = stage_of(layout)
    gate, write = threading.Event(), saver._write_file

    def write_later(path: Path, items: Any, hurry: threading.Event) -> Any:
        gate.wait()
        return write(path, items, hurry)

    with fresh_engine(stage) as engine:
        engine.train_step(batches(0, stage), 1e-3)
        alone = next(iter(engine.models[0].parameters()))
        alone.data = alone.data.clone()
        before = start_save(_folder(directory, "before"), engine.models, engine.optimizer).finish()
        saver._write_file = write_later
        if not apart:
            saver._apart = lambda tensor, live: tensor
        save = start_save(_folder(directory, "during"), engine.models, engine.optimizer)
        _overwrite(engine)
        written = save.is_written()
        gate.set()
        during = save.finish()
    sums = [{name: entry.sha256 for name, entry in files.items()} for files in (before, during)]
    return {"before": sums[0], "during": sums[1], "written": written}


def threads_behind_a_failed_save(directory: str) -> dict[str, Any]:
    """The error of a save whose first file cannot be written, and which threads still write when it is raised."""
    write, calls = saver._write_file, []

    def fail_first(path: Path, items: Any, hurry: threading.Event) -> Any:
        calls.append(path)
        if len(calls) == 1:
            raise OSError(28, "No space left on device", str(path))
        time.sleep(1.0)
        return write(path, items, hurry)

    saver._write_file = fail_first
    with fresh_engine(stage_of({})) as engine:
        save = start_save(_folder(directory, "failed"), engine.models, engine.optimizer)
        try:
            save.finish()
            said = ""
        except (CheckpointError, OSError) as error:
            said = str(error)
        writing = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint")]
    return {"said": said, "writing": writing, "files": len(calls)}


def forks_of_saves(directory: str) -> int:
    """How often this process forked during a save."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    with fresh_engine(stage_of({})) as engine:
        start_save(_folder(directory, "saved"), engine.models, engine.optimizer).finish()
    return len(forks)


def saves_with_a_full_disk_on_rank_one(directory: str) -> list[str]:
    """What a save says on each rank when one of them cannot write, and the file names of the next save."""
    stage = stage_of({"tensor_parallel_size": 2})
    said = []
    with fresh_engine(stage) as engine:
        for name, limit in (("full", 10_000), ("room", resource.RLIM_INFINITY)):
            if dist.get_rank() == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                files = start_save(_folder(directory, name), engine.models, engine.optimizer).finish()
                said.append(" ".join(sorted(files)))
            except CheckpointError as error:
                said.append(str(error))
    return said


def train_with_a_failing_save(config: str, overrides: list[str], failing: int) -> str:
    """Train with the ``failing``-th data file of this rank refused by the disk; the exit code, or the error's text."""
    from growth_megatron.checkpoint.torch_dist import data_files
    from growth_megatron.errors import GrowthMegatronError
    from growth_megatron.growth.configuration import load_config
    from growth_megatron.train.stages import train

    write, opened = data_files.DataFile._write_out, []

    def fail(self: Any, view: memoryview) -> None:
        if self._path not in opened:
            opened.append(self._path)
        if opened.index(self._path) == failing:
            raise OSError(28, os.strerror(28))
        write(self, view)

    data_files.DataFile._write_out = fail  # type: ignore[method-assign]
    try:
        return str(train(load_config(config, overrides)))
    except GrowthMegatronError as error:
        return str(error)


def _folder(directory: str, name: str) -> Path:
    path = Path(directory) / name
    collectives.on_rank_zero(lambda: path.mkdir(parents=True))
    return path


@torch.no_grad()
def _overwrite(engine: Engine) -> None:
    for model in engine.models:
        for param in model.parameters():
            param.fill_(7.0)
    for group in engine.optimizer.param_groups:
        for param in group["params"]:
            param.fill_(7.0)
    for state in engine.optimizer.optimizer.state.values():
        for value in state.values():
            value.fill_(7.0)
