"""What the tests of a run's health run on each rank: real runs whose data, gradients or state go wrong on purpose."""

from __future__ import annotations

from typing import Any

import torch

from growth_megatron.data.dataset import Stream
from growth_megatron.errors import GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.engine import Engine
from growth_megatron.train.stages import train
from tests.workers import batches, fresh_engine, stage_of


def train_with_faults(config: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train each of ``runs`` (``overrides``, and what goes wrong); the exit code, or the error that ended it.

    ``nan``: samples whose loss is no number; ``random``: with labels that cannot be learned; ``unknown``: with an id
    beyond the vocabulary; ``passed_over``: [first, number] of samples that the stream does not have; ``bad_state_at``:
    step after which a moment of the last rank is infinite, once.
    """
    return [_train(config, **run) for run in runs]


def _train(config: str, overrides: list[str], **faults: Any) -> dict[str, Any]:
    read, step = Stream.__getitem__, Engine.train_step
    Stream.__getitem__ = _faulty_samples(read, **faults)  # type: ignore[method-assign]
    Engine.train_step = _faulty_step(step, faults.get("bad_state_at"))  # type: ignore[method-assign, assignment]
    try:
        return {"code": train(load_config(config, overrides)), "error": ""}
    except GrowthMegatronError as error:
        return {"code": error.exit_code, "error": str(error)}
    finally:
        Stream.__getitem__ = read  # type: ignore[method-assign]
        Engine.train_step = step  # type: ignore[method-assign]


def _faulty_samples(read: Any, **faults: Any) -> Any:
    first, number = faults.get("passed_over", (0, 0))

    def sample(self: Stream, index: int) -> dict[str, torch.Tensor]:
        found = dict(read(self, index + number if index >= first else index))
        if index in faults.get("nan", ()):
            found["loss_mask"] = torch.full_like(found["loss_mask"], float("nan"))
        if index in faults.get("random", ()):
            generator = torch.Generator().manual_seed(index)
            found["labels"] = torch.randint(0, 250, found["labels"].shape, generator=generator)
        if index in faults.get("unknown", ()):
            found["labels"] = torch.cat([found["labels"][:-1], torch.tensor([300])])
        return found

    return sample


def _faulty_step(step: Any, bad_state_at: int | None) -> Any:
    calls = [0]

    def faulty(self: Engine, *arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        result = step(self, *arguments, **more)
        if calls[0] == bad_state_at and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            (part,) = self.optimizer.chained_optimizers
            next(iter(part.optimizer.state.values()))["exp_avg_sq"].view(-1)[-1] = float("inf")
        return result

    return faulty


def train_with_small_files(config: str, overrides: list[str], largest_bytes: int) -> dict[str, Any]:
    """Train where no file can grow beyond ``largest_bytes``, as on a disk that is full."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, before[1]))
    try:
        return _train(config, overrides)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def steps_around_a_bad_gradient(layouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An ordinary step after one in which a gradient of the last rank was infinite."""
    results = []
    for layout in layouts:
        stage = stage_of(layout)
        with fresh_engine(stage) as engine:
            run = engine._run

            def infinite(*arguments: Any, run: Any = run, engine: Engine = engine, **keywords: Any) -> Any:
                sums = run(*arguments, **keywords)
                if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                    for buffer in engine.wrapped[-1].buffers:
                        buffer.grad_data.fill_(float("inf"))
                return sums

            engine._run = infinite  # type: ignore[method-assign]
            bad = engine.train_step(batches(0, stage), 1e-3)
            engine._run = run  # type: ignore[method-assign]
            after = [engine.train_step(batches(step, stage), 1e-3) for step in (1, 2)]
            results.append({"taken": bad.taken, "losses": [r.loss for r in after], "finite": engine.is_finite()})
    return results


def steps_without_it(steps: list[int]) -> list[float]:
    """The losses of these steps, from the initial weights, on one rank."""
    stage = stage_of({})
    with fresh_engine(stage) as engine:
        return [engine.train_step(batches(step, stage), 1e-3).loss for step in steps]
