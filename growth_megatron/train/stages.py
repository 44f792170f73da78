"""A run from wherever it stands to its end: resume or start, train a stage, grow, train the next.

Owns: the walk over the stages, the growth between two of them as the run sees it.
Does not own: what a resumed run checks (``train.resume``), steps within a stage (``train.loop``), ``growth`` itself.

The state of a run is its newest valid checkpoint, and which samples are passed over from there (after a rollback, which
metrics.jsonl records). Every turn of the walk looks at that checkpoint: in the middle of a stage it goes on training,
at a stage's end it grows, at the run's end it is done. So a run killed anywhere resumes when the same command is
re-run, and growing mid-run takes the very path of resuming.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.folder.run_directory import ResumeChoice, RunDirectory
from growth_megatron.checkpoint.origin import checkpoint_origin
from growth_megatron.checkpoint.torch_dist.live_model import load_from_source, load_into_model
from growth_megatron.checkpoint.torch_dist.optimizer_groups import describe_multipliers
from growth_megatron.config.checks import check_world_size
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.lines import describe_options, geometry_changes
from growth_megatron.config.load import LoadedConfig
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.schema import EvaluationConfig, RunConfig
from growth_megatron.config.units import format_bytes
from growth_megatron.data.fingerprint import check_fingerprint
from growth_megatron.data.mixture import describe_draws
from growth_megatron.errors import (
    EXIT_FAULT,
    EXIT_NEXT_LAYOUT,
    EXIT_OK,
    EXIT_STOPPED_EARLY,
    CheckpointError,
    DamagedError,
    GrowthMegatronError,
)
from growth_megatron.growth.execute import GrowthResult, grow_checkpoint
from growth_megatron.growth.layers import connection_rate
from growth_megatron.growth.live import live_map
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import plan_growth, stage_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.init import InitSource
from growth_megatron.parallel import collectives, process_groups
from growth_megatron.train.counters import Counters
from growth_megatron.train.data import RunData
from growth_megatron.train.engine import Engine
from growth_megatron.train.health import RollBack
from growth_megatron.train.learning import Learned, LearningPhase, forget_phase
from growth_megatron.train.loop import RunContext, StageLoop, TaskEvaluation
from growth_megatron.train.metrics import FILE_NAME, Metrics, MetricsLogger, NullMetrics, read_metrics
from growth_megatron.train.parameter_groups import ParameterGroups
from growth_megatron.train.plan import tokens_of_stages, total_flops
from growth_megatron.train.resilience import LAUNCHER_NOTICES_S, StopRequest, open_rank_log
from growth_megatron.train.resume import NEXT_LAYOUT_NAME, choose_start, find_start, grows_at_start
from growth_megatron.train.watchdog import Watchdog

PrepareTasks = Callable[[EvaluationConfig, Path | None], TaskEvaluation]
"""From what a configuration asks for, and the run's tokenizer, to what does it; on all ranks alike."""


def train(loaded: LoadedConfig, prepare_tasks: PrepareTasks | None = None) -> int:
    """Run or continue the run of ``loaded``; returns an exit code of ``growth_megatron.errors``.

    ``prepare_tasks`` comes from the room above; without it ``evaluation.tasks`` are left out.

    Raises: GrowthMegatronError, on all ranks alike.
    """
    config = loaded.config
    world_size = collectives.world_size_from_environment()
    for index in range(len(config.stages)):
        check_world_size(config, index, required_world_size(config, index, world_size))
    rank = collectives.rank_from_environment()
    stop = StopRequest(rank)
    stop.install()
    stop.outlive_no_launcher()
    if any(stage.training.deterministic for stage in config.stages):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA begins
    started = process_groups.start()
    directory = RunDirectory(config.run.directory)
    metrics: Metrics = NullMetrics()
    watchdog: Watchdog | None = None
    try:
        choice = find_start(directory, loaded)
        log = open_rank_log(directory.path, rank)
        watchdog = Watchdog(log, config.run.timeout_s)
        loggers: list[Metrics] = []
        collectives.on_rank_zero(lambda: loggers.append(_open_metrics(directory, loaded)))
        metrics = loggers[0] if loggers else metrics
        data = RunData(config, directory.path, choice.path)
        data.check(choice.manifest.stage if choice.manifest else 0)
        context = RunContext(loaded, directory, metrics, stop, watchdog, data, world_size)
        if config.evaluation.tasks and prepare_tasks is not None:
            tokenizer = config.stages[0].data.tokenizer or choice.path
            tasks = prepare_tasks(config.evaluation, Path(tokenizer) if tokenizer else None)
            context = dataclasses.replace(context, evaluate_tasks=tasks)
        _rewind(context, choice)
        collectives.on_rank_zero(partial(_say_start, context, choice))
        code = _walk(context, choice)
        stop.finish()
        return code
    except RuntimeError:
        logging.exception("rank %d cannot go on", rank)  # to its log
        if world_size > 1 and stop.comes_within(LAUNCHER_NOTICES_S):
            return EXIT_FAULT  # another rank is gone, and the launcher names it
        raise
    finally:
        if watchdog is not None:
            watchdog.close()
        metrics.close()
        if started:
            process_groups.stop()


def required_world_size(config: RunConfig, stage: int, world_size: int) -> int:
    """Ranks that ``stage`` wants: what its layout says, else the ``world_size`` at hand, made a multiple of it."""
    parallel = config.stages[stage].parallel
    if parallel.data_parallel_size is not None:
        return parallel.model_parallel_size * parallel.data_parallel_size
    if stage == 0:
        return world_size  # the first stage is started by hand: a world size that does not fit it is an error
    return -(-world_size // parallel.model_parallel_size) * parallel.model_parallel_size


def _walk(context: RunContext, choice: ResumeChoice) -> int:
    config = context.loaded.config
    growth: GrowthResult | None = None
    before: tuple[int, int, bool] | None = None
    rollbacks: Counter[int] = Counter()
    while True:
        manifest = choice.manifest
        counters = _counters(context, manifest)
        here = counters.stage, counters.stage_step, choice.path is not None
        if before is not None and here <= before:
            raise CheckpointError(
                f"the checkpoint just written is not to be seen: the newest valid one is {choice.path}. Does the file "
                "system of run.directory show all nodes the same files? Re-run the same command to resume"
            )
        before = here
        if counters.ends_run(config):
            context.metrics.log("event", step=counters.step, event="done", message=_done_message(context, counters))
            return EXIT_OK
        try:
            at_start = choice.path is not None and grows_at_start(config, choice.path)
            grows = manifest is not None and (at_start or counters.ends_stage(config))
            stage = counters.stage + (grows and not at_start)
            learns = grows and choose(config.stages[stage].growth or GrowthConfig()).is_learned
            wanted = required_world_size(config, stage, context.world_size)
            if wanted != context.world_size and (learns or not grows):  # another growth needs no layout
                return collectives.on_rank_zero(partial(_hand_over, context, counters, stage, wanted))
            if manifest is not None and grows:
                growth = _grow(context, choice, manifest, counters, stage)
                if growth is None:
                    return EXIT_STOPPED_EARLY
                before = None if at_start else before
            else:
                ended = _train_stage(context, choice, counters, growth)
                growth = None
                if isinstance(ended, RollBack):
                    choice, before = _roll_back(context, ended, rollbacks, counters.stage), None
                    continue
                if not ended:
                    return EXIT_STOPPED_EARLY
        except DamagedError as error:
            assert choice.path is not None
            context.directory.refuse(choice.path, str(error))
            choice, growth, before = find_start(context.directory, context.loaded), None, None
            _rewind(context, choice)
            continue
        choice = collectives.on_rank_zero(lambda: context.directory.choose_resume("must"))


def _counters(context: RunContext, manifest: Manifest | None) -> Counters:
    """Where the run stands: as its checkpoint says, past the samples that a rollback to it passes over."""
    counters = Counters.of_manifest(manifest) if manifest else Counters()
    records = collectives.on_rank_zero(partial(_recorded, context.directory.path, "event", counters.step))
    skipped = [record["skipped_samples"] for record in records if record["event"] == "rollback"]
    return dataclasses.replace(counters, skipped_samples=max([counters.skipped_samples, *skipped]))


def _roll_back(context: RunContext, order: RollBack, rollbacks: Counter[int], stage: int) -> ResumeChoice:
    """The checkpoint to go on from, which is put on record together with the samples to pass over.

    Raises: GrowthMegatronError if it was gone back to too often.
    """
    settings = context.loaded.config.checkpoint
    mode = "must" if context.directory.checkpoints() else "auto" if settings.resume == "never" else settings.resume
    choice = collectives.on_rank_zero(lambda: choose_start(context.directory, settings, mode))
    start = Counters.of_manifest(choice.manifest) if choice.manifest else Counters()
    rollbacks[start.step] += 1
    if rollbacks[start.step] > context.loaded.config.stages[stage].training.non_finite_limit:
        raise GrowthMegatronError(
            f"{order.reason}, after {rollbacks[start.step] - 1} rollbacks to step {start.step}, and other samples did "
            "not help. Give the command again with a lower schedule.learning_rate, or a higher "
            "training.non_finite_limit: it goes on from there"
        )
    _rewind(context, choice)
    skipped = order.next_sample - start.consumed_samples
    context.metrics.log(
        "event",
        step=start.step,
        event="rollback",
        message=f"{order.reason}: back to {choice.path or 'the start'}, on from sample {order.next_sample:,} "
        f"({skipped:,} passed over)",
        skipped_samples=skipped,
    )
    return choice


def _train_stage(
    context: RunContext, choice: ResumeChoice, counters: Counters, growth: GrowthResult | None
) -> bool | RollBack:
    """Build the stage at its layout, load it and train it. False if stopped early."""
    config, stage = context.loaded.config, context.loaded.config.stages[counters.stage]
    process_groups.set_layout(stage.parallel, config.run.seed)
    engine = Engine(stage, choice.manifest.multipliers if choice.manifest else {})
    if choice.path is None:
        load_from_source(InitSource(stage.model, config.run.seed), engine.models)
        engine.finish()
    else:
        engine.finish()
        try:
            load_into_model(choice.path, engine.models, engine.optimizer)
        except DamagedError:
            engine.close()
            raise
        assert choice.manifest is not None
        engine.live = live_map(choice.manifest, engine.models)
    growth_of_stage = stage_growth(choice.manifest)
    if growth_of_stage is not None or stage.optimizer.freeze:
        engine.groups = ParameterGroups(
            stage.optimizer, growth_of_stage, stage.model, engine.models, engine.own_optimizers()
        )
    context.metrics.log("event", step=counters.step, event="stage", message=_stage_message(context, counters, choice))
    if engine.multipliers:
        message = describe_multipliers(engine.multipliers)
        context.metrics.log("event", step=counters.step, event="multipliers", message=message)
    loop = StageLoop(context, engine, choice.manifest, counters)
    if choice.path is not None and choice.manifest is not None and _just_grown(choice.manifest):
        collectives.on_rank_zero(partial(forget_phase, context.directory.path))
        loop.note_loss_after_growth(_record_growth(context, choice.path, choice.manifest, loop, growth))
    finished = loop.run()
    engine.close()
    del loop, engine  # before the next stage allocates
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return finished


def _grow(
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
    collectives.on_rank_zero(partial(_announce_growth, context, manifest, plan, policy, result, learned))
    return result


def _announce_growth(
    context: RunContext,
    manifest: Manifest,
    plan: GrowthPlan,
    policy: str,
    result: GrowthResult,
    learned: Learned | None,
) -> None:
    context.directory.point_latest(result.path)
    how = plan.operator + describe_options(plan.options, plan.seed)
    changes = ", ".join(geometry_changes(plan.source_geometry, plan.target_geometry)) or "the same geometry"
    layers, kept = plan.layers or (), ""
    if layers != tuple(range(plan.source_geometry.num_layers)):
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


def _record_growth(
    context: RunContext, path: Path, manifest: Manifest, loop: StageLoop, growth: GrowthResult | None
) -> float | None:
    """The validation loss just after a growth, which goes into the metrics with all else of it, once."""
    record = manifest.lineage[-1]
    if growth is None:  # this process began here: an earlier one may have come further
        known = collectives.on_rank_zero(partial(_recorded, context.directory.path, "growth", manifest.step))
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


def _recorded(directory: Path, kind: str, step: int) -> list[dict[str, Any]]:
    records = read_metrics(directory) if (directory / FILE_NAME).exists() else []
    return [line for line in records if line["kind"] == kind and line.get("step") == step]


def _open_metrics(directory: RunDirectory, loaded: LoadedConfig) -> MetricsLogger:
    return MetricsLogger(
        directory.path,
        loaded.config.logging,
        {stage.name: stage.num_steps for stage in loaded.config.stages},
        total_flops=float(total_flops(loaded.config)),
        config=loaded.config.model_dump(mode="json"),
    )


def _rewind(context: RunContext, choice: ResumeChoice) -> None:
    manifest = choice.manifest
    if manifest is None:
        collectives.on_rank_zero(partial(context.metrics.rewind, -1))
        return
    config = context.loaded.config
    if manifest.data_fingerprint is not None:
        now = context.data.of(config.stages[manifest.stage]).fingerprint
        check_fingerprint(manifest.data_fingerprint, now, choice.path or "PATH")
    ends_stage = Counters.of_manifest(manifest).ends_stage(config)
    collectives.on_rank_zero(partial(context.metrics.rewind, manifest.step, before_growth=ends_stage))


def _say_start(context: RunContext, choice: ResumeChoice) -> None:
    """What is drawn of the data, and of which run this one is a branch."""
    config = context.loaded.config
    step = choice.manifest.step if choice.manifest else 0
    context.metrics.log(
        "event", step=step, event="data", message=describe_draws(config.stages, tokens_of_stages(config))
    )
    new = choice.manifest.branches[-1:] if choice.manifest else ()
    if choice.path is not None and any(branch.source == str(choice.path.resolve()) for branch in new):
        data = "its data go on" if config.checkpoint.data == "same" else "other data begin"
        message = f"branched off {choice.path}; {data}"
        context.metrics.log("event", step=step, event="branch", message=message, source=str(choice.path.resolve()))


def _hand_over(context: RunContext, counters: Counters, number: int, world_size: int) -> int:
    """Say which world size the next stage needs, for the launcher and for people."""
    stage = context.loaded.config.stages[number]
    layout = {"stage": stage.name, "world_size": world_size, "parallel": stage.parallel.model_dump()}
    (context.directory.path / NEXT_LAYOUT_NAME).write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")
    context.metrics.log(
        "event",
        step=counters.step,
        event="next_layout",
        message=f"stage {stage.name} needs {world_size} ranks, here are {context.world_size}: re-run the same command "
        f"with {world_size} (launch/torchrun.sh does so by itself)",
    )
    return EXIT_NEXT_LAYOUT


def _just_grown(manifest: Manifest) -> bool:
    return bool(manifest.lineage) and manifest.stage_step == 0 and manifest.lineage[-1].step == manifest.step


def _stage_message(context: RunContext, counters: Counters, choice: ResumeChoice) -> str:
    config = context.loaded.config
    stage = config.stages[counters.stage]
    model, parallel = stage.model, stage.parallel
    sequence = " +SP" if parallel.sequence_parallel else ""
    return (
        f"stage {stage.name} ({counters.stage + 1} of {len(config.stages)}): {model.num_layers} layers x "
        f"{model.hidden_size}, TP {parallel.tensor_parallel_size}{sequence} PP {parallel.pipeline_parallel_size} "
        f"VPP {parallel.model_chunks} DP {context.world_size // parallel.model_parallel_size}, "
        f"{stage.training.precision}, "
        f"steps {counters.stage_step} to {stage.num_steps} of {stage.tokens_per_step:,} tokens, "
        + (f"from {choice.path}" if choice.path else f"initialised with seed {config.run.seed}")
    )


def _done_message(context: RunContext, counters: Counters) -> str:
    return (
        f"run complete: {counters.step} steps, {counters.consumed_tokens:,} tokens, {counters.flops:.3e} FLOPs; "
        f"checkpoint {context.directory.latest_path}"
    )
