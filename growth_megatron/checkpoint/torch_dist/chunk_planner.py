"""What a checkpoint that is computed while it is written consists of.

Owns: the chunks and their order, the torch DCP planner that computes each when its turn comes, the check of its values.
Does not own: who writes which (``checkpoint.torch_dist.writer``) and where to (``checkpoint.torch_dist.data_files``).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from typing_extensions import override

from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.model.tensors import (
    STATE_PREFIXES,
    Region,
    TensorSource,
    constant,
    is_constant,
    read_state,
    split_state_key,
)


def plan_items(source: TensorSource, objects: Mapping[str, bytes], chunk_bytes: int) -> list[WriteItem]:
    """Everything to be written, in order: rows of a weight, the same rows of its optimizer state, the next rows.

    Depends on keys, shapes and types alone.
    """
    states: dict[str, dict[str, str]] = {}
    for key in source.keys():
        prefix, name = split_state_key(key)
        states.setdefault(name, {})[prefix] = key
    items = [
        WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(content)))
        for key, content in objects.items()
    ]
    for keys in states.values():
        together: dict[tuple[torch.Size, torch.Size], list[WriteItem]] = {}
        for prefix in STATE_PREFIXES:
            if prefix in keys:
                for item in _chunks(source, keys[prefix], chunk_bytes):
                    assert item.tensor_data is not None
                    together.setdefault((item.tensor_data.chunk.offsets, item.tensor_data.chunk.sizes), []).append(item)
        items += [item for rows in together.values() for item in rows]
    return items


def _chunks(source: TensorSource, key: str, chunk_bytes: int) -> list[WriteItem]:
    spec = source.spec(key)
    properties = TensorProperties(dtype=spec.dtype)
    size = torch.Size(spec.shape)
    if not spec.shape:
        cuts = [(size, size)]
    else:
        row_bytes = 4 * math.prod(spec.shape[1:])  # of float32, so that a weight and its state are cut alike
        rows = max(1, chunk_bytes // max(1, row_bytes))
        no_offset = (0,) * (len(size) - 1)
        cuts = [
            (torch.Size((start, *no_offset)), torch.Size((min(rows, size[0] - start), *size[1:])))
            for start in range(0, max(1, size[0]), rows)
        ]
    return [
        WriteItem(
            MetadataIndex(key, offsets, number),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(ChunkStorageMetadata(offsets, sizes), properties, size),
        )
        for number, (offsets, sizes) in enumerate(cuts)
    ]


class ChunkPlanner(SavePlanner):
    """The part of each rank, known without communication; a chunk is computed when it is written."""

    def __init__(
        self,
        source: TensorSource,
        objects: Mapping[str, bytes],
        items: list[WriteItem],
        part: list[WriteItem],
        check_finite: bool,
    ) -> None:
        """``items`` is all there is to be in the checkpoint, ``part`` what this rank writes of it."""
        self._source, self._objects, self._check_finite = source, objects, check_finite
        self._items, self._part = items, part

    @override
    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        pass

    @override
    def create_local_plan(self) -> SavePlan:
        return SavePlan(self._part)

    @override
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        metadata = Metadata(
            {}, {item.index.fqn: (item.index.fqn,) for item in self._items}, None, StorageMeta(), "1.0.0"
        )
        for item in self._items:
            known = metadata.state_dict_metadata
            if item.tensor_data is None:
                known[item.index.fqn] = BytesStorageMetadata()
                continue
            tensor = item.tensor_data
            stored = known.setdefault(item.index.fqn, TensorStorageMetadata(tensor.properties, tensor.size, []))
            assert isinstance(stored, TensorStorageMetadata)
            stored.chunks.append(tensor.chunk)
        return all_plans, metadata

    @override
    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The content of one item: a tensor of its chunk's shape, or bytes."""
        ((_, data),) = self.resolve_group([write_item])
        return data

    def resolve_group(self, group: Sequence[WriteItem]) -> Iterator[tuple[WriteItem, torch.Tensor | io.BytesIO]]:
        """Content of items that are one object, or same rows of a weight and its state, each of its chunk's shape."""
        first = group[0]
        if first.tensor_data is None:
            yield first, io.BytesIO(self._objects[first.index.fqn])
            return
        chunk = first.tensor_data.chunk
        region = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        keys = [split_state_key(item.index.fqn) for item in group]
        states = read_state(self._source, keys[0][1], region, [prefix for prefix, _ in keys])
        for item in group:  # no name here for the values: they can go before the next ones are computed
            yield item, self._checked(item, region, next(states).detach())

    def _checked(self, item: WriteItem, region: Region, values: torch.Tensor) -> torch.Tensor:
        key, data = item.index.fqn, item.tensor_data
        assert data is not None
        if values.shape != data.chunk.sizes or values.dtype != data.properties.dtype:
            raise CheckpointError(
                f"{key}: the source gave {tuple(values.shape)} of {values.dtype} where {tuple(data.chunk.sizes)} of "
                f"{data.properties.dtype} were announced"
            )
        values = _compact(values)
        if self._check_finite:
            refuse_non_finite(key, region, values)
        return values


def _compact(values: torch.Tensor) -> torch.Tensor:
    """The same values in a storage that holds them and nothing else; torch.save writes storages whole."""
    values = values.cpu()
    if is_constant(values):
        return constant(values[(0,) * values.dim()].clone(), values.shape)
    if values.is_contiguous() and values.untyped_storage().nbytes() == values.nbytes:
        return values
    return values.clone(memory_format=torch.contiguous_format)


def refuse_non_finite(key: str, region: Region, values: torch.Tensor) -> None:
    """Raises GrowthError unless all ``values``, which are ``region`` of a tensor and of its shape, are finite."""
    if not values.is_floating_point() or not values.numel():
        return
    sample = values[(slice(0, 1),) * values.dim()] if is_constant(values) else values
    least, largest = (sample.float() if sample.itemsize == 1 else sample).aminmax()  # a nan comes through
    if math.isfinite(least) and math.isfinite(largest):
        return
    wrong = sample.float().isfinite().logical_not().nonzero()
    position = tuple(part.start + int(index) for part, index in zip(region, wrong[0], strict=True))
    raise GrowthError(
        f"{key} is {float(sample[tuple(wrong[0])])} at {position}, and in {len(wrong) - 1} more places of the "
        f"{values.numel()} values around it; only finite values are written: take an earlier checkpoint"
    )
