"""What the tests of growing stages run on each rank (``tests.ranks``): runs that die in a growth, and go on."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from growth_megatron.growth import execute
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.stages import train
from tests.checkpoint.dying_files import DyingFiles, Killed

NEVER = 10**9


def train_and_die(config: str, runs: list[list[str]], step: int, deaths: list[float]) -> dict[str, Any]:
    """Train ``runs`` (overrides), then copies of the first that die in their growths and go on, in one process.

    Args:
        step: the copies stand right after the checkpoint of this step.
        deaths: for each copy, ``RUN_N``, the share of all file operations of its growths after which it dies.

    Returns: ``codes`` of the runs; ``left`` by each death among the checkpoints.
    """
    codes = [train(load_config(config, overrides)) for overrides in runs]
    run = Path(load_config(config, runs[0]).config.run.directory)
    counting = _grow_with(DyingFiles())
    _go_on(config, _copy(run, "counted", step))
    operations = NEVER - counting.left
    left = []
    for number, share in enumerate(deaths):
        folder = _copy(run, str(number), step)
        _grow_with(DyingFiles(int(share * operations)))
        try:
            _go_on(config, folder)
        except Killed:
            left.append(sorted(path.name for path in (folder / "checkpoints").iterdir()))
        gc.collect()  # what the end of a process gives back: the engine, the run's lock
        _grow_with(DyingFiles())
        _go_on(config, folder)
    return {"codes": codes, "left": left}


def _go_on(config: str, run: Path) -> None:
    assert train(load_config(config, [f"run.directory={run}"])) == 0


def whole_and_killed(config: str, overrides: list[str], whole: str, killed: str, step: int) -> None:
    """A whole run, then a copy of it as of ``step`` whose last rank is killed in its first growth."""
    assert train(load_config(config, [*overrides, f"run.directory={whole}"])) == 0
    if int(os.environ["RANK"]) == 0:
        _copy(Path(whole), Path(killed).name.removeprefix(Path(whole).name + "_"), step)

    class KillingFiles(DyingFiles):
        def rename(self, source: Path, target: Path) -> None:
            """Called for every data file that is complete; the last rank's first one stays where it is."""
            if dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            super().rename(source, target)

    _grow_with(KillingFiles())
    train(load_config(config, [*overrides, f"run.directory={killed}"]))


def _grow_with(files: DyingFiles) -> DyingFiles:
    """Growths from now on use ``files``."""
    execute.FileOperations = lambda: files  # type: ignore[misc, assignment]
    return files


def _copy(run: Path, name: str, step: int) -> Path:
    """``run`` as it stood right after the checkpoint of ``step``, as ``run_NAME``."""
    target = run.with_name(f"{run.name}_{name}")
    shutil.copytree(run, target, symlinks=True)
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    return target
