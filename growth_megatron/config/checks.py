"""Rules that need the world size.

Owns: whether a world size fits a stage's layout. Does not own: rules within one stage (``config.schema``).
"""

from __future__ import annotations

from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import (
    StageConfig,
)
from growth_megatron.errors import ConfigError


def check_world_size(config: RunConfig, stage_index: int, world_size: int) -> None:
    """Raise ConfigError unless stage ``stage_index`` can run on ``world_size`` ranks. Needs no process group.

    The world size must be a multiple of tensor x pipeline size and match data_parallel_size if that is given; the
    global batch must divide into micro-batches over the data-parallel ranks; megatron-core's interleaved schedule
    also needs the number of micro-batches to be a multiple of the pipeline size.
    """
    stage = config.stages[stage_index]
    parallel, size = stage.parallel, stage.parallel.model_parallel_size
    where = f"stage {stage.name}"
    degrees = (
        f"tensor_parallel_size {parallel.tensor_parallel_size} x pipeline_parallel_size "
        f"{parallel.pipeline_parallel_size} = {size}"
    )
    if world_size < 1 or world_size % size:
        near = _nearest_multiples(world_size, size)
        raise ConfigError(
            f"{where}: world size {world_size} is not a multiple of {degrees}; start {near} ranks, or change "
            "parallel.tensor_parallel_size or parallel.pipeline_parallel_size"
        )
    data_parallel_size = world_size // size
    wanted = parallel.data_parallel_size
    if wanted is not None and wanted != data_parallel_size:
        raise ConfigError(
            f"{where}: parallel.data_parallel_size is {wanted}, but world size {world_size} / ({degrees}) gives "
            f"{data_parallel_size}; start {wanted * size} ranks, or set it to {data_parallel_size} or leave it out"
        )
    problems = _batch_problems(
        stage, data_parallel_size, "training.global_batch_size", stage.training.global_batch_size
    )
    if stage.growth and stage.growth.learn and (batch := stage.growth.learn.global_batch_size):
        problems += _batch_problems(stage, data_parallel_size, "growth.learn.global_batch_size", batch)
    if problems:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))


def _batch_problems(stage: StageConfig, data_parallel_size: int, key: str, batch: int) -> list[str]:
    micro, pipeline = stage.training.micro_batch_size, stage.parallel.pipeline_parallel_size
    unit = micro * data_parallel_size
    if batch % unit:
        return [
            f"{key} {batch} is not a multiple of micro_batch_size {micro} x data-parallel size "
            f"{data_parallel_size} = {unit}; set it to {_nearest_multiples(batch, unit)}, or keep the batch with a "
            "smaller micro_batch_size or fewer ranks"
        ]
    micro_batches = batch // unit
    if stage.parallel.model_chunks > 1 and micro_batches % pipeline:
        return [
            f"{key} {batch} gives {micro_batches} micro-batches per step, but a virtual pipeline "
            f"needs a multiple of pipeline_parallel_size {pipeline}; set it to "
            f"{_nearest_multiples(batch, unit * pipeline)}, or remove virtual_pipeline_parallel_size"
        ]
    return []


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return f"{below} or {below + unit}" if below > 0 else str(unit)
