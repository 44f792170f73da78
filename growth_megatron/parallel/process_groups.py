"""Process groups of a layout: start, change, end.

Owns: torch.distributed's default group, megatron-core's groups, the device of this rank.
Does not own: whether a world size fits a configuration (``config.load.check_world_size``, which runs first).
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from growth_megatron.config.schema import ParallelConfig
from growth_megatron.parallel.collectives import environment_number
from growth_megatron.parallel.cpu_adapter import adapt_megatron_to_cpu
from growth_megatron.parallel.megatron_fixes import fix_megatron


def device() -> torch.device:
    """The device of this rank."""
    if torch.cuda.is_available():
        return torch.device("cuda", environment_number("LOCAL_RANK", 0))
    return torch.device("cpu")


def start(timeout_s: float = 1800.0) -> bool:
    """Join the default process group (nccl with CUDA, else gloo), also as a world of one without torchrun.

    Returns: False if the process was in one already; whoever started it stops it.
    """
    adapt_megatron_to_cpu()
    fix_megatron()
    if dist.is_initialized():
        return False
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        dist.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
    return True


def set_layout(parallel: ParallelConfig, seed: int) -> None:
    """Build megatron-core's groups for ``parallel``; those of an earlier, other layout end with their communicators."""
    virtual = parallel.model_chunks if parallel.model_chunks > 1 else None
    wanted = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, virtual)
    if parallel_state.model_parallel_is_initialized() and _current_layout() != wanted:
        _end_layout()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(*wanted)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _current_layout() -> tuple[int, int, int | None]:
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )


def _end_layout() -> None:
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()  # forgets the groups, ends few of them
    alive = dist.distributed_c10d._world.pg_map
    for group in groups:
        if group in alive:
            dist.destroy_process_group(group)


def stop() -> None:
    """Leave all groups."""
    if parallel_state.model_parallel_is_initialized():
        _end_layout()
    if dist.is_initialized():
        dist.destroy_process_group()
