"""Carrying out a growth: which executor serves, the checks before the first byte, the same on all ranks.

Owns: the choice between new metadata over linked files (``growth.link``) and a checkpoint written chunk by chunk
(``checkpoint.torch_dist.writer``); the look at the source's values.
Does not own: the plan, either executor, the command line (``commands.grow``), stages (``train.stages``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch

from growth_megatron.checkpoint.folder.commit import check_target
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import Manifest, read_manifest, validate_checkpoint
from growth_megatron.checkpoint.interchange import LocatedSource
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.checkpoint.torch_dist.writer import FORMAT_NAME, write_checkpoint
from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.growth.lineage import grown_common, grown_manifest, grown_objects, job_fingerprint
from growth_megatron.growth.link import can_link, link_checkpoint, other_files
from growth_megatron.growth.plan import check_source_tensors
from growth_megatron.growth.rules import GrowthPlan, OptimizerState, check_optimizer_state
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.tensors import MOMENT_PREFIXES, TensorSource, WithFreshOptimizer
from growth_megatron.parallel.collectives import on_all_ranks, on_rank_zero

WRITERS = 2
"""Threads per rank that compute and write chunks."""


@dataclasses.dataclass(frozen=True)
class GrowthResult:
    """What a growth cost. ``bytes_written`` includes ``bytes_copied``, which is 0 where links could be made;
    ``bytes_resumed`` had been written by an earlier attempt."""

    path: Path
    manifest: Manifest
    seconds: float
    bytes_written: int
    bytes_linked: int = 0
    bytes_copied: int = 0
    bytes_resumed: int = 0


def grow_checkpoint(
    source: Path | LocatedSource,
    target: Path,
    plan: GrowthPlan,
    optimizer_state: str,
    *,
    stage: int | None = None,
    config_hash: str | None = None,
    materialize: bool = False,
    files: FileOperations | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GrowthResult:
    """Write the checkpoint ``target``: ``source`` grown by ``plan``; atomic, to be given again after a kill.

    With a process group all ranks call it alike, and share the work.

    Args:
        source: a checkpoint of this library, or what ``locate_source`` found.
        optimizer_state: ``reset``, ``carry`` or ``asymmetric``.
        stage: index of the stage that goes on from the target; default: the one after the source's.
        config_hash: of the configuration the growth is part of; default: the source's.
        materialize: write all data anew, also where links to the source's files would do.
        progress: called with the bytes done and in all, where data are written.

    Raises, alike on all ranks:
        CheckpointError: the source is not whole, ``target`` exists, no space.
        GrowthError: the plan does not fit the source, or the source holds values that are not finite.
    """
    started = time.perf_counter()
    files = files or FileOperations()
    policy = check_optimizer_state(optimizer_state)
    origin = source if isinstance(source, LocatedSource) else on_all_ranks(lambda: _located(source))
    on_rank_zero(lambda: check_origin(origin, plan, policy))
    on_rank_zero(lambda: check_target(target))
    manifest = grown_manifest(origin, plan, policy, stage, config_hash)
    common = on_all_ranks(lambda: grown_common(origin, manifest, policy))
    if not materialize and (held := _linkable(origin, plan)) is not None:
        checkpoint, source_manifest = held
        linked = on_rank_zero(
            lambda: link_checkpoint(checkpoint, source_manifest, target, plan, policy, manifest, common, files)
        )
        costs = dataclasses.asdict(linked) | {"manifest": linked.manifest}
        return GrowthResult(target, seconds=time.perf_counter() - started, **costs)
    written = write_checkpoint(
        GrownSource(with_optimizer(origin), plan, policy),
        target,
        manifest,
        common,
        objects=on_all_ranks(lambda: grown_objects(origin, plan.layers or ())),
        extra_files=on_all_ranks(lambda: _extra_files(origin)),
        fingerprint=job_fingerprint(manifest),
        writers=WRITERS,
        files=files,
        progress=progress,
    )
    return GrowthResult(
        target,
        written.manifest,
        time.perf_counter() - started,
        written.bytes_written,
        bytes_resumed=written.bytes_resumed,
    )


def _located(path: Path) -> LocatedSource:
    if (reason := validate_checkpoint(path)) is not None:
        raise CheckpointError(f"cannot grow {path}: {reason}")
    manifest = read_manifest(path)
    return LocatedSource(path, DistCheckpoint(path), manifest.geometry, manifest)


def _linkable(origin: LocatedSource, plan: GrowthPlan) -> tuple[DistCheckpoint, Manifest] | None:
    """The checkpoint whose files the target can share, if it can."""
    stored = origin.source
    if origin.manifest is None or not isinstance(stored, DistCheckpoint) or not can_link(plan, stored.metadata):
        return None
    return stored, origin.manifest


def with_optimizer(origin: LocatedSource) -> TensorSource:
    """The tensors of a training checkpoint; a Hugging Face folder's with masters and zero moments."""
    return origin.source if origin.manifest is not None else WithFreshOptimizer(origin.source)


def check_origin(origin: LocatedSource, plan: GrowthPlan, policy: OptimizerState) -> None:
    """Raises CheckpointError or GrowthError unless ``plan`` fits ``origin``; reads a little of each tensor.

    A run that diverged has non-finite values everywhere, so one row of each tensor tells; the executor that computes
    values looks at all of them.
    """
    if origin.manifest is not None and (reason := validate_checkpoint(origin.path)) is not None:
        raise CheckpointError(f"cannot grow {origin.path}: {reason}")
    if origin.geometry != plan.source_geometry:
        raise GrowthError(
            f"the plan grows {plan.source_geometry!r} but {origin.path} holds {origin.geometry!r}; plan from the latter"
        )
    check_source_tensors(plan, origin.source)
    keys = origin.source.keys()
    if policy != "reset" and not any(key.startswith(MOMENT_PREFIXES) for key in keys):
        raise GrowthError(f"optimizer_state is {policy} but {origin.path} holds no optimizer state; use reset")
    for key in keys:
        shape = origin.source.spec(key).shape
        region = tuple(slice(0, size if axis or len(shape) == 1 else min(1, size)) for axis, size in enumerate(shape))
        if not torch.isfinite(origin.source.read(key, region)).all():
            raise GrowthError(
                f"{origin.path}: {key} holds values that are not finite; grow an earlier checkpoint of the run"
            )


def _extra_files(origin: LocatedSource) -> dict[str, bytes]:
    if origin.manifest is None:
        return {}
    names = [name for name in other_files(origin.manifest) if name != FORMAT_NAME]
    return {name: (origin.path / name).read_bytes() for name in names}
