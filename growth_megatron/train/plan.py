"""What a run will cost, before anything is started.

Owns: putting the formulas of ``model.cost`` together per stage and over a growing run.
Does not own: how a plan is shown (``commands.plan_tables``).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from growth_megatron.config.checks import check_world_size
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import (
    ModelConfig,
    ParallelConfig,
)
from growth_megatron.growth.conditions import GEOMETRY_FIELDS
from growth_megatron.growth.learned_maps import map_costs, phase_of
from growth_megatron.growth.new_parts import describe_groups
from growth_megatron.growth.operators import choose
from growth_megatron.growth.ramps import describe_ramps, mask_ramps
from growth_megatron.model.cost import (
    FP32_BYTES,
    ParameterCount,
    RankMemory,
    bubble_fraction,
    bubble_to_ideal,
    checkpoint_bytes,
    element_bytes,
    flops_per_token,
    parameter_count,
    rank_memory,
)

__all__ = ["RunPlan", "StagePlan", "flops_per_token", "parameter_count", "plan_run", "plan_to_dict"]

_GROWING = (*GEOMETRY_FIELDS, "norm_epsilon", "tie_embeddings")
"""What a growth may change."""

_SHOWN_OTHERWISE = {"operator", "layers", "optimizer_state", "schedule", "ramp", "learn"}


@dataclass(frozen=True)
class LearningPlan:
    """Learning the maps of a growth before its stage. ``map_flops`` of the ``flops`` are not the model's own;
    ``extra_bytes`` of ``total_bytes`` are source, maps and what the work on them takes; both of the worst rank.
    """

    steps: int
    tokens: int
    flops: int
    map_flops: int
    flops_6nd: int
    extra_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """One stage at one world size. FLOPs count forward and backward, see ``model.cost.flops_per_token``."""

    name: str
    grown_by: str | None
    """How its model comes out of the stage before, in words; None for the first stage."""
    model: ModelConfig
    parallel: ParallelConfig
    world_size: int
    data_parallel_size: int
    micro_batches: int
    """Micro-batches per step on each data-parallel rank."""
    parameters: ParameterCount
    flops_per_token: int
    tokens_per_step: int
    steps: int
    tokens: int
    flops: int
    ranks: tuple[RankMemory, ...]
    """One entry a pipeline rank."""
    bubble_to_ideal: float
    bubble_fraction: float
    checkpoint_bytes: int
    groups: str
    """What is trained otherwise than the rest, in words; most often nothing."""
    share: float
    """Share of the run's FLOPs; that of learning its maps is not in it."""
    learning: LearningPlan | None = None

    @property
    def flops_6nd(self) -> int:
        """6 N D with N all parameters, embeddings included, and D tokens; the paper's measure of cost."""
        return 6 * self.parameters.total * self.tokens

    @property
    def worst(self) -> RankMemory:
        """The pipeline stage that needs the most memory."""
        return max(self.ranks, key=lambda rank: rank.total_bytes)


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run."""

    stages: tuple[StagePlan, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Tokens of all stages, and of learning maps."""
        return sum(stage.tokens + (stage.learning.tokens if stage.learning else 0) for stage in self.stages)

    @property
    def flops(self) -> int:
        """FLOPs of all stages, by ``flops_per_token``, and of learning maps."""
        return sum(stage.flops + (stage.learning.flops if stage.learning else 0) for stage in self.stages)

    @property
    def flops_6nd(self) -> int:
        """6 N D, likewise."""
        return sum(stage.flops_6nd + (stage.learning.flops_6nd if stage.learning else 0) for stage in self.stages)


def plan_run(config: RunConfig, world_size: int | None = None) -> RunPlan:
    """Plan every stage.

    Args:
        world_size: ranks of all stages. Default: what each stage's data_parallel_size asks for; for stages without
            one, the largest such world size, or else the smallest that fits all their layouts.

    Raises:
        ConfigError: the world size does not fit a stage.
    """
    worlds = [world_size] * len(config.stages) if world_size is not None else _default_worlds(config)
    for index, world in enumerate(worlds):
        check_world_size(config, index, world)
    total = total_flops(config)
    return RunPlan(tuple(_plan_stage(config, index, world, total) for index, world in enumerate(worlds)))


def tokens_of_stages(config: RunConfig) -> list[int]:
    """Of each stage, with those on which maps for it are learned."""
    phases = [plan_learning(config, index, 1) for index in range(len(config.stages))]
    own = [stage.num_steps * stage.tokens_per_step for stage in config.stages]
    return [tokens + (phase.tokens if phase else 0) for tokens, phase in zip(own, phases, strict=True)]


def flops_of_stages(config: RunConfig) -> list[int]:
    """Of each stage, with those of learning maps for it."""
    phases = [plan_learning(config, index, 1) for index in range(len(config.stages))]
    own = [stage.num_steps * stage.tokens_per_step * flops_per_token(stage.model) for stage in config.stages]
    return [flops + (phase.flops if phase else 0) for flops, phase in zip(own, phases, strict=True)]


def total_flops(config: RunConfig) -> int:
    """Of all stages, and of learning maps."""
    return sum(flops_of_stages(config))


def plan_learning(config: RunConfig, index: int, data_parallel_size: int) -> LearningPlan | None:
    """The phase before a stage; None where it learns no maps."""
    growth = config.stages[index].growth or GrowthConfig()
    if index == 0 or not choose(growth).is_learned:
        return None
    source, (learn, stage) = config.stages[index - 1].model, phase_of(config.stages[index])
    layers = choose(growth).layers(source.num_layers, stage.model.num_layers)
    micro_batches = max(1, stage.training.global_batch_size // (stage.training.micro_batch_size * data_parallel_size))
    extra, total = [], []
    for rank in range(stage.parallel.pipeline_parallel_size):
        memory = rank_memory(stage, rank, data_parallel_size, micro_batches)
        costs = map_costs(source, stage.model, layers, stage.parallel, rank)
        extra.append(costs.extra_bytes)
        total.append(memory.weights_bytes + memory.gradients_bytes + memory.activations_bytes + costs.extra_bytes)
    tokens, map_flops = learn.steps * stage.tokens_per_step, learn.steps * map_costs(source, stage.model, layers).flops
    return LearningPlan(
        steps=learn.steps,
        tokens=tokens,
        flops=tokens * flops_per_token(stage.model) + map_flops,
        map_flops=map_flops,
        flops_6nd=6 * parameter_count(stage.model).total * tokens,
        extra_bytes=max(extra),
        total_bytes=max(total),
    )


def plan_to_dict(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON-able data; sizes in bytes."""
    stages = []
    for stage in plan.stages:
        entry = {
            field.name: getattr(stage, field.name)
            for field in dataclasses.fields(stage)
            if field.name not in ("model", "parallel", "parameters", "ranks", "learning")
        }
        entry["model"] = stage.model.model_dump(mode="json")
        entry["parallel"] = stage.parallel.model_dump(mode="json")
        entry["parameters"] = stage.parameters.total
        entry["parameters_without_embeddings"] = stage.parameters.without_embeddings
        entry["flops_6nd"] = stage.flops_6nd
        entry["ranks"] = [{**dataclasses.asdict(rank), "total_bytes": rank.total_bytes} for rank in stage.ranks]
        entry["learning"] = dataclasses.asdict(stage.learning) if stage.learning else None
        entry["worst_pipeline_rank"] = stage.worst.pipeline_rank
        stages.append(entry)
    return {
        "stages": stages,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "flops": plan.flops,
        "flops_6nd": plan.flops_6nd,
    }


def _default_worlds(config: RunConfig) -> list[int]:
    sizes = [stage.parallel.model_parallel_size for stage in config.stages]
    degrees = [stage.parallel.data_parallel_size for stage in config.stages]
    asked = [size * degree for size, degree in zip(sizes, degrees, strict=True) if degree is not None]
    shared = max(asked) if asked else math.lcm(*sizes)
    return [shared if degree is None else size * degree for size, degree in zip(sizes, degrees, strict=True)]


def _plan_stage(config: RunConfig, index: int, world_size: int, total_flops: int) -> StagePlan:
    stage = config.stages[index]
    parallel = stage.parallel
    data_parallel_size = world_size // parallel.model_parallel_size
    micro_batches = stage.training.global_batch_size // (stage.training.micro_batch_size * data_parallel_size)
    per_token = flops_per_token(stage.model)
    tokens = stage.num_steps * stage.tokens_per_step
    memory = (
        rank_memory(stage, rank, data_parallel_size, micro_batches) for rank in range(parallel.pipeline_parallel_size)
    )
    return StagePlan(
        name=stage.name,
        grown_by=_growth(config, index),
        model=stage.model,
        parallel=parallel,
        world_size=world_size,
        data_parallel_size=data_parallel_size,
        micro_batches=micro_batches,
        parameters=parameter_count(stage.model),
        flops_per_token=per_token,
        tokens_per_step=stage.tokens_per_step,
        steps=stage.num_steps,
        tokens=tokens,
        flops=per_token * tokens,
        ranks=tuple(
            dataclasses.replace(rank, copies_bytes=_copies_bytes(config, index, rank, data_parallel_size))
            for rank in memory
        ),
        bubble_to_ideal=bubble_to_ideal(parallel, micro_batches),
        bubble_fraction=bubble_fraction(parallel, micro_batches),
        checkpoint_bytes=checkpoint_bytes(stage.model, stage.training),
        groups=_groups(config, index),
        share=per_token * tokens / total_flops,
        learning=plan_learning(config, index, data_parallel_size),
    )


def _copies_bytes(config: RunConfig, index: int, memory: RankMemory, data_parallel_size: int) -> int:
    stage = config.stages[index]
    growth, settings = stage.growth or GrowthConfig(), stage.optimizer
    groups = masks = 0
    if settings.freeze or (index and settings.tells_new_apart):
        groups = FP32_BYTES * -(-memory.parameters // data_parallel_size)
    if index and mask_ramps(config.stages[index - 1].model, stage.model, choose(growth)):
        from growth_megatron.growth.masks import masked_elements  # needs torch
        from growth_megatron.growth.plan import plan_growth

        plan = plan_growth(config.stages[index - 1].model, stage.model, growth, config.run.seed)
        elements = masked_elements(plan, stage.parallel, memory.pipeline_rank)
        masks = element_bytes(stage.training) * elements
    return max(groups, masks)  # these are gone before those come


def _growth(config: RunConfig, index: int) -> str | None:
    stage = config.stages[index]
    if index == 0 and stage.growth is None:
        return None
    growth = stage.growth or GrowthConfig()
    listed = " by an explicit layer list" if growth.layers is not None else ""
    options = growth.model_dump(exclude=_SHOWN_OTHERWISE, exclude_defaults=True)
    notes = [
        f"optimizer state {choose(growth).state_policy}",
        *(f"{key} {_shown(value)}" for key, value in options.items()),
    ]
    if index == 0:  # of the source no more is known than its name
        if choose(growth).is_learned:
            notes.append(f"{phase_of(stage)[0].steps} steps that learn its maps come first and are not counted here")
        return f"{growth.operator}{listed} from {config.checkpoint.resume}: {', '.join(notes)}"
    source = config.stages[index - 1]
    pairs = [(key, getattr(source.model, key), getattr(stage.model, key)) for key in _GROWING]
    changes = [f"{key} {_shown(before)} -> {_shown(after)}" for key, before, after in pairs if before != after]
    if ramps := mask_ramps(source.model, stage.model, choose(growth)):
        notes.append(f"masks open: {describe_ramps(ramps)}")
    what = ", ".join(changes) or "the same geometry"
    return f"{growth.operator}{listed} from {source.name}: {what}; {', '.join(notes)}"


def _groups(config: RunConfig, index: int) -> str:
    stage, plan = config.stages[index], None
    if index and stage.optimizer.tells_new_apart:
        from growth_megatron.growth.plan import plan_growth  # needs torch

        growth = stage.growth or GrowthConfig()
        plan = plan_growth(config.stages[index - 1].model, stage.model, growth, config.run.seed)
    return describe_groups(stage.optimizer, plan, stage.model)


def _shown(value: object) -> str:
    """As YAML has it."""
    return str(value).lower()
