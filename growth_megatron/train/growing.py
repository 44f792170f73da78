"""The growth between two stages as a run sees it: carried out, told, and put into the metrics once.

Owns: a stage's starting checkpoint out of another checkpoint, learning its maps included, and what is recorded of it.
Does not own: when a stage grows (``train.stages``), the learning (``train.learning``), the checkpoint (``growth``).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.folder.run_directory import ResumeChoice
from growth_megatron.checkpoint.origin import checkpoint_origin
from growth_megatron.config.lines import describe_options, geometry_changes
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.units import format_bytes
from growth_megatron.growth.execute import GrowthResult, grow_checkpoint
from growth_megatron.growth.layers import connection_rate
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.parallel import collectives
from growth_megatron.train.counters import Counters
from growth_megatron.train.learning import Learned, LearningPhase
from growth_megatron.train.loop import RunContext, StageLoop
from growth_megatron.train.metrics import FILE_NAME, read_metrics


def grow_stage(
    context: RunContext, choice: ResumeChoice, manifest: Manifest, counters: Counters, number: int
) -> GrowthResult | None:
    """Write the starting checkpoint of stage ``number`` out of ``choice``; all ranks share the work.

    None if the run is to stop while maps are learned for it.
    """
    config, stage = context.loaded.config, context.loaded.config.stages[number]
    assert choice.path is not None
    assert stage.growth is not None
    plan = plan_growth(manifest.geometry, stage.model, stage.growth, config.run.seed)
    policy = choose(stage.growth).state_policy
    path = choice.path
    origin = collectives.on_all_ranks(lambda: checkpoint_origin(path, whole=False))  # seen to be when it was chosen
    counters = counters.entering(stage, config.stages[manifest.stage])
    data = context.data.of(stage)
    learned: Learned | None = None
    if plan.is_learned:
        learned = LearningPhase(context, origin, plan, stage, counters).run()
        if learned is None:
            return None
        plan, counters = learned.plan, learned.counters
    collectives.on_rank_zero(lambda: context.directory.make_way(manifest.step, grown=True))  # a damaged one
    context.metrics.phase(f"growing {path}")
    with bytes_progress("growing") as progress:

        def report(done: int, total: int) -> None:
            context.watchdog.alive("growing", manifest.step)
            if collectives.rank_from_environment() == 0:
                progress(done, total)

        result = grow_checkpoint(
            origin,
            context.directory.checkpoint_path(manifest.step, grown=True),
            plan,
            policy,
            stage=number,
            config_hash=context.loaded.hash,
            counters={
                **dataclasses.asdict(counters),
                "data_fingerprint": dict(data.fingerprint),
                "branches": manifest.branches,
            },
            progress=report,
        )
    collectives.on_rank_zero(partial(_announce, context, manifest, plan, policy, result, learned))
    return result


def _announce(
    context: RunContext,
    manifest: Manifest,
    plan: GrowthPlan,
    policy: str,
    result: GrowthResult,
    learned: Learned | None,
) -> None:
    context.directory.point_latest(result.path)
    if context.copies is not None:
        context.copies.update()
    how = plan.operator + describe_options(plan.options, plan.seed)
    changes = ", ".join(geometry_changes(plan.source_geometry, plan.target_geometry)) or "the same geometry"
    layers, kept = plan.layers or (), ""
    if layers and layers != tuple(range(plan.source_geometry.num_layers)):
        kept = f"{100 * connection_rate(layers):.1f} % of layer connections kept, "
    if learned is not None:
        kept = "maps learned, "
        if learned.loss_before is not None and learned.loss_after is not None:
            kept = f"maps learned, validation loss {learned.loss_before:.4f} -> {learned.loss_after:.4f}, "
    context.metrics.log(
        "event",
        step=manifest.step,
        event="grow",
        message=f"grew by {how}: {changes} ({kept}optimizer state {policy}) in {result.seconds:.2f} s: "
        f"{format_bytes(result.bytes_written)} written, {format_bytes(result.bytes_linked)} linked",
    )


def record_growth(
    context: RunContext, path: Path, manifest: Manifest, loop: StageLoop, growth: GrowthResult | None
) -> float | None:
    """The validation loss just after a growth, which goes into the metrics with all else of it, once."""
    record = manifest.lineage[-1]
    if growth is None:  # this process began here: an earlier one may have come further
        known = collectives.on_rank_zero(partial(recorded, context.directory.path, "growth", manifest.step))
        if known:
            after: float | None = known[0]["validation_loss_after"]
            return after
    after = loop.validate()
    context.metrics.log(
        "growth",
        step=manifest.step,
        operator=record.operator,
        source=record.source,
        target=str(path),
        source_geometry=record.source_geometry.model_dump(),
        target_geometry=record.target_geometry.model_dump(),
        optimizer_state=record.optimizer_state,
        validation_loss_before=record.validation_loss_before,
        validation_loss_after=after,
        seconds=growth.seconds if growth else None,
        bytes_written=growth.bytes_written if growth else None,
    )
    return after


def recorded(directory: Path, kind: str, step: int) -> list[dict[str, Any]]:
    """What the metrics of a run directory hold of one kind at one step."""
    records = read_metrics(directory) if (directory / FILE_NAME).exists() else []
    return [line for line in records if line["kind"] == kind and line.get("step") == step]


def just_grown(manifest: Manifest) -> bool:
    """Whether a checkpoint is one that a growth made, before the first step of its stage."""
    return bool(manifest.lineage) and manifest.stage_step == 0 and manifest.lineage[-1].step == manifest.step
