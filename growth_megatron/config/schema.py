"""What a run's YAML may say: frozen pydantic models, one a section.

Owns: names, types, ranges and cross-checks of every option.
Does not own: reading files, includes and overrides (``config.load``), costs (``config.plan``).

A run is a list of stages. In the YAML a stage writes only what differs from the top level; ``config.load`` merges,
so that every ``StageConfig`` here is complete by itself.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ModelConfig(Section):
    """Geometry of a LLaMA model (pre-norm, RMSNorm, RoPE, SwiGLU, no biases)."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt | None = Field(None, description="key/value heads; default: num_attention_heads")
    head_dim: PositiveInt | None = Field(None, description="default: hidden_size / num_attention_heads")
    ffn_hidden_size: PositiveInt
    vocab_size: PositiveInt = Field(description="entries of the tokenizer")
    vocab_multiple: PositiveInt = Field(128, description="the embedding is padded to a multiple of this, at every layout")
    sequence_length: PositiveInt = 2048
    rope_base: PositiveFloat = 10000.0
    norm_epsilon: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    init_std: PositiveFloat = 0.02

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}; "
                "change one of them or set head_dim"
            )
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_query_groups "
                f"{self.query_groups}; each query group serves the same number of heads"
            )
        if self.kv_channels % 2:
            raise ValueError(f"head_dim {self.kv_channels} is odd; RoPE rotates pairs, so use an even head_dim")
        return self

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Channels of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class ParallelConfig(Section):
    """Parallel layout; the data-parallel size is what remains of the world size."""

    tensor_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    pipeline_parallel_size: PositiveInt = 1
    virtual_pipeline_parallel_size: PositiveInt | None = Field(None, description="model chunks per pipeline rank")
    data_parallel_size: PositiveInt | None = Field(None, description="default: world size / (tensor * pipeline)")
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = Field(False, description="gather parameters during the next forward pass")

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError("sequence_parallel needs tensor_parallel_size > 1; set it to false or raise the latter")
        if self.virtual_pipeline_parallel_size and self.virtual_pipeline_parallel_size > 1:
            if self.pipeline_parallel_size == 1:
                raise ValueError("virtual_pipeline_parallel_size needs pipeline_parallel_size > 1; remove it")
        return self

    @property
    def chunks(self) -> int:
        """Model chunks per pipeline rank (1 without virtual pipelining)."""
        return self.virtual_pipeline_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


class DatasetConfig(Section):
    """One prepared dataset of a blend."""

    path: str = Field(min_length=1, description="prefix of .bin and .idx")
    weight: PositiveFloat = 1.0


class DataConfig(Section):
    """Where the tokens come from."""

    tokenizer: str = Field(min_length=1, description="SentencePiece model file")
    train: tuple[DatasetConfig, ...] = Field(min_length=1)
    validation: tuple[DatasetConfig, ...] = ()
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the documents of `train` held out, where `validation` names no files"
    )
    cache_directory: str | None = Field(None, description="sample index cache; default: beside the run")

    @model_validator(mode="after")
    def _one_validation(self) -> Self:
        if self.validation and self.validation_fraction:
            raise ValueError("give either validation files or validation_fraction, not both")
        return self


class OptimizerConfig(Section):
    """AdamW, sharded over data-parallel ranks (Megatron's DistributedOptimizer, always)."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    clip_grad: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 switches clipping off")


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step within its scope."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    learning_rate: PositiveFloat = Field(description="peak")
    min_learning_rate: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = Field(
        None, description="cosine: step at which the minimum is reached; wsd: length of the final decay; default: "
        "the stage's length (cosine), a tenth of it (wsd)"
    )

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}; lower it"
            )
        return self


class TrainingConfig(Section):
    """Length, batch and numerics of a stage."""

    steps: PositiveInt | None = Field(None, description="optimizer steps of the stage")
    tokens: PositiveInt | None = Field(None, description="tokens of the stage, rounded up to whole steps")
    global_batch_size: PositiveInt = Field(description="sequences per step, over all data-parallel ranks")
    micro_batch_size: PositiveInt = 1
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="selective: attention and MLP are recomputed in backward; full: whole layers"
    )

    @model_validator(mode="after")
    def _length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give the stage's length as exactly one of steps or tokens")
        return self


class CheckpointConfig(Section):
    """When to save, what to keep, where to resume from."""

    interval_steps: PositiveInt | None = Field(None, description="default: only at the end of each stage")
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = Field(None, description="checkpoints at these steps are permanent")
    async_save: bool = False
    resume: str = Field("auto", description="auto | must | never | path of a checkpoint")


class EvaluationConfig(Section):
    """Validation loss on held-out data."""

    interval_steps: PositiveInt | None = Field(None, description="default: only at the end of each stage")
    samples: PositiveInt = Field(256, description="sequences per evaluation, the same each time")


class WandbConfig(Section):
    project: str = "growth-megatron"
    name: str | None = None


class LoggingConfig(Section):
    """What is reported; metrics.jsonl is always written."""

    interval_steps: PositiveInt = 10
    tensorboard: bool = False
    wandb: WandbConfig | None = Field(None, description="offline when no API key is set")
    peak_tflops_per_s: PositiveFloat | None = Field(None, description="dense peak of one device, for MFU; default: by name")


class GrowthConfig(Section):
    """How a stage's model comes out of the one before it."""

    operator: Literal["stack"] = "stack"
    layers: str | tuple[NonNegativeInt, ...] | None = Field(
        None, description="explicit source layer of each target layer, as a list or in the paper's notation (1-234*7-56)"
    )
    optimizer_state: Literal["reset", "carry"] = "reset"
    schedule: Literal["restart", "continue"] = "restart"


class StageConfig(Section):
    """One stage, complete: top-level sections merged with the stage's own."""

    name: str
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    training: TrainingConfig
    growth: GrowthConfig | None = None

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        tensor, model = self.parallel.tensor_parallel_size, self.model
        for name, value in (
            ("num_attention_heads", model.num_attention_heads),
            ("num_query_groups", model.query_groups),
            ("ffn_hidden_size", model.ffn_hidden_size),
            ("the padded vocabulary", model.padded_vocab_size),
        ):
            if value % tensor:
                raise ValueError(
                    f"{name} ({value}) is not a multiple of tensor_parallel_size {tensor}; "
                    f"allowed tensor_parallel_size: divisors of {value}"
                )
        if self.parallel.sequence_parallel and model.sequence_length % tensor:
            raise ValueError(
                f"sequence_length {model.sequence_length} is not a multiple of tensor_parallel_size {tensor}, "
                "which sequence_parallel needs"
            )
        stages = self.parallel.pipeline_parallel_size * self.parallel.chunks
        if model.num_layers % stages:
            raise ValueError(
                f"num_layers {model.num_layers} is not a multiple of pipeline_parallel_size "
                f"{self.parallel.pipeline_parallel_size} x virtual_pipeline_parallel_size {self.parallel.chunks} "
                f"= {stages}; use a multiple of {stages} layers or fewer pipeline stages"
            )
        if self.training.global_batch_size % self.training.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.training.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.training.micro_batch_size}"
            )
        if self.schedule.warmup_steps > self.num_steps:
            raise ValueError(
                f"warmup_steps {self.schedule.warmup_steps} is longer than the stage ({self.num_steps} steps); shorten it"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.model.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this stage."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.tokens is not None
        return math.ceil(self.training.tokens / self.tokens_per_step)


class RunSection(Section):
    """Where the run lives and what seeds it."""

    directory: str = Field(min_length=1)
    seed: NonNegativeInt = 1234


class RunConfig(Section):
    """A whole run: what is shared by all stages, and the stages."""

    run: RunSection
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _chain(self) -> Self:
        first = self.stages[0]
        if first.growth is not None:
            raise ValueError("the first stage has nothing to grow from; remove its growth section")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, got {names}")
        for stage in self.stages:
            for name in ("sequence_length", "vocab_size", "vocab_multiple"):
                here, there = getattr(stage.model, name), getattr(first.model, name)
                if here != there:
                    raise ValueError(f"stage {stage.name}: {name} {here} differs from the first stage's {there}")
        return self

    def stage_of_step(self, step: int) -> tuple[int, int]:
        """Stage index and step within it of global ``step``; a boundary belongs to the earlier stage's end."""
        start = 0
        for index, stage in enumerate(self.stages):
            if step <= start + stage.num_steps:
                return index, step - start
            start += stage.num_steps
        return len(self.stages) - 1, step - (start - self.stages[-1].num_steps)

    def stage_start(self, index: int) -> int:
        """Global step at which stage ``index`` starts."""
        return sum(stage.num_steps for stage in self.stages[:index])
