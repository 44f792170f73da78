"""What the tests of learning stages run on each rank (``tests.ranks``): runs that end within a phase, and go on."""

from __future__ import annotations

import gc
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.flop_counter import FlopCounterMode

from growth_megatron.errors import GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.growth.learned_maps import map_costs
from growth_megatron.parallel import collectives
from growth_megatron.train.learning import FOLDER, LearningEngine
from growth_megatron.train.stages import train
from tests.growth.learned_workers import growth_of, learning_engine
from tests.train.allocated_peak import AllocatedPeak


class Died(BaseException):
    """No error that anything could handle."""


def ended_and_gone_on(config: str, runs: dict[str, list[str]], step: int) -> dict[str, Any]:
    """Exit codes by name of ``runs`` (overrides): ``whole``; ``killed`` and ``stopped`` after ``step`` steps of
    learning, and of the same command again, of ``damaged`` once a bit of what was kept is another; what ``diverged``
    says whose gradient is not a number there.
    """

    def go(name: str) -> int:
        try:
            return train(load_config(config, runs[name]))
        finally:
            gc.collect()  # what the end of a process gives back: the engine, the run's lock

    def die(_: LearningEngine) -> float:
        raise Died

    def stop(_: LearningEngine) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    codes: dict[str, Any] = {"whole": go("whole")}
    for name in ("killed", "damaged"):
        with_update(step, die)
        try:
            go(name)
        except Died:
            codes[name] = "died"
    (kept,) = (Path(runs["damaged"][0].partition("=")[2]) / FOLDER).glob("*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-9] ^= 1
    kept.write_bytes(content)
    with_update(step, stop)
    codes["stopped"] = go("stopped")
    with_update(step, lambda _: math.nan)
    try:
        go("diverged")
    except GrowthMegatronError as error:
        codes["diverged"] = str(error)
    with_update(-1, die)
    return codes | {f"{name} again": go(name) for name in ("killed", "damaged", "stopped", "diverged")}


def faulty_then_sound(config: str, overrides: list[str], step: int) -> str:
    """What is said of a run in which one bit of the last rank's maps is wrong after ``step`` steps; then it goes on."""

    def flip(engine: LearningEngine) -> None:
        if collectives.rank() == collectives.world_size() - 1:
            value = next(iter(engine.learned.maps.values())).data
            value.view(torch.int32)[0, 0] ^= 1

    with_update(step, flip)
    said = ""
    try:
        train(load_config(config, overrides))
    except GrowthMegatronError as error:
        said = str(error)
    gc.collect()
    with_update(-1, flip)
    assert train(load_config(config, overrides)) == 0
    return said


UPDATE = LearningEngine._update


def with_update(step: int, function: Callable[[LearningEngine], Any]) -> None:
    """Call ``function`` after the update of ``step``, counted from 1; what it returns is the gradient's norm."""
    count = 0

    def update(self: LearningEngine, learning_rate: float, stage_step: int, measures: bool) -> Any:
        nonlocal count
        count += 1
        norm, norms = UPDATE(self, learning_rate, stage_step, measures)
        other = function(self) if count == step else None
        return norm if other is None else other, norms

    LearningEngine._update = update  # type: ignore[method-assign]


def measured(cases: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """FLOPs of pouring and pulling back, bytes of what is kept and of what comes and goes: measured, planned."""
    results = []
    for case in cases:
        plan, stage, _ = growth_of(case)
        with learning_engine(case) as engine:
            rank = parallel_state.get_pipeline_model_parallel_rank()
            costs = map_costs(
                plan.source_geometry, plan.target_geometry, plan.layers or (), stage.parallel, pipeline_rank=rank
            )
            learned = engine.learned
            for model in engine.wrapped:
                model.zero_grad_buffer()
            engine._update(1e-3, 0, False)  # Adam's moments
            with FlopCounterMode(display=False) as counter:
                learned.pour(0)
                learned.pull_back()
            engine._update(1e-3, 0, False)
            base = {id(piece): piece.nbytes for pieces in learned._base.values() for piece in pieces}
            kept = list(learned.maps.values())
            kept += [value.grad for value in learned.maps.values() if value.grad is not None]
            kept += [state[key] for state in engine.adam.state.values() for key in ("exp_avg", "exp_avg_sq")]
            for value in learned.maps.values():
                value.grad = None
            with AllocatedPeak() as peak:
                learned.pull_back()
            gradients = sum(value.nbytes for value in learned.maps.values())
            results.append(
                {
                    "flops": [counter.get_total_flops(), costs.flops],
                    "base": [sum(base.values()), costs.base_bytes],
                    "maps": [sum(value.nbytes for value in kept) + gradients, costs.map_bytes],
                    "temporary": [peak.bytes - gradients, costs.temporary_bytes],
                }
            )
    return results
