"""Agreement among ranks for code that also runs without a process group, as commands on one machine do.

Owns: the same calls with and without a group. Does not own: the groups (``parallel.process_groups``), which this loads,
and megatron-core with it, only where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """Agreement among the ranks of the process group, where there is one."""

    def __init__(self) -> None:
        self.together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.together else 0
        self.count = dist.get_world_size() if self.together else 1

    def on_zero(self, function: Callable[[], T]) -> T:
        """The result, or the error, of rank 0 on every rank."""
        if not self.together:
            return function()
        from growth_megatron.parallel.process_groups import on_rank_zero  # loads megatron-core

        return on_rank_zero(function)

    def on_all(self, function: Callable[[], T]) -> T:
        """This rank's result; the error of any rank on every rank."""
        if not self.together:
            return function()
        from growth_megatron.parallel.process_groups import on_all_ranks

        return on_all_ranks(function)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        if not self.together:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values
