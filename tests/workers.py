"""What the multi-rank tests run on each rank (``tests.ranks``)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from growth_megatron.checkpoint.torch_dist.live_model import load_from_source
from growth_megatron.config.schedule_schema import ScheduleConfig
from growth_megatron.config.schema import (
    DataConfig,
    DatasetConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
    TrainingConfig,
)
from growth_megatron.model.init import InitSource
from growth_megatron.parallel import collectives, process_groups
from growth_megatron.train.engine import Batch, Engine

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 128,
    "vocab_size": 250,
    "sequence_length": 32,
}
BATCH = 8


def stage_of(
    layout: dict[str, Any],
    model: dict[str, Any] | None = None,
    precision: str = "fp32",
    recompute: str = "none",
    recompute_modules: list[str] | None = None,
    deterministic: bool = False,
) -> StageConfig:
    return StageConfig(
        name="test",
        model=ModelConfig(**{**SMALL, **(model or {})}),
        parallel=ParallelConfig(**layout),
        schedule=ScheduleConfig(learning_rate=1e-3),
        data=DataConfig(train=(DatasetConfig(path="none"),)),
        training=TrainingConfig(
            steps=10,
            global_batch_size=BATCH,
            micro_batch_size=1,
            precision=precision,
            recompute=recompute,
            recompute_modules=recompute_modules,
            deterministic=deterministic,
        ),
    )


@contextmanager
def fresh_engine(stage: StageConfig, seed: int = 7) -> Iterator[Engine]:
    """An engine at ``stage``'s layout with initial weights of ``seed``."""
    process_groups.set_layout(stage.parallel, seed)
    engine = Engine(stage)
    load_from_source(InitSource(stage.model, seed), engine.models)
    engine.finish()
    yield engine
    engine.close()
    del engine
    gc.collect()


def batches(step: int, stage: StageConfig) -> list[Batch]:
    """This rank's micro-batches of random tokens for ``step``: the same samples at every layout."""
    model, size = stage.model, parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(0, model.vocab_size, (BATCH, model.sequence_length + 1), generator=generator)
    return [
        {
            "tokens": tokens[i : i + 1, :-1].contiguous(),
            "labels": tokens[i : i + 1, 1:].contiguous(),
            "position_ids": torch.arange(model.sequence_length)[None],
            "loss_mask": torch.ones(1, model.sequence_length),
        }
        for i in range(rank, BATCH, size)
    ]


def losses_of_layouts(cases: list[dict[str, Any]], steps: int = 6) -> list[dict[str, Any]]:
    """Losses and gradient norms of ``steps`` updates for each case (arguments of ``stage_of``)."""
    results = []
    for case in cases:
        stage = stage_of(**case)
        with fresh_engine(stage) as engine:
            done = [engine.train_step(batches(step, stage), 1e-3) for step in range(steps)]
            evaluated = engine.evaluate(batches(steps, stage))
        results.append({"losses": [r.loss for r in done], "norms": [r.grad_norm for r in done], "evaluated": evaluated})
    return results


def losses_without_gain_reduction(layout: dict[str, Any]) -> dict[str, Any]:
    """As ``losses_of_layouts`` for one case, with the gains' gradients left unreduced."""
    from growth_megatron.model import llama

    build = llama.build_model_chunks

    def unmarked(*arguments: Any) -> Any:
        chunks = build(*arguments)
        for chunk in chunks:
            for param in chunk.parameters():
                if param.dim() == 1:
                    param.sequence_parallel = False
        return chunks

    from growth_megatron.train import engine

    engine.build_model_chunks = unmarked  # type: ignore[assignment]
    return losses_of_layouts([{"layout": layout}])[0]


def train_all(runs: list[dict[str, Any]]) -> list[int]:
    """Exit codes of training each of ``runs`` (``config``, ``overrides``) one after the other in this world."""
    from growth_megatron.growth.configuration import load_config
    from growth_megatron.train.stages import train

    return [train(load_config(run["config"], run.get("overrides", []))) for run in runs]


def save_at(layout: dict[str, Any], directory: str, model: dict[str, Any], steps: int) -> None:
    """Train ``steps`` updates at ``layout`` and save into ``directory`` with a manifest."""
    import dataclasses
    from pathlib import Path

    from growth_megatron.checkpoint.folder.manifest import Manifest, library_version
    from growth_megatron.checkpoint.folder.run_directory import RunDirectory
    from growth_megatron.checkpoint.torch_dist.saver import start_save
    from growth_megatron.train.counters import Counters

    stage = stage_of(layout, model)
    run = RunDirectory(Path(directory))
    with fresh_engine(stage) as engine:
        counters = Counters()
        for step in range(steps):
            engine.train_step(batches(step, stage), 1e-3)
            counters = counters.after_step(stage)
        folder = collectives.on_rank_zero(lambda: run.begin(steps))
        start_save(folder, engine.models, engine.optimizer).finish()
        manifest = Manifest(
            library_version=library_version(),
            **dataclasses.asdict(counters),
            geometry=stage.model,
            layout=stage.parallel,
            world_size=torch.distributed.get_world_size(),
        )
        collectives.on_rank_zero(lambda: str(run.commit(manifest)))


def save_all_at(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        save_at(**case)


def load_and_save_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load ``source`` at ``layout`` and save it into ``target``, then take one step; says what moved."""
    from pathlib import Path

    from growth_megatron.checkpoint.torch_dist.live_model import load_into_model
    from growth_megatron.checkpoint.torch_dist.saver import start_save

    results = []
    for case in cases:
        stage = stage_of(case["layout"], case["model"])
        with fresh_engine(stage, seed=99) as engine:
            load_into_model(Path(case["source"]), engine.models, engine.optimizer)
            target = Path(case["target"])
            collectives.on_rank_zero(target.mkdir)
            start_save(target, engine.models, engine.optimizer).finish()
            before = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in engine.models]
            engine.train_step(batches(50, stage), 1e-3)
            moved = [
                not torch.equal(old[name], param)
                for old, model in zip(before, engine.models, strict=True)
                for name, param in model.named_parameters()
            ]
            results.append({"parameters": len(moved), "moved": sum(moved), "in_optimizer": _optimizer_elements(engine)})
    return results


def _optimizer_elements(engine: Engine) -> list[int]:
    """Elements of this rank's model parameters, and how many its data-parallel group's optimizers hold."""
    held = sum(p.numel() for group in engine.optimizer.param_groups for p in group["params"])
    total = torch.tensor([held])
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    pointers = [p.data_ptr() for group in engine.optimizer.param_groups for p in group["params"] if p.numel()]
    assert len(set(pointers)) == len(pointers), "a parameter is in the optimizer twice"
    return [sum(p.numel() for model in engine.models for p in model.parameters()), int(total)]


def reload_into_fresh_optimizer(directory: str) -> dict[str, int]:
    """Adam's step of every parameter after a load from a run of 2 steps, and after one step more."""
    from pathlib import Path

    from growth_megatron.checkpoint.torch_dist.live_model import load_into_model

    save_at({}, directory, {"num_layers": 2}, steps=2)
    stage = stage_of({}, {"num_layers": 2})
    with fresh_engine(stage, seed=8) as engine:
        load_into_model(Path(directory) / "checkpoints" / "step_00000002", engine.models, engine.optimizer)
        before = _adam_steps(engine)
        engine.train_step(batches(2, stage), 1e-3)
        after = _adam_steps(engine)
    assert len(before) == 1
    assert after == {3}, f"the step of a parameter went from {before} to {after}".replace("{", "").replace("}", "")
    return {"before": before.pop(), "after": after.pop()}


def _adam_steps(engine: Engine) -> set[int]:
    (inner,) = engine.optimizer.chained_optimizers
    return {int(state["step"]) for state in inner.optimizer.state.values()}


def initial_shards(layout: dict[str, Any]) -> list[Any]:
    """Key, region and values of every shard of this rank's model before the first step."""
    from growth_megatron.checkpoint.torch_dist.live_model import _tensor_shards, model_state

    stage = stage_of(layout)
    with fresh_engine(stage) as engine:
        return [
            (
                shard.key,
                [[o, o + n] for o, n in zip(shard.global_offset, shard.local_shape, strict=True)],
                shard.data.flatten().tolist(),
            )
            for shard in _tensor_shards(model_state(engine.models))
        ]


class Varied(InitSource):
    """Initial weights with gains and biases moved off the 1 and 0 where they begin."""

    def read(self, key: str, region: tuple[slice, ...]) -> torch.Tensor:
        values = super().read(key, region)
        if values.dim() == 1:
            values = values + 0.2 * torch.sin(torch.arange(region[0].start, region[0].stop) + len(key))
        return values


def logits(models: list[dict[str, Any]], tokens: list[int]) -> list[list[list[float]]]:
    """Logits ``[s][padded vocabulary]`` of models with the weights of ``Varied``."""
    results = []
    for model in models:
        stage = stage_of({}, model)
        with fresh_engine(stage) as engine, torch.no_grad():
            load_from_source(Varied(stage.model, 7), engine.models)
            ids = torch.tensor([tokens])
            output = engine.models[0](ids, torch.arange(len(tokens))[None], None)  # [b, s, v]
            results.append(output[0].tolist())
    return results


def what_outlives_an_engine(layout: dict[str, Any], close: bool = True) -> list[str]:
    """Names of the parts of a trained and closed engine that are still in memory."""
    import weakref

    stage = stage_of(layout, {"num_layers": 2})
    with fresh_engine(stage) as engine:
        engine.train_step(batches(0, stage), 1e-3)
        (inner,) = engine.optimizer.chained_optimizers
        parts = {
            "model": weakref.ref(engine.models[0]),
            "wrapper": weakref.ref(engine.wrapped[0]),
            "optimizer": weakref.ref(inner),
            "gradients": weakref.ref(engine.wrapped[0].buffers[0].grad_data),
        }
        del inner
        if not close:
            engine.close = lambda: None  # type: ignore[method-assign]
    del engine
    gc.collect()
    return [name for name, reference in parts.items() if reference() is not None]


def helper_processes_after_a_save(directory: str) -> int:
    """Processes of multiprocessing that are still there after a save."""
    import psutil

    save_at({}, directory, {"num_layers": 2}, steps=1)
    children = psutil.Process().children(recursive=True)
    return sum("spawn_main" in " ".join(child.cmdline()) for child in children)


def process_groups_of(layouts: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Sizes of the groups, by name, that each layout adds to the default group with this rank in them."""
    added = []
    for layout in layouts:
        process_groups.set_layout(ParallelConfig(**layout), 1)
        groups = [group for group in parallel_state._global_process_group_list if group is not None]
        added.append({group.group_desc: group.size() for group in groups})
    return added


def run_mains(commands: list[list[str]]) -> list[list[Any]]:
    """Exit code and all that was printed by each of ``commands``, one after the other in this process."""
    import contextlib
    import io

    from growth_megatron.__main__ import main

    outcomes: list[list[Any]] = []
    for command in commands:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main(command)
        outcomes.append([code, printed.getvalue()])
    return outcomes


def signalled_again_after_the_save(config: str, overrides: list[str]) -> int:
    """Exit code of a run that is asked to stop at step 3, and again, late enough to mean it, once it has saved."""
    import os
    import signal

    from growth_megatron.growth.configuration import load_config
    from growth_megatron.train import resilience
    from growth_megatron.train.metrics import MetricsLogger
    from growth_megatron.train.stages import train

    log, stopping = MetricsLogger.log, []

    def log_and_signal(self: MetricsLogger, kind: str, **values: Any) -> None:
        log(self, kind, **values)
        stopping.append(values.get("event") == "stop")
        if (kind == "train" and values["step"] == 3) or (kind == "checkpoint" and any(stopping)):
            os.kill(os.getpid(), signal.SIGTERM)

    resilience.SAME_REQUEST_S = 0.0
    MetricsLogger.log = log_and_signal  # type: ignore[method-assign]
    return train(load_config(config, overrides))
