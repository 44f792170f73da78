"""Process groups of a layout: start, change, end.

Owns: torch.distributed's default group and megatron-core's groups.
Does not own: what is checked before (``parallel.preflight``), whether a world size fits a configuration
(``config.checks``, which runs first).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from growth_megatron.config.schema import ParallelConfig
from growth_megatron.errors import ConfigError
from growth_megatron.parallel.collectives import world_size_from_environment
from growth_megatron.parallel.cpu_adapter import adapt_megatron_to_cpu
from growth_megatron.parallel.megatron_fixes import fix_megatron
from growth_megatron.parallel.preflight import allow_open_files, check_rendezvous, device_index


def start(timeout_s: float = 1800.0, on_devices: bool = True) -> bool:
    """Join the default process group, also as a world of one without torchrun.

    Args:
        on_devices: with CUDA, take this rank's device and join NCCL too; else gloo alone, and no GPU is touched.

    Returns: False if the process was in one already; whoever started it stops it.

    Raises: ConfigError where the environment, devices or limits do not fit, or the ranks cannot meet.
    """
    adapt_megatron_to_cpu()
    fix_megatron()
    if dist.is_initialized():
        return False
    allow_open_files(world_size_from_environment())
    timeout = datetime.timedelta(seconds=timeout_s)
    backend, options = "gloo", dict[str, Any]()
    if "RANK" in os.environ:
        check_rendezvous(os.environ)
    else:
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
        options = {"rank": 0, "world_size": 1, "store": store}
    if on_devices and torch.cuda.is_available():
        torch.cuda.set_device(device_index(os.environ, torch.cuda.device_count()))
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timeout, **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"the ranks cannot meet at {meeting}: {reason}; is another job there, or a firewall?"
        ) from error
    return True


def set_layout(parallel: ParallelConfig, seed: int) -> None:
    """Build megatron-core's groups for ``parallel``; those of an earlier, other layout end with their communicators."""
    virtual = parallel.model_chunks if parallel.model_chunks > 1 else None
    wanted = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, virtual)
    if parallel_state.model_parallel_is_initialized() and _current_layout() != wanted:
        _end_layout()
    if not parallel_state.model_parallel_is_initialized():
        with _subgroups_of_one_backend("nccl" if _has_nccl() else "gloo"):
            parallel_state.initialize_model_parallel(*wanted, create_gloo_process_groups=False)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _has_nccl() -> bool:
    return torch.cuda.is_available() and "nccl" in dist.get_backend_config()


@contextmanager
def _subgroups_of_one_backend(backend: str) -> Iterator[None]:
    """megatron-core's groups would inherit both backends of the default group: connections that nothing uses, on 1,024
    ranks ten for each that is needed.
    """
    create = parallel_state.create_group

    def create_group(*arguments: Any, **options: Any) -> Any:
        return create(*arguments, **{**options, "backend": options.get("backend") or backend})

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = create


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
