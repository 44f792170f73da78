"""What a rank looks at before it joins the others: its device, open files, the address to meet at, a compiler.

Owns: these checks and their messages; each is a function of what it is given, so that it is tested without a GPU.
Does not own: joining (``parallel.process_groups``).
"""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from growth_megatron.errors import ConfigError
from growth_megatron.parallel.collectives import environment_number

_WORLD = {"RANK": 0, "WORLD_SIZE": 1}
_OWN_FILES = 512  # of a rank beside its connections: data, checkpoints, libraries, logs


def device_index(environment: Mapping[str, str], devices: int) -> int:
    """The CUDA device of this rank among the visible ones.

    torchrun shows every rank all devices of the node, Slurm with ``--gpus-per-task=1`` each task its own, as device 0.

    Raises: ConfigError where a node has more ranks than devices.
    """
    local = int(environment.get("LOCAL_RANK", "0"))
    if local < devices:
        return local
    if devices == 1 and "TORCHELASTIC_RUN_ID" not in environment:
        return 0
    ranks = environment.get("LOCAL_WORLD_SIZE", str(local + 1))
    raise ConfigError(
        f"{ranks} ranks on this node, but {devices} visible GPUs; start {devices} (launch/torchrun.sh -n {devices}), "
        "or show it more with CUDA_VISIBLE_DEVICES"
    )


def allow_open_files(world_size: int, limits: tuple[int, int] | None = None) -> int:
    """Raise this process's limit of open files to what it may have; returns the limit.

    A rank has a connection to each other rank.

    Args:
        limits: soft and hard limit, for tests; default: this process's.

    Raises: ConfigError where the hard limit is too low for ``world_size`` ranks.
    """
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = world_size + _OWN_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"a process may open {hard} files here, and each of {world_size} ranks needs about {needed}; raise the "
            "limit: ulimit -n 65536 before the launch (Slurm: sbatch --propagate=NOFILE; docker: --ulimit nofile=65536)"
        )
    if limits is None and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Raise ConfigError unless torchrun's variables name a rank of a world, and where it meets the others."""
    rank, world_size = (environment_number(name, default, environment) for name, default in _WORLD.items())
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE {world_size}: allowed are 0 to {world_size - 1}")
    if not environment.get("MASTER_ADDR"):
        raise ConfigError("RANK is set, MASTER_ADDR is not; start with torchrun, or set it to the host of rank 0")
    port = environment.get("MASTER_PORT", "")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"MASTER_PORT is {port!r}; allowed: 1 to 65535, the same on all ranks")


def what_compiling_lacks() -> str | None:
    """What torch.compile needs for a GPU and this machine does not have; None if it has all."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton (pip install triton)"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "a C compiler (apt-get install gcc)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python.h (apt-get install python3-dev)"
    return None
