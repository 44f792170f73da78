"""Micro-batches as a step takes them: on the device, and some for every rank whatever happens.

Owns: a rank's share of a stage's data, reading a step's without leaving other ranks waiting, the validation set.
Does not own: which samples (``data.loader``), the step (``train.engine``).
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from growth_megatron.config.schema import StageConfig
from growth_megatron.data.dataset import FiniteSource, SampleSource
from growth_megatron.data.loader import BatchLoader, validation_batches
from growth_megatron.train.engine import Batch


def read_step(loader: BatchLoader, first_sample: int, stage: StageConfig) -> tuple[list[Batch], Exception | None]:
    """The step's micro-batches; where they cannot be read, others, that no rank wait for this one, and why."""
    try:
        return [to_device(batch) for batch in loader.micro_batches(first_sample)], None
    except Exception as error:  # raised on all ranks after the step
        shape = stage.training.micro_batch_size, stage.model.sequence_length
        ids = torch.zeros(shape, dtype=torch.int64)
        blank = to_device({"tokens": ids, "labels": ids, "position_ids": ids, "loss_mask": torch.zeros(shape)})
        return [blank] * loader.num_micro_batches, error


def step_loader(data: SampleSource, stage: StageConfig) -> BatchLoader:
    """This rank's share of each of the stage's steps."""
    return BatchLoader(
        data,
        stage.training.micro_batch_size,
        stage.training.global_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def validation_set(data: FiniteSource | None, stage: StageConfig) -> list[Batch]:
    """This rank's micro-batches of the whole validation set; none without one."""
    if data is None:
        return []
    batches = list(
        validation_batches(
            data,
            stage.training.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
    )
    if stage.parallel.model_chunks > 1:
        # The interleaved schedule takes micro-batches by the pipeline size; the filling counts for nothing.
        empty = {**batches[-1], "loss_mask": torch.zeros_like(batches[-1]["loss_mask"])}
        batches += [empty] * (-len(batches) % stage.parallel.pipeline_parallel_size)
    return [to_device(batch) for batch in batches]


def to_device(batch: Batch) -> Batch:
    """All tensors of a micro-batch on this rank's device."""
    device = torch.cuda.current_device()
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
