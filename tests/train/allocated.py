"""Run on one or more ranks: what a stage allocates, beside what the plan says."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from growth_megatron.config.schedule_schema import ScheduleConfig
from growth_megatron.config.schema import (
    DataConfig,
    DatasetConfig,
    ModelConfig,
    ParallelConfig,
    StageConfig,
    TrainingConfig,
)
from growth_megatron.model.cost import head_saved_bytes, layer_saved_bytes, rank_memory
from growth_megatron.parallel import process_groups
from growth_megatron.train.engine import Engine

SEQUENCE, BATCH, LAYERS = 64, 2, 4


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "core attention": {"recompute": "selective"},
    "mlp": {"recompute": "selective", "recompute_modules": ["mlp"]},
    "both": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute": "full"},
}


def stage(tensor: int, pipeline: int, chunks: int, precision: str, recompute: str, tied: bool) -> StageConfig:
    return StageConfig(
        name="a",
        data=DataConfig(train=(DatasetConfig(path="none"),)),
        model=ModelConfig(
            num_layers=LAYERS, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=160,
            vocab_size=500, sequence_length=SEQUENCE, tie_embeddings=tied,
        ),
        parallel=ParallelConfig(
            tensor_parallel_size=tensor, sequence_parallel=tensor > 1, pipeline_parallel_size=pipeline,
            virtual_pipeline_parallel_size=chunks if chunks > 1 else None,
        ),
        schedule=ScheduleConfig(learning_rate=1e-3),
        training=TrainingConfig.model_validate(
            {"steps": 1, "global_batch_size": 8, "micro_batch_size": BATCH, "precision": precision,
             **RECOMPUTE[recompute]}
        ),
    )  # fmt: skip


def build(config: StageConfig) -> Engine:
    process_groups.set_layout(config.parallel, 1)
    engine = Engine(config)
    with torch.no_grad():
        for model in engine.models:
            for parameter in model.parameters():
                parameter.normal_(0, 0.02)
    return engine


def states(config: StageConfig) -> dict[str, list[int]]:
    """Weights, gradients and optimizer state after one step: allocated, planned."""
    engine = build(config)
    engine.finish()
    data_parallel_size = parallel_state.get_data_parallel_world_size()
    tokens = torch.randint(0, 500, (BATCH, SEQUENCE))
    batch = {"tokens": tokens, "labels": tokens, "position_ids": torch.arange(SEQUENCE)[None].expand(BATCH, -1)}
    batch["loss_mask"] = torch.ones(BATCH, SEQUENCE)
    micro_batches = 8 // (BATCH * data_parallel_size)
    engine.train_step([batch] * micro_batches, 1e-3)
    buffers = [buffer for model in engine.wrapped for buffer in model.buffers]
    storages: dict[int, int] = {}
    for optimizer in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"] if config.training.precision == "bf16" else ():
                storages[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
        for state in optimizer.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                storages[state[key].untyped_storage().data_ptr()] = state[key].untyped_storage().nbytes()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    planned = rank_memory(config, rank, data_parallel_size, micro_batches)
    return {
        "weights": [sum(buffer.param_data.nbytes for buffer in buffers), planned.weights_bytes],
        "gradients": [sum(buffer.grad_data.nbytes for buffer in buffers), planned.gradients_bytes],
        "optimizer": [sum(storages.values()), planned.optimizer_bytes],
    }


def activations(config: StageConfig) -> list[int]:
    """Bytes that one rank's forward pass saves for backward: measured, planned for CPU kernels."""
    model = build(config).models[0]
    held = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # so that no address is used twice
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(0, 500, (BATCH, SEQUENCE))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, torch.arange(SEQUENCE)[None].expand(BATCH, -1), None, labels=tokens)
    planned = LAYERS * layer_saved_bytes(config, fused=False) + head_saved_bytes(config, fused=False)
    return [sum(seen.values()), planned + 8 * tokens.numel()]


def allocated(layouts: list[list[int]]) -> list[dict[str, Any]]:
    """Of this rank at each layout (tensor, pipeline, chunks): states, and on one rank alone activations."""
    results = []
    for tensor, pipeline, chunks in layouts:
        found: dict[str, Any] = {}
        for precision, tied in (("bf16", False), ("fp32", True)):
            found[f"{precision} states"] = states(stage(tensor, pipeline, chunks, precision, "none", tied))
            for recompute in RECOMPUTE if dist.get_world_size() == 1 else ():
                found[f"{precision} {recompute}"] = activations(stage(1, 1, 1, precision, recompute, False))
        results.append(found)
    return results
