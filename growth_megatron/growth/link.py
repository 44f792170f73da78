"""Growth without moving data: a new ``.metadata`` over hard links to the source's data files.

Owns: the alias executor, for plans in which every target tensor is a whole source tensor (stacking and all other layer
lists). Cost: some kilobytes and milliseconds, at any model size.
Does not own: the plan (``growth.plan``), the commit (``checkpoint.folder.commit``).

In a torch_dist checkpoint ``.metadata`` maps (key, offset) to a slice of a data file. Several keys may name one slice,
so a layer that is used four times is stored once. Removing the source harms nothing: the links keep the data alive.
Moments that are reset point at tiny stored tensors with one zero and stride 0, which read as zeros of any shape.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import pickle
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from growth_megatron.checkpoint.folder.commit import begin_folder, commit_folder
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import MANIFEST_NAME, FileEntry, Manifest
from growth_megatron.checkpoint.folder.sums import changed
from growth_megatron.checkpoint.folder.target import check_new, check_room, same_file_system
from growth_megatron.checkpoint.torch_dist.reader import COMMON_NAME, METADATA_NAME, DistCheckpoint, is_stacked
from growth_megatron.checkpoint.torch_dist.writer import FORMAT, FORMAT_NAME, saved
from growth_megatron.growth.lineage import object_targets
from growth_megatron.growth.rules import GrowthPlan, OptimizerState, TensorRule
from growth_megatron.model.architecture import LAYER_PREFIX
from growth_megatron.model.tensors import MOMENT_PREFIXES, constant, split_state_key

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LinkPlan:
    """A grown checkpoint over its source's data files.

    Attributes:
        metadata: content of its ``.metadata``.
        data_files: those of the source that it shares.
        zeros_name, zeros: name and content of a data file of its own; empty where it needs none.
    """

    metadata: bytes
    data_files: Mapping[str, FileEntry]
    zeros_name: str
    zeros: bytes


@dataclasses.dataclass(frozen=True)
class Linked:
    """What a growth by links cost. ``bytes_written`` includes ``bytes_copied``, 0 where links could be made."""

    manifest: Manifest
    bytes_written: int
    bytes_linked: int
    bytes_copied: int


def can_link(plan: GrowthPlan, stored: Metadata) -> bool:
    """Whether every target tensor is a whole stored tensor, or zero."""
    layers_apart = all(
        chunk.sizes[0] == 1
        for key, entry in stored.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and is_stacked(key)
        for chunk in entry.chunks
    )
    return plan.is_selection and layers_apart


def plan_links(
    source: DistCheckpoint, held: Mapping[str, FileEntry], plan: GrowthPlan, policy: OptimizerState
) -> LinkPlan:
    """What a growth by links is to write and to share; ``held`` are the files of the source's manifest."""
    zeros = Zeros(taken=held)
    metadata = grown_metadata(source.metadata, plan, policy, zeros)
    names = {info.relative_path for info in metadata.storage_data.values()}
    kept = {name: entry for name, entry in held.items() if name in names}
    return LinkPlan(pickle.dumps(metadata), kept, zeros.name, zeros.content)


def link_checkpoint(
    source: Path,
    copied: Iterable[str],
    links: LinkPlan,
    target: Path,
    grown: Manifest,
    common: Mapping[str, Any],
    files: FileOperations,
    overwrite: bool = False,
) -> Linked:
    """Write the checkpoint ``target`` over the files of ``source``; atomic, and safe to repeat after a kill.

    Args:
        copied: names of small files that go on as they are.
        grown, common: the target's, as ``growth.lineage`` gives them.
        overwrite: whether a checkpoint at ``target`` may be replaced.

    Raises:
        CheckpointError: the target exists, or copying instead of linking has no room.
        DamagedError: data that had to be copied do not have their checksums.
    """
    check_new(target, overwrite=overwrite)
    data_bytes = sum(entry.size_bytes for entry in links.data_files.values())
    if not same_file_system(source, target):
        _check_room(source, target, data_bytes)
    folder = begin_folder(target, files)
    own = {FORMAT_NAME: FORMAT, COMMON_NAME: saved(dict(common)), METADATA_NAME: links.metadata}
    if links.zeros:
        own[links.zeros_name] = links.zeros
    try:
        was_copied = _link_or_copy(source, folder, target, links.data_files, files)
        for name in copied:
            files.copy(source / name, folder / name)
        for name, content in own.items():
            files.write(folder / name, content)
    except Exception:  # copies may be large, and wrong
        files.remove_tree(folder)
        raise
    check_new(
        target, overwrite=overwrite
    )  # again: copying may have taken its time, and the commit replaces what stands there
    complete = commit_folder(target, grown, files, checksums=links.data_files)

    linked = 0 if was_copied else data_bytes
    written = complete.total_bytes - linked + (target / MANIFEST_NAME).stat().st_size
    return Linked(complete, written, linked, data_bytes - linked)


def grown_metadata(source: Metadata, plan: GrowthPlan, policy: OptimizerState, zeros: Zeros) -> Metadata:
    """torch DCP metadata of the grown checkpoint: target keys over the source's stored chunks, or over ``zeros``."""
    assert plan.layers is not None
    uses: dict[str, list[TensorRule]] = {}
    for rule in plan.rules:
        uses.setdefault(_origin(rule, plan.layers), []).append(rule)
    grown = Metadata({}, None, {}, StorageMeta(), source.version)
    for key, stored in source.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            for name in object_targets(key, plan.layers):
                grown.state_dict_metadata[name] = stored
                grown.storage_data[MetadataIndex(name)] = source.storage_data[MetadataIndex(key)]
        elif is_stacked(key):
            _add_restacked(grown, source, key, plan, policy, zeros)
        else:
            prefix, name = split_state_key(key)
            for rule in uses.get(name, ()):
                _add_tensor(grown, source, key, prefix, rule, zeros if _is_zero(rule, prefix, policy) else None)
    if source.planner_data:
        grown.planner_data = {key: (key,) for key in grown.state_dict_metadata}
    return grown


def _origin(rule: TensorRule, layers: tuple[int, ...]) -> str:
    """The source tensor whose chunks have the shapes of the target's; zeros are given those of its layer's source."""
    if rule.source is not None:
        return rule.source
    number, _, name = rule.target.removeprefix(LAYER_PREFIX).partition(".")
    return f"{LAYER_PREFIX}{layers[int(number)]}.{name}"


def _is_zero(rule: TensorRule, prefix: str, policy: OptimizerState) -> bool:
    return rule.fill == "zeros" or (prefix in MOMENT_PREFIXES and not rule.keeps_moments(policy))


class Zeros:
    """Content of a data file of zero tensors, each one stored element with stride 0."""

    def __init__(self, taken: Collection[str]) -> None:
        """``taken``: file names of the source; an earlier growth may have left zeros of its own."""
        names = ("zeros.distcp", *(f"zeros_{number}.distcp" for number in range(len(taken) + 1)))
        self.name = next(name for name in names if name not in taken)
        self._content = io.BytesIO()
        self._slices: dict[tuple[torch.dtype, torch.Size], _StorageInfo] = {}

    @property
    def content(self) -> bytes:
        """The bytes of the file so far."""
        return self._content.getvalue()

    def slice_of(self, dtype: torch.dtype, sizes: torch.Size) -> _StorageInfo:
        """Where a zero tensor of this type and shape lies."""
        if (dtype, sizes) not in self._slices:
            one = io.BytesIO()
            torch.save(constant(torch.zeros((), dtype=dtype), sizes), one)
            offset = self._content.tell()
            self._content.write(one.getvalue())
            self._slices[dtype, sizes] = _StorageInfo(self.name, offset, len(one.getvalue()))
        return self._slices[dtype, sizes]


def _add_tensor(
    grown: Metadata, source: Metadata, key: str, prefix: str, rule: TensorRule, zeros: Zeros | None
) -> None:
    stored = source.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    target = prefix + rule.target
    # The entry is a new one: megatron-core changes its size for a moment while loading.
    grown.state_dict_metadata[target] = dataclasses.replace(stored)
    for number, chunk in enumerate(stored.chunks):
        grown.storage_data[MetadataIndex(target, chunk.offsets, number)] = (
            source.storage_data[MetadataIndex(key, chunk.offsets)]
            if zeros is None
            else zeros.slice_of(stored.properties.dtype, chunk.sizes)
        )


def _add_restacked(
    grown: Metadata, source: Metadata, key: str, plan: GrowthPlan, policy: OptimizerState, zeros: Zeros
) -> None:
    """The form with the layers along the first axis keeps it: layer j's chunks are those of layer ``layers[j]``."""
    stored = source.state_dict_metadata[key]
    assert isinstance(stored, TensorStorageMetadata)
    assert plan.layers is not None
    prefix, name = split_state_key(key)
    rules = {rule.target: rule for rule in plan.rules}
    chunks: list[ChunkStorageMetadata] = []
    for layer, from_layer in enumerate(plan.layers):
        rule = rules[name.replace(LAYER_PREFIX, f"{LAYER_PREFIX}{layer}.", 1)]
        for chunk in stored.chunks:
            if chunk.offsets[0] == from_layer:
                offsets = torch.Size((layer, *chunk.offsets[1:]))
                grown.storage_data[MetadataIndex(key, offsets, len(chunks))] = (
                    zeros.slice_of(stored.properties.dtype, chunk.sizes)
                    if _is_zero(rule, prefix, policy)
                    else source.storage_data[MetadataIndex(key, chunk.offsets)]
                )
                chunks.append(ChunkStorageMetadata(offsets, chunk.sizes))
    size = torch.Size((len(plan.layers), *stored.size[1:]))
    grown.state_dict_metadata[key] = dataclasses.replace(stored, size=size, chunks=chunks)


def _check_room(source: Path, target: Path, needed: int) -> None:
    check_room(target, needed, f" to copy the files of {source}, which cannot be linked there (two file systems?),")


def _link_or_copy(
    source: Path, folder: Path, target: Path, entries: Mapping[str, FileEntry], files: FileOperations
) -> bool:
    """Give ``folder`` the source's data files; True if they had to be copied."""
    for name in entries:
        files.make_directory((folder / name).parent)
    if all(files.link(source / name, folder / name) for name in entries):
        return False
    needed = sum(entry.size_bytes for entry in entries.values())
    _check_room(source, target, needed)
    _LOG.warning(
        "%s and %s cannot share files by hard links (two file systems?): copying %.3g GB",
        source,
        folder.parent,
        needed / 1e9,
    )
    for name in entries:
        if not (folder / name).exists() and files.copy(source / name, folder / name) != entries[name].sha256:
            raise changed(source / name)
    return True
