"""A growth that has been looked at: that it can be carried out, by which executor, at what cost.

Owns: the checks before the first byte, and ``CheckedGrowth``, which hands on what they found.
Does not own: the plan (``growth.plan``), the executors (``growth.link``, ``checkpoint.torch_dist.writer``), the way
from here to the grown checkpoint (``growth.execute``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from growth_megatron.checkpoint.folder.manifest import FileEntry
from growth_megatron.checkpoint.folder.target import same_file_system
from growth_megatron.checkpoint.origin import Origin
from growth_megatron.checkpoint.torch_dist.reader import DATA_SUFFIX
from growth_megatron.errors import GrowthError
from growth_megatron.growth.learned import MAPS_NAME
from growth_megatron.growth.learned_maps import learned_reading
from growth_megatron.growth.link import LinkPlan, can_link, plan_links
from growth_megatron.growth.masks import masked_plan
from growth_megatron.growth.plan import check_source_tensors
from growth_megatron.growth.rules import GrowthPlan, OptimizerState, check_optimizer_state
from growth_megatron.model.tensors import MASTER_PREFIX, MOMENT_PREFIXES, split_state_key
from growth_megatron.parallel.collectives import on_rank_zero

WRITERS = 2
"""Threads per rank that compute and write chunks."""
_BYTES_PER_WRITER = 64 * 2**20  # a chunk of the target in float32, what it is computed from, and noise
_COMMON_BYTES = 4096  # of common.pt, about

Executor = Literal["link", "copy", "write"]


@dataclass(frozen=True)
class Costs:
    """What a growth will read, write and link, in bytes, and the memory of a rank beside the libraries' own."""

    read_bytes: int
    written_bytes: int
    linked_bytes: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class CheckedGrowth:
    """A plan that fits its origin. ``check_growth`` makes one; what it says is worked out once, when it is asked.

    ``weights_only``: the target is a Hugging Face folder, without any optimizer state; ``dtype``: of its weights,
    if another than the origin's.
    """

    origin: Origin
    plan: GrowthPlan
    policy: OptimizerState
    target: Path | None
    materialize: bool = False
    weights_only: bool = False
    dtype: torch.dtype | None = None

    @cached_property
    def can_link(self) -> bool:
        """Whether the origin's data files hold all that the target needs."""
        stored = None if self.materialize or self.weights_only else self.origin.linkable
        return stored is not None and can_link(self.plan, stored.metadata)

    @cached_property
    def links(self) -> LinkPlan | None:
        """The grown checkpoint over the origin's data files; None where data have to be written."""
        if not self.can_link:
            return None
        assert self.origin.linkable is not None
        return plan_links(self.origin.linkable, self.origin.manifest.files, self.plan, self.policy)

    def summed_files(self, verify_source: bool) -> dict[str, FileEntry]:
        """Files of the origin that are read for the target; with ``verify_source`` also those that are linked."""
        files = self.origin.manifest.files
        read_data = verify_source or not self.can_link
        return {name: entry for name, entry in files.items() if read_data or not name.endswith(DATA_SUFFIX)}

    @cached_property
    def executor(self) -> Executor:
        """``copy`` is ``link`` where the target is on another file system."""
        if not self.can_link:
            return "write"
        return "link" if self.target is None or same_file_system(self.origin.path, self.target) else "copy"

    @cached_property
    def costs(self) -> Costs:
        """Judged by metadata alone."""
        if self.links is not None:
            return self._linked(self.links)
        return self._written()

    def _linked(self, links: LinkPlan) -> Costs:
        held, metadata = self.origin.manifest, len(links.metadata)
        small = sum(held.files[name].size_bytes for name in self.origin.extra_files())
        small += len(held.model_dump_json(indent=1)) + _COMMON_BYTES
        data = sum(entry.size_bytes for entry in links.data_files.values())
        copied = data if self.executor == "copy" else 0
        written = metadata + len(links.zeros) + small + copied
        return Costs(metadata + copied, written, data - copied, peak_memory_bytes=4 * metadata)

    def _written(self) -> Costs:
        source, stored = self.origin.training_state(), set(self.origin.tensors.keys())
        specs = {split_state_key(key)[0]: (key, source.spec(key).dtype) for key in source.keys()}
        read = written = 0
        for rule in self.plan.rules:
            for prefix, (example, dtype) in specs.items():
                if prefix and self.weights_only:
                    continue
                if prefix in MOMENT_PREFIXES and not rule.keeps_moments(self.policy):
                    continue
                if rule.fill != "zeros":
                    written += math.prod(rule.shape) * (self.dtype or dtype).itemsize
                from_master = prefix == "" and MASTER_PREFIX in specs and not rule.is_selection
                if rule.source is not None and not from_master:  # a computed weight is its master, cast
                    read_dtype = dtype if example in stored else specs[""][1]  # a fresh master is its weight, widened
                    read += math.prod(rule.source_shape) * read_dtype.itemsize
        memory = WRITERS * _BYTES_PER_WRITER
        if self.plan.is_learned:
            base = specs.get(MASTER_PREFIX, specs[""])[1].itemsize
            read, largest = learned_reading(self.plan)
            read, memory = read * base, memory + 8 * (WRITERS + 1) * largest  # in float64, for each writer and the next
        return Costs(read, written, 0, memory)


def check_growth(
    origin: Origin,
    plan: GrowthPlan,
    optimizer_state: str,
    target: Path | None = None,
    *,
    materialize: bool = False,
    weights_only: bool = False,
    dtype: torch.dtype | None = None,
    metadata_alone: bool = False,
) -> CheckedGrowth:
    """Whether ``plan`` fits ``origin``; with a process group all ranks call it alike.

    A run that diverged has non-finite values everywhere, so one row of each tensor tells; the executor that computes
    values looks at all of them. With ``metadata_alone`` no tensor is read.

    Raises, alike on all ranks:
        GrowthError: the plan is for another source, or that holds values that are not finite or no moments to carry.
    """
    policy = check_optimizer_state(optimizer_state)
    if origin.geometry != plan.source_geometry:
        raise GrowthError(
            f"the plan grows {plan.source_geometry!r} but {origin.path} holds {origin.geometry!r}; plan from the latter"
        )
    check_source_tensors(plan, origin.tensors)
    if masked_plan(origin.manifest) is not None:
        raise GrowthError(
            f"{origin.path} is of a growth whose masks are not open yet; train it on until they are and grow that, or "
            "export it with export-hf, which folds the masks into the weights, and grow the folder"
        )
    if plan.is_learned and plan.maps is None:
        raise GrowthError(
            f"{plan.operator} needs maps, which a run learns: give the growth to a stage (growth: {{operator: "
            f"{plan.operator}}}), or name a checkpoint that was grown so, or its {MAPS_NAME}, with --maps"
        )
    if plan.ramps and weights_only:
        raise GrowthError(
            f"{plan.operator} opens its masks in training, and a Hugging Face folder has none; write a checkpoint "
            "instead, or use random"
        )
    if policy != "reset" and not origin.has_moments:
        raise GrowthError(f"optimizer_state is {policy} but {origin.path} holds no optimizer state; use reset")
    if not metadata_alone:
        on_rank_zero(lambda: _check_finite(origin))
    return CheckedGrowth(origin, plan, policy, target, materialize, weights_only, dtype)


def _check_finite(origin: Origin) -> None:
    for key in origin.tensors.keys():
        shape = origin.tensors.spec(key).shape
        region = tuple(slice(0, size if axis or len(shape) == 1 else min(1, size)) for axis, size in enumerate(shape))
        if not torch.isfinite(origin.tensors.read(key, region)).all():
            raise GrowthError(
                f"{origin.path}: {key} holds values that are not finite; grow an earlier checkpoint of the run"
            )
