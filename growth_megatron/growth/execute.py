"""Carrying out a growth, the same on all ranks.

Owns: the way from a checked growth to the grown checkpoint, by new metadata over linked files (``growth.link``) or
written chunk by chunk (``checkpoint.torch_dist.writer``).
Does not own: the checks (``growth.checked``), either executor, the command line (``commands.grow``), stages
(``train.stages``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.files import FileOperations, expected_in
from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.folder.sums import summed_beside
from growth_megatron.checkpoint.huggingface.safetensors_file import packed
from growth_megatron.checkpoint.origin import Origin, checkpoint_origin
from growth_megatron.checkpoint.torch_dist.reader import COMMON_NAME
from growth_megatron.checkpoint.torch_dist.writer import write_checkpoint
from growth_megatron.growth.checked import WRITERS, CheckedGrowth, check_growth
from growth_megatron.growth.learned import MAPS_NAME
from growth_megatron.growth.lineage import grown_common, grown_manifest, grown_objects, job_fingerprint
from growth_megatron.growth.link import Linked, link_checkpoint
from growth_megatron.growth.rules import GrowthPlan, OptimizerState
from growth_megatron.growth.view import GrownSource
from growth_megatron.parallel.collectives import on_all_ranks, on_rank_zero


@dataclasses.dataclass(frozen=True)
class GrowthResult:
    """What a growth cost. ``bytes_written`` includes ``bytes_copied``, which is 0 where links could be made;
    ``bytes_resumed`` had been written by an earlier attempt.
    """

    path: Path
    manifest: Manifest
    seconds: float
    bytes_written: int
    bytes_linked: int = 0
    bytes_copied: int = 0
    bytes_resumed: int = 0


def grow_checkpoint(
    source: Path | Origin,
    target: Path,
    plan: GrowthPlan,
    optimizer_state: str,
    *,
    stage: int | None = None,
    config_hash: str | None = None,
    counters: Mapping[str, Any] | None = None,
    materialize: bool = False,
    overwrite: bool = False,
    files: FileOperations | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GrowthResult:
    """Check that ``plan`` fits ``source``, then ``carry_out`` the growth to ``target``.

    Args:
        source: a checkpoint of this library, or what ``find_origin`` found.
        optimizer_state: ``reset``, ``carry`` or ``asymmetric``.
        materialize: write all data anew, also where links to the source's files would do.
        overwrite: whether a checkpoint at ``target`` may be replaced.

    Raises, alike on all ranks:
        CheckpointError: the source is not whole, ``target`` exists, no space.
        GrowthError: the plan does not fit the source, or the source holds values that are not finite.
    """
    origin = source if isinstance(source, Origin) else on_all_ranks(lambda: checkpoint_origin(source))
    growth = check_growth(origin, plan, optimizer_state, target, materialize=materialize)
    return carry_out(
        growth,
        target,
        stage=stage,
        config_hash=config_hash,
        counters=counters,
        overwrite=overwrite,
        files=files,
        progress=progress,
    )


def carry_out(
    growth: CheckedGrowth,
    target: Path,
    *,
    stage: int | None = None,
    config_hash: str | None = None,
    counters: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    verify_source: bool = False,
    files: FileOperations | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GrowthResult:
    """Write the checkpoint ``target``; atomic, to be given again after a kill.

    With a process group all ranks call it alike, and share the work.

    Args:
        stage: index of the stage that goes on from the target; default: the one after the source's.
        config_hash: of the configuration the growth is part of; default: the source's.
        counters: fields of the manifest in which the stage that goes on differs from the source; default: none.
        overwrite: whether a checkpoint at ``target`` may be replaced.
        verify_source: read and sum the files that are linked, too.
        progress: called with the bytes done and in all, where data are written.

    Raises, alike on all ranks:
        CheckpointError: ``target`` exists, no space.
        DamagedError: what was read of the source does not have its checksums.
        GrowthError: the source holds values that are not finite.
    """
    started = time.perf_counter()
    files = files or FileOperations()
    origin, plan, policy = growth.origin, growth.plan, growth.policy
    manifest = grown_manifest(origin, plan, policy, stage, config_hash, counters)
    common = on_all_ranks(lambda: _common(origin, manifest, policy))
    with summed_beside(origin.path, growth.summed_files(verify_source)) as source_is_sound:
        if growth.can_link:
            source_is_sound()
            linked = on_rank_zero(lambda: _link(growth, target, manifest, common, files, overwrite))
            costs = dataclasses.asdict(linked) | {"manifest": linked.manifest}
            return GrowthResult(target, seconds=time.perf_counter() - started, **costs)
        written = write_checkpoint(
            GrownSource(origin.training_state(), plan, policy),
            target,
            manifest,
            common,
            objects=on_all_ranks(lambda: grown_objects(origin, plan)),
            extra_files=on_all_ranks(lambda: _extra_files(origin, plan)),
            fingerprint=job_fingerprint(manifest),
            writers=WRITERS,
            overwrite=overwrite,
            files=files,
            progress=progress,
            source_is_sound=source_is_sound,
        )
    return GrowthResult(
        target,
        written.manifest,
        time.perf_counter() - started,
        written.bytes_written,
        bytes_resumed=written.bytes_resumed,
    )


def _extra_files(origin: Origin, plan: GrowthPlan) -> dict[str, bytes]:
    """Of an earlier growth's maps the source has the only ones."""
    kept = {name: content for name, content in origin.extra_contents().items() if name != MAPS_NAME}
    return kept if plan.maps is None else {**kept, MAPS_NAME: packed(plan.maps)}


def _common(origin: Origin, manifest: Manifest, policy: OptimizerState) -> dict[str, Any]:
    with expected_in(origin.path / COMMON_NAME):
        return grown_common(origin, manifest, policy)


def _link(
    growth: CheckedGrowth,
    target: Path,
    manifest: Manifest,
    common: Mapping[str, Any],
    files: FileOperations,
    overwrite: bool,
) -> Linked:
    assert growth.links is not None
    return link_checkpoint(
        growth.origin.path, growth.origin.extra_files(), growth.links, target, manifest, common, files, overwrite
    )
