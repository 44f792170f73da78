"""What the multi-rank tests run on each rank (``tests.ranks``)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state

from growth_megatron.checkpoint.sharded import pour_into_model
from growth_megatron.config.schema import ModelConfig, ParallelConfig, ScheduleConfig, StageConfig, TrainingConfig
from growth_megatron.model.init import InitSource
from growth_megatron.parallel import process_groups
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
    layout: dict[str, Any], model: dict[str, Any] | None = None, precision: str = "fp32", recompute: str = "none"
) -> StageConfig:
    return StageConfig(
        name="test",
        model=ModelConfig(**{**SMALL, **(model or {})}),
        parallel=ParallelConfig(**layout),
        schedule=ScheduleConfig(learning_rate=1e-3),
        training=TrainingConfig(
            steps=10, global_batch_size=BATCH, micro_batch_size=1, precision=precision, recompute=recompute
        ),
    )


@contextmanager
def fresh_engine(stage: StageConfig, seed: int = 7) -> Iterator[Engine]:
    """An engine at ``stage``'s layout with initial weights of ``seed``."""
    process_groups.set_layout(stage.parallel, seed)
    engine = Engine(stage)
    pour_into_model(InitSource(stage.model, seed), engine.models)
    engine.finish()
    yield engine
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


def losses_of_layouts(cases: list[dict[str, Any]], steps: int = 10) -> list[dict[str, Any]]:
    """Losses and gradient norms of ``steps`` updates for each case (arguments of ``stage_of``)."""
    results = []
    for case in cases:
        stage = stage_of(**case)
        with fresh_engine(stage) as engine:
            done = [engine.train_step(batches(step, stage), 1e-3) for step in range(steps)]
            evaluated, _ = engine.evaluate(batches(steps, stage))
        results.append(
            {"losses": [r.loss for r in done], "norms": [r.grad_norm for r in done], "evaluated": evaluated}
        )
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

    engine.build_model_chunks = unmarked
    return losses_of_layouts([{"layout": layout}])[0]
