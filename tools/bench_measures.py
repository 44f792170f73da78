"""The three measurements of ``bench_train.py``: train and a bare loop, plan and allocation, growth and resume.

Owns: what is timed, in which order, and the figures that come of it.
Does not own: options, the configuration and how figures are shown (``bench_train.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from rich.console import Console as RichConsole

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.folder.run_directory import RunDirectory
from growth_megatron.checkpoint.torch_dist.live_model import load_from_source, load_into_model
from growth_megatron.checkpoint.torch_dist.saver import Save, start_save
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.load import LoadedConfig, config_hash
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import (
    StageConfig,
)
from growth_megatron.data.loader import BatchLoader
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.operators import choose
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.plan import plan_depth
from growth_megatron.model.cost import flops_per_token, rank_memory
from growth_megatron.model.init import InitSource
from growth_megatron.parallel import collectives, process_groups
from growth_megatron.train.console import LiveConsole
from growth_megatron.train.counters import Counters
from growth_megatron.train.data import RunData
from growth_megatron.train.engine import Batch, Engine
from growth_megatron.train.loop import RunContext, StageLoop
from growth_megatron.train.metrics import Metrics, MetricsLogger, NullMetrics
from growth_megatron.train.position import Position
from growth_megatron.train.resilience import StopRequest, open_rank_log
from growth_megatron.train.watchdog import Watchdog

T = TypeVar("T")
Figures = dict[str, Any]
Times = tuple[float, float]  # wall clock and CPU seconds


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all three measurements share."""

    config: RunConfig
    stage: StageConfig
    folder: Path
    turns: int
    steps: int
    live: bool

    def context(self, stages: Sequence[StageConfig], name: str, metrics: Metrics) -> RunContext:
        """A run of ``stages`` in a folder of its own. Call on all ranks."""
        config = self.config.model_copy(update={"stages": tuple(stages)})
        directory = RunDirectory(self.folder / name)
        log = collectives.on_all_ranks(lambda: open_rank_log(directory.path, dist.get_rank()))
        loaded = LoadedConfig(config, config_hash(config))
        data = RunData(config, self.folder)
        return RunContext(loaded, directory, metrics, StopRequest(), Watchdog(log), data, dist.get_world_size())


class StepClock:
    """Metrics of a run that note when each step was done: the loop reports once a step, when all else is done."""

    def __init__(self, inner: Metrics) -> None:
        self.inner = inner
        self.ends: list[Times] = []
        self.saves_s: list[float] = []

    def log(self, kind: str, **fields: Any) -> None:
        self.inner.log(kind, **fields)
        if kind == "train":
            self.ends.append(now())
        elif kind == "checkpoint":
            self.saves_s.append(fields["seconds"])

    def progress(self, step: int, stage: str) -> None:
        self.inner.progress(step, stage)
        self.ends.append(now())

    def phase(self, text: str) -> None:
        self.inner.phase(text)

    def rewind(self, step: int, *, before_growth: bool = False, learned: int | None = None) -> None:
        self.inner.rewind(step, before_growth=before_growth, learned=learned)

    def close(self) -> None:
        self.inner.close()


def now() -> Times:
    """Wall clock and CPU time of this process with all its threads."""
    return time.perf_counter(), time.process_time()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Seconds until ``function`` is done on all ranks, and what it returned here."""
    synchronize()
    started = time.perf_counter()
    value = function()
    synchronize()
    return time.perf_counter() - started, value


def build(stage: StageConfig, seed: int) -> Engine:
    """A stage's engine at its layout, its model not filled yet."""
    process_groups.set_layout(stage.parallel, seed)
    return Engine(stage)


def fresh(stage: StageConfig, seed: int) -> Engine:
    """A stage's engine with initial weights."""
    engine = build(stage, seed)
    load_from_source(InitSource(stage.model, seed), engine.models)
    engine.finish()
    return engine


def read_batches(context: RunContext, stage: StageConfig, steps: int) -> list[list[Batch]]:
    """This rank's micro-batches of the first ``steps`` steps, on its device."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    size, per_step, device = (
        stage.training.micro_batch_size,
        stage.training.global_batch_size,
        torch.cuda.current_device(),
    )
    with BatchLoader(context.data.of(stage).train, size, per_step, rank, ranks) as loader:
        read = [loader.micro_batches(step * per_step) for step in range(steps)]
    return [[{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches] for batches in read]


def bare_forward(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, lambda losses: (losses.mean(), {})


def bare_steps(engine: Engine, steps: Sequence[Sequence[Batch]]) -> list[Times]:
    """Train on ``steps`` with nothing but megatron-core; when each step was done."""
    ends, models, run = [], engine.wrapped, get_forward_backward_func()
    for batches in steps:
        for chunk in models:
            chunk.zero_grad_buffer()
        engine.optimizer.zero_grad()
        run(
            forward_step_func=bare_forward,
            data_iterator=[iter(batches) for _ in models] if len(models) > 1 else iter(batches),
            model=models if len(models) > 1 else models[0],
            num_microbatches=len(batches),
            seq_length=engine.stage.model.sequence_length,
            micro_batch_size=engine.stage.training.micro_batch_size,
            forward_only=False,
        )
        engine.optimizer.step()
        ends.append(now())
    return ends


def matmul_flops_per_s(precision: str) -> float:
    """Rate of a large matrix product on this rank's device, all ranks at once."""
    size = 8192 if torch.cuda.is_available() else 1536
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=torch.cuda.current_device()).to(dtype) for _ in range(2))
    torch.mm(a, b)
    times = [timed(lambda: torch.mm(a, b))[0] for _ in range(5)]
    return 2 * size**3 / statistics.median(times)


@contextlib.contextmanager
def console_to(path: Path) -> Iterator[None]:
    """What a run prints goes to a file, so that the figures stand by themselves."""
    with open("/dev/null" if dist.get_rank() else path, "w") as log, contextlib.redirect_stdout(log):
        yield


def open_metrics(bench: Bench, run_path: Path, stage: StageConfig) -> Metrics:
    if dist.get_rank():
        return NullMetrics()
    run_path.mkdir(parents=True, exist_ok=True)
    flops = float(flops_per_token(stage.model)) * stage.tokens_per_step * stage.num_steps
    position = Position({stage.name: stage.num_steps}, {stage.name: flops})
    # Standard output is a file by now.
    console = LiveConsole(RichConsole(force_terminal=True), position) if bench.live else None
    return MetricsLogger(run_path, bench.config.logging, position, console=console)


def train_against_bare(bench: Bench, engine: Engine) -> Figures:
    """Part 1. The first step of each turn is left out on both sides, and the first turn."""
    stage = engine.stage
    train: list[list[Times]] = []
    bare: list[list[Times]] = []
    matmul: list[float] = []
    with console_to(bench.folder / "console.log"):
        clock = StepClock(open_metrics(bench, bench.folder / "train", stage))
        context = bench.context([stage], "train", clock)
        batches = read_batches(context, stage, stage.num_steps)

        def run_train() -> None:
            clock.ends.clear()
            samples = len(train) * stage.num_steps * stage.training.global_batch_size
            StageLoop(context, engine, None, Counters(consumed_samples=samples)).run()
            train.append(steps_of(clock.ends))

        def run_bare() -> None:
            bare.append(steps_of(bare_steps(engine, batches)))

        for turn in range(bench.turns + 1):
            matmul.append(matmul_flops_per_s(stage.training.precision))
            for run in (run_train, run_bare) if turn % 2 else (run_bare, run_train):
                gc.collect()
                synchronize()
                run()
        context.watchdog.close()
        clock.close()
    return train_figures(stage, train[1:], bare[1:], clock.saves_s[1:], statistics.median(matmul[1:]))


def steps_beside_a_save(bench: Bench, engine: Engine) -> Figures:
    """How much slower steps are while a checkpoint is written in the background; the first turn is left out.

    The steps that began during the writing took ``extra`` seconds more than as many alone, and the writing ``written``
    seconds; of those, ``written - extra`` would have done for the same work. Without copies, which are the blocking
    part of a save: they are over when the first step begins.
    """
    stage = engine.stage
    batches = read_batches(bench.context([stage], "beside", NullMetrics()), stage, 1)
    slower: list[float] = []
    for turn in range(bench.turns + 1):
        folder = bench.folder / "beside" / f"save_{turn}"
        collectives.on_rank_zero(partial(folder.mkdir, parents=True))
        save = start_save(folder, engine.models, engine.optimizer)
        clock = WriteClock(save)
        during: list[float] = []
        while not during or collectives.any_rank(not save.is_written()):
            during.append(timed(lambda: bare_steps(engine, batches))[0])
        save.finish()
        collectives.on_rank_zero(partial(shutil.rmtree, folder))
        alone = [timed(lambda: bare_steps(engine, batches))[0] for _ in during]
        if turn:
            slower.append(clock.seconds / max(clock.seconds - (sum(during) - sum(alone)), 1e-9))
    return {"step_beside_a_save": statistics.median(slower), "step_beside_a_save_of_turns": quartiles(slower)}


class WriteClock:
    """How long a background save takes to be written, from now on."""

    def __init__(self, save: Save) -> None:
        self._since, self.seconds = time.perf_counter(), 0.0
        for file in save.files.values():
            file.add_done_callback(self._note)

    def _note(self, _: object) -> None:
        self.seconds = time.perf_counter() - self._since


def train_figures(
    stage: StageConfig,
    train: Sequence[Sequence[Times]],
    bare: Sequence[Sequence[Times]],
    saves_s: Sequence[float],
    matmul: float,
) -> Figures:
    """``train`` and ``bare`` hold the steps of each turn, ``matmul`` is in FLOP/s per rank."""
    (fast_s, step_s, _), (fast_bare_s, bare_s, _) = (
        quartiles([step[0] for turn in turns for step in turn]) for turns in (train, bare)
    )
    flops = stage.tokens_per_step * flops_per_token(stage.model) / dist.get_world_size()
    wall, cpu = ([mean(a, i) / mean(b, i) for a, b in zip(train, bare, strict=True)] for i in (0, 1))
    return {
        "train_to_bare": step_s / bare_s,
        "train_to_bare_undisturbed": fast_s / fast_bare_s,
        "train_to_bare_of_turns": quartiles(wall),
        "train_to_bare_cpu_time": quartiles(cpu),
        "share_of_matmul": flops / step_s / matmul,
        "bare_share_of_matmul": flops / bare_s / matmul,
        "save_to_step": statistics.median(saves_s) / step_s if saves_s else None,
        "step_s": step_s,
        "bare_step_s": bare_s,
        "tokens_per_s": stage.tokens_per_step / step_s,
        "tflops_per_s_per_rank": flops / step_s / 1e12,
        "matmul_tflops_per_s_per_rank": matmul / 1e12,
        "peak_memory_bytes": peak_memory_bytes(),
        "steps_s": {"train": [[t[0] for t in turn] for turn in train], "bare": [[t[0] for t in turn] for turn in bare]},
    }


def steps_of(ends: Sequence[Times]) -> list[Times]:
    """Wall and CPU seconds of each step but the first."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]


def mean(turn: Sequence[Times], which: int) -> float:
    return statistics.fmean(step[which] for step in turn)


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def peak_memory_bytes() -> int:
    """Of the device that this rank has, or of its process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_against_plan(engine: Engine) -> Figures:
    """Part 2: planned over allocated bytes of the rank where the two differ most."""
    stage, ranks = engine.stage, parallel_state.get_data_parallel_world_size()
    buffers = [buffer for chunk in engine.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    state: dict[int, int] = {}
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        kept = [entry[key] for entry in optimizer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        if stage.training.precision == "bf16":  # in fp32 the parameters are their own masters
            kept += [master for group in optimizer.optimizer.param_groups for master in group["params"]]
        state |= {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    allocated = {
        "weights": sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(state.values()),
    }
    micro_batches = stage.training.global_batch_size // (stage.training.micro_batch_size * ranks)
    planned = rank_memory(stage, parallel_state.get_pipeline_model_parallel_rank(), ranks, micro_batches)
    ratios = {name: getattr(planned, f"{name}_bytes") / allocated[name] for name in allocated}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, ratios)
    worst = {name: max((r[name] for r in everywhere), key=lambda ratio: abs(ratio - 1)) for name in allocated}
    return {
        "planned_to_allocated": worst,
        "plan_error": max(abs(ratio - 1) for ratio in worst.values()),
        "allocated_bytes_rank_0": allocated,
    }


class Growth:
    """Part 3: one small and one whole engine, saved and loaded in turn."""

    def __init__(self, bench: Bench, factor: int, optimizer_state: str) -> None:
        self.bench, self.seed, whole = bench, bench.config.run.seed, bench.stage
        model = whole.model.model_copy(update={"num_layers": whole.model.num_layers // factor})
        training = whole.training.model_copy(update={"steps": 1})
        base = whole.model_copy(update={"name": "small", "model": model, "training": training})
        growth = GrowthConfig.model_validate({"operator": "stack", "optimizer_state": optimizer_state})
        self.stages = (base, whole.model_copy(update={"name": "whole", "growth": growth, "training": training}))
        self.engines = [fresh(stage, self.seed) for stage in self.stages]
        for engine in self.engines:
            context = bench.context(self.stages, "growth", NullMetrics())
            engine.train_step(read_batches(context, engine.stage, 1)[0], learning_rate=1e-4)

    def turn(self, number: int, grows: bool) -> Figures:
        """Seconds of each part of one save and resume, with a growth between them or without."""
        stage = 0 if grows else 1
        context = self.bench.context(self.stages, f"growth/{number}_{stage}", NullMetrics())
        directory, at_end = context.directory, Counters(step=1, stage=stage, stage_step=1)
        times: Figures = {}
        # At a stage's end all that is left for run() to do is to save.
        times["save"], _ = timed(StageLoop(context, self.engines[stage], None, at_end).run)
        times["choose"], (path, manifest) = timed(lambda: newest(directory))
        if grows:
            times["grow"], (path, _) = timed(lambda: self._grow(directory, path, manifest))
        self.engines.pop()
        gc.collect()
        times["build"], engine = timed(lambda: build(self.stages[1], self.seed))
        times["finish"], _ = timed(engine.finish)
        times["load"], _ = timed(lambda: load_into_model(path, engine.models, engine.optimizer))
        self.engines.append(engine)
        context.watchdog.close()
        collectives.on_rank_zero(lambda: shutil.rmtree(directory.path))
        return times

    def _grow(self, directory: RunDirectory, source: Path, manifest: Manifest) -> tuple[Path, Manifest]:
        """What ``train`` does between two stages."""
        target, path = self.stages[1], directory.checkpoint_path(1, grown=True)
        assert target.growth is not None
        state = choose(target.growth).state_policy

        layers = stack_layers(manifest.geometry.num_layers, target.model.num_layers)
        grow_checkpoint(source, path, plan_depth(manifest.geometry, target.model, layers), state, stage=1)
        collectives.on_rank_zero(lambda: directory.point_latest(path))
        return newest(directory)


def newest(directory: RunDirectory) -> tuple[Path, Manifest]:
    """What a run resumes from, chosen as ``train`` does."""
    choice = collectives.on_rank_zero(lambda: directory.choose_resume("must"))
    assert choice.path is not None
    assert choice.manifest is not None
    return choice.path, choice.manifest


def growth_against_resume(bench: Bench, factor: int, optimizer_state: str) -> Figures:
    growth = Growth(bench, factor, optimizer_state)
    taken: dict[bool, list[Figures]] = {True: [], False: []}
    for number in range(bench.turns + 1):
        for grows in (True, False) if number % 2 else (False, True):
            taken[grows].append(growth.turn(number, grows))
    # Building the model is the same on both sides and would hide a difference.
    io = {grows: [sum(t.values()) - t["build"] - t["finish"] for t in turns[1:]] for grows, turns in taken.items()}
    everything = {grows: [sum(t.values()) for t in turns[1:]] for grows, turns in taken.items()}
    medians = {
        name: {part: statistics.median(t[part] for t in taken[grows][1:]) for part in taken[grows][0]}
        for name, grows in (("save_grow_resume_s", True), ("save_resume_s", False))
    }
    return {
        "growth_to_resume": statistics.median(io[True]) / statistics.median(io[False]),
        "growth_to_resume_of_turns": quartiles([a / b for a, b in zip(io[True], io[False], strict=True)]),
        "growth_to_own_save_and_load": statistics.median(
            s / (s - turn["grow"]) for s, turn in zip(io[True], taken[True][1:], strict=True)
        ),
        "growth_to_resume_with_build": statistics.median(everything[True]) / statistics.median(everything[False]),
        **medians,
    }
