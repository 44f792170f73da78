"""Data files of a checkpoint that is being written: streamed, and checksummed on the way.

Owns: a data file from its first chunk to its last, the torch DCP storage writer that fills several at once by threads.
Does not own: what is written (``checkpoint.torch_dist.writer``), what becomes of a file that is complete
(``checkpoint.torch_dist.journal``), the folder and its commit (``checkpoint.folder.commit``).

Own code beside torch's storage writer, which takes no checksums on the way and leaves nothing usable after a kill.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import itertools
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future
from typing_extensions import override

from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import FileEntry
from growth_megatron.checkpoint.torch_dist.chunk_planner import ChunkPlanner
from growth_megatron.checkpoint.torch_dist.journal import UNFINISHED_FOLDER, FinishedFile, Journal, item_bytes
from growth_megatron.checkpoint.torch_dist.reader import METADATA_NAME
from growth_megatron.errors import CheckpointError
from growth_megatron.model.tensors import split_state_key

_SLICE_BYTES = 1 << 20
_FLUSH_BYTES = 1 << 24
_TRIM_BYTES = 1 << 22
_ABORTED = "aborted"


class StoppedError(Exception):
    """This writer stopped because another one failed."""


def groups_of(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """Runs of items that are the same rows of a weight and of its optimizer state."""

    def rows(item: WriteItem) -> Any:
        return split_state_key(item.index.fqn)[1], item.index.offset

    return [list(group) for _, group in itertools.groupby(items, rows)]


def share(groups: Sequence[list[WriteItem]], parts: int) -> list[list[list[WriteItem]]]:
    """``groups`` in order, cut into ``parts`` of about the same bytes."""
    sizes = [sum(map(item_bytes, group)) for group in groups]
    shares: list[list[list[WriteItem]]] = [[] for _ in range(parts)]
    before, total = 0, max(sum(sizes), 1)
    for group, size in zip(groups, sizes, strict=True):
        shares[min(parts - 1, (2 * before + size) * parts // (2 * total))].append(group)
        before += size
    return shares


class ParallelWriter(StorageWriter):
    """Writes the items of a torch DCP save plan into several files at once, one thread each.

    Every file is closed when it has reached ``file_bytes``. What was written is in ``finished``.
    """

    def __init__(
        self,
        journal: Journal,
        files: FileOperations,
        writers: int,
        file_bytes: int,
        done: Callable[[int], None],
    ) -> None:
        self.finished: dict[str, FinishedFile] = {}
        self._folder, self._files, self._journal = journal.temporary, files, journal
        self._writers, self._file_bytes, self._done = writers, file_bytes, done
        self._stop = threading.Event()
        self._rank = 0

    @override
    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        raise NotImplementedError("one writer writes one checkpoint")

    @override
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = kwargs.get("rank") or 0

    @override
    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @override
    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, ChunkPlanner)
        self._done(0)
        parts = share(groups_of(plan.items), self._writers)
        with ThreadPoolExecutor(self._writers, thread_name_prefix="writer") as pool:
            futures = [pool.submit(self._write, number, part, planner) for number, part in enumerate(parts)]
            try:
                errors = [future.exception() for future in futures]
            except BaseException:  # such as an interrupt: the threads would go on to the end
                self._stop.set()
                raise
        for error in sorted(filter(None, errors), key=lambda error: isinstance(error, StoppedError)):
            raise error
        outcome: Future[list[WriteResult]] = Future()
        outcome.set_result([result for future in futures for result in future.result()])
        return outcome

    @override
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for part in results for result in part}
        for kept in self._journal.resumed.values():
            written.update(kept.items)
        metadata.storage_data = written
        self._files.write(self._folder / METADATA_NAME, pickle.dumps(metadata))

    @override
    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    @override
    def storage_meta(self) -> StorageMeta | None:
        return None

    def _write(self, writer: int, groups: list[list[WriteItem]], planner: ChunkPlanner) -> list[WriteResult]:
        names = (f"__{self._rank}_{number}.distcp" for number in itertools.count(writer, self._writers))
        results: list[WriteResult] = []
        file: DataFile | None = None
        try:
            with without_crc32():
                for group in groups:
                    self._check_stopped()
                    if file is None:
                        name = next(name for name in names if name not in self._journal.resumed)
                        file = DataFile(self._folder / UNFINISHED_FOLDER / name)
                    for item, data in planner.resolve_group(group):
                        file.append(item, data)
                        del data  # before the next is computed
                        if item_bytes(item) >= _TRIM_BYTES:
                            _return_free_memory()
                        self._done(item_bytes(item))
                    if file.size >= self._file_bytes or group is groups[-1]:
                        self.finished[name] = file.finish(self._journal.add)
                        results += self.finished[name].results()
                        file = None
        except BaseException as error:
            self._stop.set()
            if not isinstance(error, StoppedError):
                with suppress(OSError):  # on a full disk the first error is the one to show
                    (self._folder / UNFINISHED_FOLDER / _ABORTED).touch()
            raise
        finally:
            if file is not None:
                with suppress(OSError):
                    file.close()
        return results

    def _check_stopped(self) -> None:
        """Looks for a failure of this rank's writers, and of other ranks, which now share nothing but the folder."""
        if self._stop.is_set() or (self._folder / UNFINISHED_FOLDER / _ABORTED).exists():
            raise StoppedError


class DataFile:
    """A data file that is being written."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._items: dict[MetadataIndex, _StorageInfo] = {}
        self._sum = hashlib.sha256()
        self._flushed = 0
        self._failure: OSError | None = None
        with self._clear_errors():
            self._file = open(self._path, "wb")  # noqa: SIM115 - closed by close()

    def append(self, item: WriteItem, data: torch.Tensor | io.BytesIO) -> None:
        """Write an item, a tensor of its chunk's shape or bytes, at the end."""
        start = self.size
        with self._clear_errors():
            if isinstance(data, io.BytesIO):
                self.write(data.getbuffer())
            else:
                torch.save(data, self)  # type: ignore[arg-type]
            if self._failure is not None:
                raise self._failure
        self._items[item.index] = _StorageInfo(self._path.name, start, self.size - start)

    def write(self, data: Any) -> int:
        """What torch.save calls; it loses errors, so ``append`` raises them."""
        view = memoryview(data).cast("B")
        if self._failure is None:
            try:
                self._write_out(view)
            except OSError as error:
                self._failure = error
        return len(view)

    def flush(self) -> None:
        """torch.save calls this at the end of each chunk; the file is flushed when it is full."""

    def _write_out(self, view: memoryview) -> None:
        for start in range(0, len(view), _SLICE_BYTES):
            part = view[start : start + _SLICE_BYTES]
            self._sum.update(part)
            self._file.write(part)
        self.size += len(view)
        if self.size - self._flushed >= _FLUSH_BYTES:
            # Starts writing to the disk now rather than all at once at the end; dirty pages are not dropped by it.
            self._file.flush()
            os.posix_fadvise(self._file.fileno(), self._flushed, self.size - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.size

    def finish(self, note: Callable[[str, FinishedFile], None] | None = None) -> FinishedFile:
        """Make the file durable: by ``note``, which gets its name and what it holds, else here."""
        finished = FinishedFile(FileEntry(size_bytes=self.size, sha256=self._sum.hexdigest()), self._items)
        with self._clear_errors():
            if note is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self.close()
            if note is not None:
                note(self._path.name, finished)
        return finished

    def close(self) -> None:
        """Close the file as it stands; without ``finish`` it does not count."""
        self._file.close()

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror or error}; mend that and re-run the same command to resume"
            ) from error


def _return_free_memory() -> None:
    """Hand freed chunks back to the system: glibc keeps up to some 64 MiB of them for each thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def without_crc32() -> Iterator[None]:
    """In this thread torch.save leaves out each record's CRC-32: torch reads none, and files have checksums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
