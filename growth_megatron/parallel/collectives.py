"""Agreement among the ranks of the default process group; without one, the only rank agrees with itself.

Owns: what needs torch.distributed alone: results, errors and flags that all ranks share, rank and world size as
torchrun announces them.
Does not own: the groups of a layout (``parallel.process_groups``), which load megatron-core.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from growth_megatron.errors import ConfigError

T = TypeVar("T")


def world_size_from_environment() -> int:
    """World size as torchrun announces it; 1 without torchrun. Needs no process group."""
    return environment_number("WORLD_SIZE", 1)


def rank_from_environment() -> int:
    """Rank as torchrun announces it; 0 without torchrun."""
    return environment_number("RANK", 0)


def environment_number(name: str, default: int, environment: Mapping[str, str] = os.environ) -> int:
    """A whole number out of the environment.

    Raises: ConfigError where the variable holds something else.
    """
    value = environment.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(
            f"the environment variable {name} is {value!r}, not a number; start with torchrun, or unset it"
        )
    return int(value)


def has_group() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This rank in the default group; 0 without one."""
    return dist.get_rank() if has_group() else 0


def world_size() -> int:
    """Ranks of the default group; 1 without one."""
    return dist.get_world_size() if has_group() else 1


def on_rank_zero(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 and give its result, or its error, to every rank.

    All ranks must call it. An error on rank 0 is raised everywhere, so nobody waits in a later collective.
    """
    if not has_group():
        return function()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        outcome = _outcome(function)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def on_all_ranks(function: Callable[[], T]) -> T:
    """Run ``function`` on every rank; if it fails on any, every rank raises the error of the lowest that failed.

    For work without collectives that can fail on one node alone, as reading its files can.
    """
    if not has_group():
        return function()
    value, error = _outcome(function)
    for failed in all_gather(error):
        if failed is not None:
            raise failed
    return cast(T, value)


def all_gather(value: T) -> list[T]:
    """The values of all ranks, by rank, on every rank."""
    if not has_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set on any rank."""
    return largest(float(flag)) > 0


def largest(value: float) -> float:
    """The largest ``value`` of all ranks, by gloo, which every default group has."""
    if not has_group():
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def _outcome(function: Callable[[], Any]) -> list[Any]:
    try:
        return [function(), None]
    except Exception as error:  # handed on to all ranks, which raise it
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return [None, RuntimeError(f"{type(error).__name__}: {error}")]
        return [None, error]
