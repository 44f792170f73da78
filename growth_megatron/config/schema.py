"""What a stage of a run may say in YAML: frozen pydantic models, one a section.

Owns: names, types, ranges and cross-checks of these options but those of ``growth:`` (``config.growth_schema``).
Does not own: what a run says beside its stages (``config.run_schema``), reading files, includes and overrides
(``config.load``), costs (``train.plan``).

In the YAML a stage writes only what differs from the top level; ``config.load`` merges, so that every ``StageConfig``
here is complete by itself.
"""

from __future__ import annotations

import math
import os
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schedule_schema import ScheduleConfig
from growth_megatron.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    divisors,
    refuse,
    whole_number,
)

_DEFAULTED = ("num_query_groups", "head_dim", "max_position_embeddings")
"""Fields of a model whose default follows from the others."""


MAX_LAYERS, MAX_WIDTH, MAX_ENTRIES = 1 << 14, 1 << 20, 1 << 31
"""Of a model, and of a vocabulary (token ids are stored in 32 bits): beyond is a mistyped or a hostile number."""


class RopeScaling(Section):
    """LLaMA 3's scaling of the rotary frequencies for long contexts (arXiv 2407.21783; transformers' ``llama3``)."""

    type: Literal["llama3"] = Field(description="the one that there is")
    factor: PositiveFloat = Field(8.0, description="by which the lowest frequencies are divided")
    low_freq_factor: PositiveFloat = Field(1.0, description="longer waves than context / this are divided in full")
    high_freq_factor: PositiveFloat = Field(4.0, description="shorter waves than context / this stay as they are")
    original_max_position_embeddings: PositiveInt = Field(8192, description="context before the scaling, in tokens")

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            text = f"{self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}; raise it"
            refuse([("high_freq_factor", text)])
        return self


class ModelConfig(Section):
    """Geometry of a LLaMA (pre-norm, RMSNorm, RoPE, SwiGLU), with what its relatives Qwen2 and Qwen3 have besides."""

    num_layers: NonNegativeInt = Field(le=MAX_LAYERS, description="0: embedding, norm and output alone, to be grown")
    hidden_size: PositiveInt = Field(le=MAX_WIDTH, description="channels of the residual stream")
    num_attention_heads: PositiveInt = Field(le=MAX_WIDTH, description="query heads")
    num_query_groups: PositiveInt = Field(0, description="key/value heads; default: num_attention_heads")
    head_dim: PositiveInt = Field(
        0, le=MAX_WIDTH, description="channels of a head; default: hidden_size / num_attention_heads"
    )
    ffn_hidden_size: PositiveInt = Field(le=MAX_WIDTH, description="units of the SwiGLU, gate and up each")
    vocab_size: PositiveInt = Field(le=MAX_ENTRIES, description="entries of the tokenizer")
    vocab_multiple: PositiveInt = Field(
        128, le=MAX_ENTRIES, description="the vocabulary is padded to a multiple of this, at every layout"
    )
    sequence_length: PositiveInt = Field(2048, description="of the samples trained on; a run may change it")
    max_position_embeddings: PositiveInt = Field(
        0, description="context that the model is meant for, as exports say; default: sequence_length"
    )
    rope_base: PositiveFloat = Field(10000.0, description="of the rotary frequencies (theta)")
    rope_scaling: RopeScaling | None = None
    norm_epsilon: PositiveFloat = Field(1e-5, description="of every RMSNorm")
    tie_embeddings: bool = Field(False, description="one matrix for embedding and output")
    attention_bias: bool = Field(False, description="biases of q, k and v, as in Qwen2")
    qk_norm: bool = Field(False, description="an RMSNorm over each head of q and k, as in Qwen3")
    init_std: PositiveFloat = Field(
        0.02,
        description="deviation of initial weights; for small models sqrt(2 / 5 / hidden_size) is the better choice",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: Any) -> Any:
        """Equal models are equal values, however they were written down."""
        if not isinstance(values, dict):
            return values
        filled = {key: value for key, value in values.items() if key not in _DEFAULTED or value is not None}
        if length := whole_number(filled.get("sequence_length", 2048)):
            filled.setdefault("max_position_embeddings", length)
        heads, hidden = (whole_number(filled.get(key)) for key in ("num_attention_heads", "hidden_size"))
        if heads:
            filled.setdefault("num_query_groups", heads)
            if hidden and hidden % heads == 0:
                filled.setdefault("head_dim", hidden // heads)
        return filled

    @model_validator(mode="after")
    def _heads(self) -> Self:
        heads, problems = self.num_attention_heads, []
        if "head_dim" not in self.model_fields_set:
            text = f"{heads} does not divide hidden_size {self.hidden_size}; change one of them or set head_dim"
            problems.append(("num_attention_heads", text))
        elif self.head_dim % 2:
            key = "num_attention_heads" if self.head_dim * heads == self.hidden_size else "head_dim"
            problems.append((key, f"gives heads of {self.head_dim} channels; RoPE rotates pairs, so make it even"))
        if self.sequence_length > self.max_position_embeddings:
            text = f"{self.sequence_length} is above max_position_embeddings {self.max_position_embeddings}; "
            problems.append(("sequence_length", text + "lower it, or raise that too"))
        if heads % self.num_query_groups:
            text = f"{self.num_query_groups} does not divide num_attention_heads {heads}; allowed: {divisors(heads)}"
            problems.append(("num_query_groups", text))
        refuse(problems)
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary up to the next multiple of ``vocab_multiple``."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class ParallelConfig(Section):
    """Parallel layout; the data-parallel size is what remains of the world size."""

    tensor_parallel_size: PositiveInt = Field(1, description="ranks that share each layer")
    sequence_parallel: bool = Field(False, description="tensor-parallel ranks split activations between layers too")
    pipeline_parallel_size: PositiveInt = Field(1, description="ranks that share the layers out among them")
    virtual_pipeline_parallel_size: PositiveInt | None = Field(None, description="model chunks per pipeline rank")
    data_parallel_size: PositiveInt | None = Field(None, description="default: world size / (tensor * pipeline)")
    overlap_grad_reduce: bool = Field(True, description="reduce gradients during the backward pass")
    overlap_param_gather: bool = Field(False, description="gather parameters during the next forward pass")

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        problems = []
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            text = "needs tensor_parallel_size > 1; set it to false or raise tensor_parallel_size"
            problems.append(("sequence_parallel", text))
        if self.model_chunks > 1 and self.pipeline_parallel_size == 1:
            text = "needs pipeline_parallel_size > 1; remove it or raise pipeline_parallel_size"
            problems.append(("virtual_pipeline_parallel_size", text))
        refuse(problems)
        return self

    @property
    def model_chunks(self) -> int:
        """Model chunks per pipeline rank (1 without virtual pipelining)."""
        return self.virtual_pipeline_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one model between them."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class DatasetConfig(Section):
    """One prepared dataset of a blend."""

    path: str = Field(min_length=1, description="prefix of .bin and .idx")
    weight: PositiveFloat | None = Field(None, description="share of the samples; default: by its tokens")


class DataConfig(Section):
    """Where the tokens come from."""

    tokenizer: str | None = Field(
        None, min_length=1, description="SentencePiece model, tokenizer.json, or a folder with one"
    )
    train: tuple[DatasetConfig, ...] = Field(min_length=1)
    validation: tuple[DatasetConfig, ...] = ()
    validation_fraction: Fraction = Field(
        0.0, description="share of the documents of `train` held out, where `validation` names no files"
    )
    cache_directory: str | None = Field(None, description="sample index cache; default: beside the run")

    @model_validator(mode="after")
    def _datasets(self) -> Self:
        problems = []
        if self.validation and self.validation_fraction:
            problems.append(("validation_fraction", "is given together with validation files; keep one of the two"))
        trained_on = {os.path.normpath(entry.path) for entry in self.train}
        for index, entry in enumerate(self.validation):
            if os.path.normpath(entry.path) in trained_on:
                text = "is in train too, so it would measure what is known by heart; name other data or leave it out "
                problems.append((f"validation.{index}.path", f"{text}and set validation_fraction"))
        for name, entries in (("train", self.train), ("validation", self.validation)):
            if len({entry.weight is None for entry in entries}) > 1:
                problems.append((name, "some entries have a weight and some have none; give it to all, or to none"))
        refuse(problems)
        return self


class NewParametersConfig(Section):
    """How parameters that the stage's growth has added are trained; others go by the sections as they stand."""

    learning_rate_multiplier: PositiveFloat = Field(1.0, description="on the schedule's rate")
    warmup_steps: NonNegativeInt = Field(0, description="a warm-up of their own, of the stage's first steps")
    weight_decay: NonNegativeFloat | None = Field(None, description="default: optimizer.weight_decay")


class OptimizerConfig(Section):
    """AdamW, sharded over data-parallel ranks (Megatron's DistributedOptimizer, always)."""

    beta1: Fraction = Field(0.9, description="of the mean of gradients")
    beta2: Fraction = Field(0.95, description="of the mean of their squares")
    epsilon: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled; none on gains of norms")
    clip_grad: NonNegativeFloat = Field(1.0, description="largest global gradient norm; 0 switches clipping off")
    new_parameters: NewParametersConfig = NewParametersConfig()
    train_only: Literal["all", "new"] = Field("all", description="new: only what the stage's growth has added")
    train_only_steps: PositiveInt | None = Field(
        None, description="steps of the stage after which all are trained; default: never"
    )
    freeze: tuple[str, ...] = Field(
        (), description="tensors that are not trained, as in [embedding.*, decoder.layers.0.*]"
    )

    @model_validator(mode="after")
    def _only_new(self) -> Self:
        if self.train_only_steps is not None and self.train_only == "all":
            refuse([("train_only_steps", "needs train_only: new; set that, or leave this out")])
        return self

    @property
    def tells_new_apart(self) -> bool:
        """Whether new parameters are trained otherwise than old ones."""
        return self.train_only == "new" or self.new_parameters != NewParametersConfig()


class TrainingConfig(Section):
    """Length, batch and numerics of a stage."""

    steps: NonNegativeInt | None = Field(None, description="optimizer steps of the stage; 0 only of a first one")
    tokens: PositiveInt | None = Field(None, description="tokens of the stage, rounded up to whole steps")
    global_batch_size: PositiveInt = Field(description="sequences per step, over all data-parallel ranks")
    micro_batch_size: PositiveInt = Field(1, description="sequences per rank and forward pass")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16: weights too; masters and moments are fp32")
    deterministic: bool = Field(
        False, description="losses the same to the last bit on a GPU too, which costs speed; a CPU always gives them"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="in backward: none; selective: recompute_modules of each layer; full: whole layers"
    )
    recompute_modules: list[Literal["core_attn", "mlp"]] | None = Field(
        None, min_length=1, description="with recompute: selective; default: core_attn, as in Megatron"
    )
    on_non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="a step whose loss or gradient is not finite, or whose loss is a spike, is never taken: stop the "
        "run, go on without it, or go on from the last checkpoint past its samples",
    )
    non_finite_limit: PositiveInt = Field(
        3, description="steps skipped in a row, or rollbacks to one checkpoint, before the run stops after all"
    )
    spike_deviations: PositiveFloat | None = Field(
        None, description="a loss so many mean deviations above the stage's running mean is a spike; default: none is"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_modules(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("recompute") == "selective" and data.get("recompute_modules") is None:
            return {**data, "recompute_modules": ["core_attn"]}
        return data

    @model_validator(mode="after")
    def _length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            state = "has neither steps nor tokens" if self.steps is None else "has both steps and tokens"
            refuse([("", f"{state}; give the stage's length as exactly one of the two")])
        return self

    @model_validator(mode="after")
    def _modules(self) -> Self:
        if self.recompute_modules and self.recompute != "selective":
            text = f"needs recompute: selective (recompute is {self.recompute}); set that, or leave this out"
            refuse([("recompute_modules", text)])
        return self


def layout_problems(model: ModelConfig, parallel: ParallelConfig) -> list[tuple[str, str]]:
    """How ``model`` does not divide into this layout, by dotted key of a stage."""
    problems = []
    tensor, pipeline, chunks = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.model_chunks
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "ffn_hidden_size": model.ffn_hidden_size,
        "padded vocabulary": model.padded_vocab_size,
    }
    if parallel.sequence_parallel:
        sizes["sequence_length"] = model.sequence_length
    if wrong := ", ".join(f"{name} {size}" for name, size in sizes.items() if size % tensor):
        text = f"{tensor} does not divide {wrong}; allowed: {divisors(*sizes.values())}"
        problems.append(("parallel.tensor_parallel_size", text))
    if not model.num_layers and pipeline > 1:
        text = f"{pipeline} ranks would divide the layers, and num_layers is 0; set it to 1"
        problems.append(("parallel.pipeline_parallel_size", text))
    if model.num_layers % (pipeline * chunks):
        stages = f"pipeline_parallel_size {pipeline}"
        if chunks > 1:
            stages += f" x virtual_pipeline_parallel_size {chunks} = {pipeline * chunks}"
        allowed = f"allowed: a product out of {divisors(model.num_layers)}; or change num_layers"
        text = f"num_layers {model.num_layers} is not a multiple of {stages}; {allowed}"
        problems.append(("parallel.pipeline_parallel_size", text))
    return problems


class StageConfig(Section):
    """One stage, complete: top-level sections merged with the stage's own."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]*[A-Za-z_-][A-Za-z0-9_-]*$", description="letters, digits, - and _; not digits alone"
    )
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    training: TrainingConfig
    data: DataConfig
    growth: GrowthConfig | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        refuse([*layout_problems(self.model, self.parallel), *self._length_problems()])
        return self

    def _length_problems(self) -> list[tuple[str, str]]:
        problems, training, schedule = [], self.training, self.schedule
        if training.global_batch_size % training.micro_batch_size:
            text = f"{training.micro_batch_size} does not divide global_batch_size {training.global_batch_size}"
            problems.append(("training.micro_batch_size", f"{text}; allowed: {divisors(training.global_batch_size)}"))
        if schedule.warmup_steps > self.num_steps > 0:
            text = f"{schedule.warmup_steps} is longer than the stage; set it to {self.num_steps} or less"
            problems.append(("schedule.warmup_steps", text))
        return problems

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.training.global_batch_size * self.model.sequence_length

    @property
    def stream(self) -> tuple[Any, ...]:
        """What the order of its samples depends on: a stage goes on in that of the one before where both have this."""
        return self.data.train, self.data.validation_fraction, self.model.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this stage."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.tokens is not None
        return math.ceil(self.training.tokens / self.tokens_per_step)
