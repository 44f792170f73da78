"""The live model and optimizer written as a checkpoint by threads of this process.

Owns: host copies, the threads that write them, what is to be done when all ranks have written.
Does not own: what is saved and its format (``checkpoint.torch_dist.live_model``), data files
(``checkpoint.torch_dist.data_files``), folders and manifests (``checkpoint.folder``).

megatron-core plans the save and ends it; its writers are forked processes. A process with CUDA, NCCL and InfiniBand
must not fork, a child can be killed by itself, and pinned host copies are shared with a child, not copied on write: the
next batch would be written into a checkpoint. So threads write here, and they hold their copies until they are done.
They leave the training thread its interpreter: checksums and writes of a mebibyte at a time release it. And they leave
it the machine: until somebody waits for the save they rest as long as they work, at the lowest priority.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from growth_megatron.checkpoint.folder.manifest import FileEntry
from growth_megatron.checkpoint.torch_dist.data_files import DataFile, without_crc32
from growth_megatron.checkpoint.torch_dist.journal import FinishedFile
from growth_megatron.checkpoint.torch_dist.live_model import FORMAT, model_state
from growth_megatron.parallel.collectives import all_gather, on_all_ranks

_THREADS = 2  # of a rank, a data file each


class Save:
    """A checkpoint that is being written by all ranks; ``files`` are those of this rank, by name."""

    def __init__(
        self, request: AsyncRequest, files: dict[str, Future[FinishedFile]], threads: ThreadPoolExecutor, hurry: Event
    ) -> None:
        self._request, self.files, self._threads, self._hurry = request, files, threads, hurry

    def is_written(self) -> bool:
        """Whether this rank has written its files, or failed to."""
        return all(file.done() for file in self.files.values())

    def finish(self) -> dict[str, FileEntry]:
        """Wait for all ranks and complete the checkpoint's metadata; returns the data files of all of them, by name.

        All ranks must call it alike.

        Raises: CheckpointError if a file could not be written on any rank, on all of them.
        """
        self._hurry.set()
        own = on_all_ranks(self._own_files)
        if own:
            results = self._request.async_fn_args[2]
            results.put({number: file.results() for number, file in enumerate(own.values())})
        for finalize in self._request.finalize_fns:
            finalize()
        entries = {name: file.entry for name, file in own.items()}
        return {name: entry for part in all_gather(entries) for name, entry in part.items()}

    def _own_files(self) -> dict[str, FinishedFile]:
        # Of all threads, also where one has failed: who removes the folder then must not meet one that still writes.
        self._threads.shutdown()
        return {name: file.result() for name, file in self.files.items()}


def start_save(directory: Path, models: Sequence[MegatronModule], optimizer: MegatronOptimizer) -> Save:
    """Begin to write the sharded state into the empty folder ``directory``; all ranks must call it alike.

    Model and optimizer may change before the save is finished: what is written are copies in host memory.
    """
    model = model_state(models)
    state = {"model": model, "optimizer": optimizer.sharded_state_dict(model, metadata=dict(FORMAT))}
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_THREADS)
    if parallel_state.get_data_parallel_world_size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, parallel_state.get_data_parallel_group())
    request = dist_checkpointing.save(
        state, str(directory), strategy, async_sharded_save=True, content_metadata=dict(FORMAT)
    )
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint", initializer=_give_way)
    files: dict[str, Future[FinishedFile]] = {}
    hurry = Event()
    if request.async_fn is not None:
        live = {param.untyped_storage().data_ptr() for chunk in models for param in chunk.parameters()}
        for path, name, (objects, tensors) in request.preload_fn():
            items = [*objects, *((item, _apart(tensor, live)) for item, tensor in tensors)]
            files[name] = threads.submit(_write_file, Path(path), items, hurry)
    return Save(request, files, threads, hurry)


def _give_way() -> None:
    """Let this thread have what the others of the machine leave: on Linux a thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _apart(tensor: torch.Tensor, live: Container[int]) -> torch.Tensor:
    """``tensor``, of any shape, in memory of its own: on a CPU megatron-core copies only what is part of a storage."""
    return tensor.clone() if tensor.untyped_storage().data_ptr() in live else tensor


def _write_file(path: Path, items: Sequence[tuple[Any, Any]], hurry: Event) -> FinishedFile:
    file = DataFile(path)
    try:
        with without_crc32(), torch.no_grad():
            for item, data in items:
                started = time.perf_counter()
                file.append(item, data)
                hurry.wait(time.perf_counter() - started)
        return file.finish()
    finally:
        with suppress(OSError):  # on a full disk the first error is the one to show
            file.close()
