"""What the tests of width growth at several layouts run on each rank (``tests.ranks``): train, save, grow, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from growth_megatron.checkpoint.folder.manifest import Manifest, checksum_files, list_files, write_manifest
from growth_megatron.checkpoint.torch_dist.live_model import load_from_source, load_into_model
from growth_megatron.checkpoint.torch_dist.saver import start_save
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig, StageConfig
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.init import InitSource
from growth_megatron.parallel import collectives, process_groups
from growth_megatron.train.engine import Engine
from tests.workers import SMALL, batches, fresh_engine, stage_of

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "vocab_size": 120,
    "sequence_length": 16,
}
GROWN = {
    **BASE,
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
}
GROWTH: dict[str, Any] = {
    "operator": "identity+split",
    "optimizer_state": "carry",
    "shares": "uneven",
    "cancelling_noise": 1.0,
}
SEED, STEPS = 11, 3


def plan(seed: int = SEED) -> GrowthPlan:
    return plan_growth(ModelConfig(**BASE), ModelConfig(**GROWN), GrowthConfig(**GROWTH), seed)


def train_and_save(target: str) -> None:
    """The base at the layout of one rank, with masters and moments."""
    stage = stage_of({}, BASE, precision="bf16")
    with fresh_engine(stage) as engine:
        for step in range(STEPS):
            engine.train_step(batches(step, stage), 1e-2)
        _save(engine, stage, Path(target))


def load_save_grow(jobs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each job in turn; of each load what the optimizer then holds.

    A job loads ``source`` at ``layout`` and saves it from there into ``target``, the grown model if ``grown`` is true;
    without a layout, it grows ``source`` into ``target``.
    """
    results = []
    for job in jobs:
        if "layout" in job:
            results.append(_load_and_save(**job))
        else:
            grow_checkpoint(Path(job["source"]), Path(job["target"]), plan(), GROWTH["optimizer_state"])
    return results


def _load_and_save(source: str, target: str, layout: dict[str, Any], grown: bool) -> dict[str, float]:
    stage = stage_of(layout, GROWN if grown else BASE, precision="bf16")
    with fresh_engine(stage, seed=99) as engine:  # other weights than the checkpoint's, so a missed load shows
        load_into_model(Path(source), engine.models, engine.optimizer)
        _save(engine, stage, Path(target))
        inner = engine.optimizer.chained_optimizers[0].optimizer
        held = [parameter for group in inner.param_groups for parameter in group["params"] if parameter.numel()]
        steps = {float(inner.state[parameter]["step"]) for parameter in held}
        assert len(steps) == 1, steps
        return {"step": steps.pop(), "tensors": len(held)}


def _save(engine: Engine, stage: StageConfig, folder: Path) -> None:
    collectives.on_rank_zero(lambda: folder.mkdir(parents=True))
    start_save(folder, engine.models, engine.optimizer).finish()
    collectives.on_rank_zero(lambda: _sign(folder, stage))


def _sign(folder: Path, stage: StageConfig) -> None:
    manifest = Manifest(
        library_version="test",
        step=STEPS,
        stage=0,
        stage_step=STEPS,
        consumed_samples=24,
        consumed_tokens=24 * stage.model.sequence_length,
        flops=1.0,
        geometry=stage.model,
        layout=stage.parallel,
        world_size=collectives.world_size_from_environment(),
        files=checksum_files(folder, list_files(folder)),
    )
    write_manifest(folder, manifest)


def grown_logits(
    layout: dict[str, Any], source: dict[str, Any], target: dict[str, Any], tokens: list[int]
) -> list[Any]:
    """Logits ``[s][this rank's vocabulary]`` of a live model loaded from a grown source."""
    model, stage = ModelConfig(**{**SMALL, **source}), stage_of(layout, {**source, **target})
    plan = plan_growth(model, stage.model, GrowthConfig(operator="identity+split", shares="uneven"))
    process_groups.set_layout(stage.parallel, 7)
    engine = Engine(stage)
    load_from_source(GrownSource(InitSource(model, 7), plan, "reset"), engine.models)
    with torch.no_grad():
        output = engine.models[0](torch.tensor([tokens]), torch.arange(len(tokens))[None], None)  # [b, s, v / TP]
    return list(output[0].tolist())
