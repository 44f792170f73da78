"""Any source of tensors as a torch_dist checkpoint, one bounded chunk at a time.

Owns: the order of checks before the first byte, which rank writes what, failing alike on all ranks.
Does not own: what the chunks are (``checkpoint.torch_dist.chunk_planner``), data files
(``checkpoint.torch_dist.data_files``), what an earlier attempt left (``checkpoint.torch_dist.journal``), the commit
(``checkpoint.folder.commit``).

Chunks depend on shapes alone, so a checkpoint holds the same chunks whoever wrote it. All ranks know the whole list;
each writes its part of what an earlier attempt has not completed.
"""

from __future__ import annotations

import io
import json
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem

from growth_megatron.checkpoint.folder.commit import (
    commit_folder,
)
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import MANIFEST_NAME, FileEntry, Manifest
from growth_megatron.checkpoint.folder.target import check_new, check_room, free_bytes
from growth_megatron.checkpoint.torch_dist.chunk_planner import ChunkPlanner, plan_items
from growth_megatron.checkpoint.torch_dist.data_files import (
    ParallelWriter,
    StoppedError,
    groups_of,
    share,
)
from growth_megatron.checkpoint.torch_dist.journal import Journal, item_bytes
from growth_megatron.checkpoint.torch_dist.reader import COMMON_NAME
from growth_megatron.errors import DamagedError, GrowthError, GrowthMegatronError
from growth_megatron.model.tensors import TensorSource, is_constant
from growth_megatron.parallel.collectives import all_gather, on_all_ranks, on_rank_zero, rank, world_size

T = TypeVar("T")

FILE_BYTES = 1 << 30
"""A data file is closed when it has this size: about what a kill costs each writer."""

_ITEM_OVERHEAD_BYTES = 2048
FORMAT_NAME = "metadata.json"
FORMAT = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()


@dataclass(frozen=True)
class WriteResult:
    """A written checkpoint. Bytes are those of all ranks; ``bytes_resumed`` had been written by an earlier attempt."""

    path: Path
    manifest: Manifest
    bytes_written: int
    bytes_resumed: int
    seconds: float


def write_checkpoint(
    source: TensorSource,
    target: Path,
    manifest: Manifest,
    common: Mapping[str, Any],
    *,
    objects: Mapping[str, bytes] | None = None,
    extra_files: Mapping[str, bytes] | None = None,
    fingerprint: str,
    writers: int = 2,
    chunk_bytes: int = 16 * 2**20,
    file_bytes: int = FILE_BYTES,
    files: FileOperations | None = None,
    progress: Callable[[int, int], None] | None = None,
    check_finite: bool = True,
    overwrite: bool = False,
    source_is_sound: Callable[[], None] | None = None,
) -> WriteResult:
    """Write all tensors of ``source`` as the checkpoint ``target``; atomic, and to be given again after a kill.

    With a process group all ranks call it alike, and each writes its part.

    Args:
        source: weights and, where there, optimizer state; read by several threads at once.
        manifest: complete but for ``files``.
        common: content of ``common.pt``.
        objects: byte objects by stored key, as ``DistCheckpoint.read_object`` gives them.
        extra_files: further files by name.
        fingerprint: identity of the job. What an unfinished attempt with the same one completed is taken over; that
            of any other is removed.
        writers: threads per rank, each with a data file of its own.
        chunk_bytes: largest chunk, counted in float32; tensors are cut along their first axis.
        file_bytes: size at which a data file is closed.
        progress: called with the bytes done and in all, of this rank; those taken over count for rank 0.
        check_finite: refuse values that are not finite.
        overwrite: whether a checkpoint at ``target`` may be replaced.
        source_is_sound: called on all ranks before the commit; raises if what was read is not what was saved.

    Raises, alike on all ranks:
        CheckpointError: ``target`` exists, no space, or the source or the disk fails. What is complete is kept.
        GrowthError, DamagedError: a value is not finite, or the source is not sound; the attempt is removed.
    """
    started = time.perf_counter()
    files, objects = files or FileOperations(), objects or {}
    on_rank_zero(lambda: check_new(target, overwrite=overwrite))
    items = on_all_ranks(lambda: plan_items(source, objects, chunk_bytes))
    journal = Journal(target, fingerprint, items, files)
    left = journal.left(items)
    on_rank_zero(lambda: _begin(target, journal, source, left))
    part = [item for group in share(groups_of(left), world_size())[rank()] for item in group]
    taken_over = sum(map(item_bytes, items)) - sum(map(item_bytes, left)) if rank() == 0 else 0
    meter = _Meter(progress, taken_over, taken_over + sum(map(item_bytes, part)))
    storage = ParallelWriter(journal, files, writers, file_bytes, meter.add)
    try:
        _save(storage, ChunkPlanner(source, objects, items, part, check_finite))
        if source_is_sound is not None:
            source_is_sound()
    except (GrowthError, DamagedError):
        if rank() == 0:
            files.remove_tree(journal.temporary)
        raise
    finished = [journal.resumed, *all_gather(storage.finished)]
    entries = {name: file.entry for some in finished for name, file in some.items()}
    small = {FORMAT_NAME: FORMAT, **(extra_files or {}), COMMON_NAME: saved(dict(common))}
    complete = on_rank_zero(lambda: _commit(target, overwrite, manifest, small, entries, journal, files))
    in_all = complete.total_bytes + (target / MANIFEST_NAME).stat().st_size
    return WriteResult(
        target, complete, in_all - journal.bytes_resumed, journal.bytes_resumed, time.perf_counter() - started
    )


def _commit(
    target: Path,
    overwrite: bool,
    manifest: Manifest,
    small: Mapping[str, bytes],
    entries: Mapping[str, FileEntry],
    journal: Journal,
    files: FileOperations,
) -> Manifest:
    journal.end()
    for name, content in small.items():
        files.make_directory((journal.temporary / name).parent)
        files.write(journal.temporary / name, content)
    check_new(target, overwrite=overwrite)  # again: writing takes its time, and the commit replaces what stands there
    return commit_folder(target, manifest, files, entries)


def _begin(target: Path, journal: Journal, source: TensorSource, left: list[WriteItem]) -> None:
    """The temporary folder, once it is known that what is left to write has room."""
    journal.clear()  # before the room is measured
    needed = sum(item_bytes(item) + _ITEM_OVERHEAD_BYTES for item in left)
    if needed > free_bytes(target):
        constant = _constant_keys(source, left)
        needed = sum((item_bytes(i) if i.index.fqn not in constant else 0) + _ITEM_OVERHEAD_BYTES for i in left)
    check_room(target, needed, " more")
    journal.begin()


def _constant_keys(source: TensorSource, items: list[WriteItem]) -> set[str]:
    """Tensors that cost nothing on the disk, judged by their first row."""
    sizes = {item.index.fqn: item.tensor_data.size for item in items if item.tensor_data is not None}
    constant = set()
    for key, size in sizes.items():
        rows = [min(2, length) if len(size) == 1 else min(1, length) for length in size[:1]]
        region = tuple(slice(0, length) for length in (*rows, *size[1:]))
        if is_constant(source.read(key, region)):
            constant.add(key)
    return constant


def _save(storage: ParallelWriter, planner: SavePlanner) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is")  # without a process group one rank writes all
            state_dict_saver.save({}, storage_writer=storage, planner=planner)
    except CheckpointException as failure:
        errors = [failure.failures[rank][0] for rank in sorted(failure.failures)]
        error = next((error for error in errors if not isinstance(error, StoppedError)), errors[0])
        if isinstance(error, GrowthMegatronError) or not isinstance(error, Exception):
            raise error from None
        raise RuntimeError(f"writing the checkpoint failed: {type(error).__name__}: {error}") from failure


def saved(value: Any) -> bytes:
    """``value`` as ``torch.save`` writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Meter:
    """Adds up what the writers of this rank have done."""

    def __init__(self, progress: Callable[[int, int], None] | None, done: int, in_all: int) -> None:
        self._progress, self._done, self._in_all = progress, done, in_all
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._in_all)
