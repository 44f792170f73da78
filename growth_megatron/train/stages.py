"""A run from wherever it stands to its end: resume or start, train a stage, grow, train the next.

Owns: the walk over the stages.
Does not own: the growth between two of them (``train.growing``), what a resumed run checks (``train.resume``), steps
within a stage (``train.loop``).

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
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.folder.run_directory import ResumeChoice, RunDirectory
from growth_megatron.checkpoint.folder.store import Store, StoreCopies
from growth_megatron.checkpoint.torch_dist.live_model import load_from_source, load_into_model
from growth_megatron.checkpoint.torch_dist.optimizer_groups import describe_multipliers
from growth_megatron.config.checks import check_world_size
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.load import LoadedConfig
from growth_megatron.config.run_schema import EvaluationConfig, RunConfig
from growth_megatron.data.fingerprint import check_fingerprint
from growth_megatron.data.mixture import describe_draws
from growth_megatron.errors import (
    EXIT_FAULT,
    EXIT_NEXT_LAYOUT,
    EXIT_OK,
    EXIT_STOPPED_EARLY,
    CheckpointError,
    DamagedError,
    DataError,
    GrowthMegatronError,
)
from growth_megatron.growth.execute import GrowthResult
from growth_megatron.growth.live import live_map
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import stage_growth
from growth_megatron.model.init import InitSource
from growth_megatron.parallel import collectives, process_groups
from growth_megatron.train.console import say_phase
from growth_megatron.train.counters import Counters
from growth_megatron.train.data import RunData
from growth_megatron.train.engine import Engine
from growth_megatron.train.growing import grow_stage, just_grown, record_growth, recorded
from growth_megatron.train.health import RollBack
from growth_megatron.train.learning import forget_phase
from growth_megatron.train.loop import RunContext, StageLoop, TaskEvaluation
from growth_megatron.train.metrics import FILE_NAME, Metrics, MetricsLogger, NullMetrics, read_metrics
from growth_megatron.train.parameter_groups import ParameterGroups
from growth_megatron.train.plan import tokens_of_stages
from growth_megatron.train.position import position_of
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
    copies: list[StoreCopies] = []  # on rank 0
    try:
        say_phase(f"looking for a checkpoint in {directory.path}")
        choice = find_start(directory, loaded)
        log = open_rank_log(directory.path, rank)
        watchdog = Watchdog(log, config.run.timeout_s)
        loggers: list[Metrics] = []
        collectives.on_rank_zero(lambda: loggers.append(_open_metrics(directory, loaded)))
        metrics = loggers[0] if loggers else metrics
        metrics.phase("reading data")
        data = RunData(config, directory.path, choice.path)
        data.check(choice.manifest.stage if choice.manifest else 0)
        collectives.on_rank_zero(lambda: copies.extend(_copies(directory, config)))
        copying = copies[0] if copies else None
        context = RunContext(loaded, directory, metrics, stop, watchdog, data, world_size, copies=copying)
        if config.evaluation.tasks and prepare_tasks is not None:
            tokenizer = config.stages[0].data.tokenizer or choice.path
            tasks = prepare_tasks(config.evaluation, Path(tokenizer) if tokenizer else None)
            context = dataclasses.replace(context, evaluate_tasks=tasks)
        _rewind(context, choice)
        collectives.on_rank_zero(partial(_say_start, context, choice))
        code = _walk(context, choice)
        _finish_copies(context)  # no other rank waits for it
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
        for copying in copies:
            copying.close()
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
                growth = grow_stage(context, choice, manifest, counters, stage)
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
    records = collectives.on_rank_zero(partial(recorded, context.directory.path, "event", counters.step))
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
    context.metrics.phase(f"building the model of stage {stage.name}")
    engine = Engine(stage, choice.manifest.multipliers if choice.manifest else {})
    if choice.path is None:
        load_from_source(InitSource(stage.model, config.run.seed), engine.models)
        engine.finish()
    else:
        engine.finish()
        context.metrics.phase(f"loading {choice.path}")
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
    message = _stage_message(context, counters, choice)
    here = {"step": counters.step, "stage": stage.name, "stage_step": counters.stage_step}
    context.metrics.log("event", event="stage", message=message, **here)
    if engine.multipliers:
        message = describe_multipliers(engine.multipliers)
        context.metrics.log("event", step=counters.step, event="multipliers", message=message)
    loop = StageLoop(context, engine, choice.manifest, counters)
    if choice.path is not None and choice.manifest is not None and just_grown(choice.manifest):
        collectives.on_rank_zero(partial(forget_phase, context.directory.path))
        loop.note_loss_after_growth(record_growth(context, choice.path, choice.manifest, loop, growth))
    finished = loop.run()
    engine.close()
    del loop, engine  # before the next stage allocates
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return finished


def _copies(directory: RunDirectory, config: RunConfig) -> Iterator[StoreCopies]:
    """To the store, where there is one; what an earlier process did not copy comes first."""
    if config.checkpoint.store is not None:
        copies = StoreCopies(Store(config.checkpoint.store), directory)
        copies.update()
        yield copies


def _finish_copies(context: RunContext) -> None:
    if context.copies is None:
        return
    context.copies.finish(partial(context.watchdog.alive, "copying to checkpoint.store"))
    if context.copies.problem:
        message = f"{context.copies.problem}; the run is whole on the disk: re-run the same command to copy the rest"
        context.metrics.log("event", step=None, event="store_failed", message=message)


def _open_metrics(directory: RunDirectory, loaded: LoadedConfig) -> MetricsLogger:
    return MetricsLogger(
        directory.path,
        loaded.config.logging,
        position_of(loaded.config),
        config=loaded.config.model_dump(mode="json"),
    )


def _rewind(context: RunContext, choice: ResumeChoice) -> None:
    manifest = choice.manifest
    if manifest is None:
        collectives.on_rank_zero(partial(_say_what_is_gone, context.directory))
        collectives.on_rank_zero(partial(context.metrics.rewind, -1))
        return
    config = context.loaded.config
    if manifest.data_fingerprint is not None:
        now = context.data.of(config.stages[manifest.stage]).fingerprint
        check_fingerprint(manifest.data_fingerprint, now, choice.path or "PATH")
    ends_stage = Counters.of_manifest(manifest).ends_stage(config)
    collectives.on_rank_zero(partial(context.metrics.rewind, manifest.step, before_growth=ends_stage))


def _say_what_is_gone(directory: RunDirectory) -> None:
    """Where the metrics know of checkpoints and none is left; they are kept beside the new ones."""
    path = directory.path / FILE_NAME
    if not path.exists():
        return
    try:
        saved = [record["step"] for record in read_metrics(directory.path) if record["kind"] == "checkpoint"]
    except DataError:
        saved = []
    if saved:
        kept = path.with_name(f"metrics_before_{time.strftime('%Y%m%d_%H%M%S')}.jsonl")
        path.replace(kept)
        print(
            f"none of the checkpoints that {path} tells of is left (up to step {max(saved)}): the run begins anew; its "
            f"earlier metrics are {kept}",
            flush=True,
        )


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
