"""Checkpoints as megatron-core saves them by default: the layers of a tensor along its first axis."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.enums import AttnBackend

from growth_megatron.checkpoint.torch_dist.live_model import load_into_model
from growth_megatron.parallel import collectives
from growth_megatron.train.engine import Engine
from tests.workers import BATCH, batches, fresh_engine, stage_of

STEPS = 3
RATE = 1e-3


def arguments_of(model: Any, step: int) -> Namespace:
    """Some of what Megatron-LM puts into common.pt."""
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.head_dim,
        seq_length=model.sequence_length,
        max_position_embeddings=model.sequence_length,
        rotary_base=int(model.rope_base),
        norm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        position_embedding_type="rope",
        swiglu=True,
        add_bias_linear=False,
        init_method_std=model.init_std,
        iteration=step,
        consumed_train_samples=step * BATCH,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.auto,
        data_path=["corpus"],
    )


def save_and_go_on(cases: list[dict[str, Any]]) -> list[list[float]]:
    """Save each case (arguments of ``_save``) after ``STEPS`` steps; the losses of the next two."""
    return [_save(**case) for case in cases]


def _save(
    layout: dict[str, Any], precision: str, kind: str, folder: str, model: dict[str, Any], with_args: bool = True
) -> list[float]:
    stage = stage_of(layout, model, precision)
    with fresh_engine(stage) as engine:
        if kind == "plain":
            _without_distribution(engine)
        for step in range(STEPS):
            engine.train_step(batches(step, stage), RATE)
        # A dictionary for each call: megatron-core stores process groups in it.
        sharding = {"distrib_optim_sharding_type": "fully_reshardable" if kind == "plain" else kind}
        states = [chunk.sharded_state_dict(metadata=dict(sharding)) for chunk in engine.models]
        named = {"model": states[0]} if len(states) == 1 else {f"model{i}": state for i, state in enumerate(states)}
        state: dict[str, Any] = {
            **named,
            "optimizer": engine.optimizer.sharded_state_dict(named, metadata=dict(sharding)),
            "checkpoint_version": 3.0,
            "iteration": STEPS,
            "num_floating_point_operations_so_far": 1e9,
            "opt_param_scheduler": {"max_lr": RATE, "num_steps": STEPS},
            "rng_state": [{"random_rng_state": (3, (1, 2), None), "torch_rng_state": torch.get_rng_state()}],
        }
        if with_args:
            state["args"] = arguments_of(stage.model, STEPS)
        collectives.on_rank_zero(lambda: Path(folder).mkdir(parents=True))
        dist_checkpointing.save(state, folder, content_metadata=dict(sharding))
        return _next_losses(engine)


def _next_losses(engine: Engine) -> list[float]:
    return [engine.train_step(batches(step, engine.stage), RATE).loss for step in (STEPS, STEPS + 1)]


def _without_distribution(engine: Engine) -> None:
    """Replace the engine's optimizer by megatron-core's plain one."""
    config = engine.models[0].config
    settings = engine.stage.optimizer
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    engine.wrapped = [DistributedDataParallel(config, ddp, model) for model in engine.models]
    optimizer = OptimizerConfig(
        optimizer="adam",
        lr=RATE,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.clip_grad or 0.0,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=False,
    )
    engine._optimizer = get_megatron_optimizer(optimizer, engine.wrapped, use_gloo_process_groups=False)
    engine._epsilon_multipliers = [1.0 for _ in engine.optimizer.param_groups]
    config.grad_scale_func = engine.optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads


def losses_after_loading(cases: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of the two steps from ``STEPS`` on, from each checkpoint ``folder`` at ``layout``."""
    losses = []
    for case in cases:
        stage = stage_of(case["layout"], case["model"], case["precision"])
        with fresh_engine(stage, seed=99) as engine:
            load_into_model(Path(case["folder"]), engine.models, engine.optimizer)
            losses.append(_next_losses(engine))
    return losses
