"""The live model and optimizer as a sharded state: its format, filled from a source, loaded.

Owns: the calls of ``megatron.core.dist_checkpointing`` and the format options that go with them.
Does not own: saving (``checkpoint.torch_dist.saver``), folders, manifests and which checkpoint is taken
(``checkpoint.folder.run_directory``).

What is saved is torch_dist with one key per layer and optimizer state as global tensors per parameter
(``fully_reshardable``): the only one that loads at another tensor- or pipeline-parallel size, and the one that growth
rules apply to.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, damage, read_common
from growth_megatron.config.words import listed
from growth_megatron.errors import CheckpointError, DamagedError
from growth_megatron.model.tensors import Region, TensorSource
from growth_megatron.parallel.collectives import on_all_ranks

FORMAT: Mapping[str, Any] = MappingProxyType(
    {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}
)

_DAMAGE = (
    CheckpointException,
    CheckpointingException,
    pickle.UnpicklingError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
    EOFError,
)
"""What loading wrong contents raises. Memory and communication that fail raise RuntimeError, and are no damage."""


def load_from_source(source: TensorSource, models: Sequence[MegatronModule]) -> None:
    """Fill every parameter of this rank's ``models`` with its region of ``source``; each rank reads only its shards."""
    with torch.no_grad():
        for shard in model_shards(models):
            shard.data.copy_(source.read(shard.key, shard.region))


class ModelShard(NamedTuple):
    """A parameter of this rank, or a view that a fused one (gate and up) is made of: of a tensor the region, of its
    shape. Of all data-parallel ranks alike, one tensor- and pipeline-parallel rank ``is_first`` to hold it.
    """

    data: torch.Tensor
    key: str
    region: Region
    is_first: bool


def model_shards(models: Sequence[MegatronModule]) -> Iterator[ModelShard]:
    """All that this rank holds of the model."""
    for shard in _tensor_shards(model_state(models)):
        assert shard.data is not None
        bounds = zip(shard.global_offset, shard.local_shape, strict=True)
        assert isinstance(shard.replica_id, tuple)
        pipeline, tensor, _ = shard.replica_id  # a tied output is the second copy, gains have one on each tensor rank
        region = tuple(slice(start, start + length) for start, length in bounds)
        yield ModelShard(shard.data, shard.key, region, pipeline == tensor == 0)


def load_into_model(
    directory: Path, models: Sequence[MegatronModule], optimizer: MegatronOptimizer | None = None
) -> None:
    """Load weights, and with ``optimizer`` its masters and moments, at whatever layout this process group has.

    Strict both ways: every tensor of the model is in the checkpoint with its global shape, and the other way round.

    Raises:
        CheckpointError: naming the tensors that do not fit.
        DamagedError: its contents cannot be loaded, alike on all ranks.
    """
    stored = on_all_ranks(lambda: DistCheckpoint(directory))
    form = {**FORMAT, "non_homogeneous_layers": not stored.is_stacked}
    model = model_state(models, form)
    state: dict[str, Any] = {"model": model}
    on_all_ranks(lambda: _check_shapes(stored, _tensor_shards(model)))
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=True, metadata=dict(form))
    on_all_ranks(lambda: read_common(directory))  # says what is wrong with it
    try:
        _load(directory, models, optimizer, state)
    except _DAMAGE as error:
        reason = _reason(error)
        raise DamagedError(f"{directory} cannot be loaded, though all is there ({reason}); use another one") from None


def _load(
    directory: Path, models: Sequence[MegatronModule], optimizer: MegatronOptimizer | None, state: dict[str, Any]
) -> None:
    strategy: Any = get_default_load_sharded_strategy(str(directory))
    if parallel_state.get_data_parallel_world_size() > 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, parallel_state.get_data_parallel_group())
    strict = StrictHandling.RAISE_ALL if optimizer is not None else StrictHandling.RAISE_UNEXPECTED
    loaded = dist_checkpointing.load(state, str(directory), strategy, strict=strict)
    for name, chunk in zip(state["model"], models, strict=True):
        chunk.load_state_dict(loaded["model"][name])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on the lowest rank where it did; goes on raising what is no damage."""
    if isinstance(error, CheckpointException):
        error = error.failures[min(error.failures)][0]
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise error
    return damage(error)


def model_state(models: Sequence[MegatronModule], form: Mapping[str, Any] = FORMAT) -> dict[str, Any]:
    """The sharded state of this rank's model chunks, by name, as megatron-core's dist_checkpointing takes it."""
    # A dictionary of its own for each call: megatron-core stores the process groups of the moment in it.
    return {f"model{i}": chunk.sharded_state_dict(metadata=dict(form)) for i, chunk in enumerate(models)}


def _tensor_shards(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """The sharded tensors of ``state``, fused ones (gate and up) taken apart into views of their parameter."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from (part for part in nested_values(value.build()))
        elif isinstance(value, ShardedTensor):
            yield value
        elif not isinstance(value, ShardedObject):
            raise TypeError(f"unexpected {type(value).__name__} in a model's sharded state")


def _check_shapes(stored: DistCheckpoint, shards: Iterator[ShardedTensor]) -> None:
    """megatron-core pads embedding and output silently on a mismatch; compare before it can."""
    wrong = []
    for shard in shards:
        entry = stored.metadata.state_dict_metadata.get(shard.key)
        here, there = tuple(shard.global_shape), tuple(getattr(entry, "size", ()))
        if entry is None:
            wrong.append(f"{shard.key}: not in the checkpoint")
        elif here != there:
            wrong.append(f"{shard.key}: the model has {here}, the checkpoint {there}")
    if wrong:
        raise CheckpointError(
            f"{stored.path} does not hold this model: {listed(wrong)}. "
            "Set model: to the checkpoint's geometry (growth-megatron inspect), or grow it with growth-megatron grow."
        )
