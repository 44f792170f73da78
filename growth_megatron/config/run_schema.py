"""What a run's YAML may say beside its stages: the run itself, checkpoints, evaluation, logging.

Owns: names, types, ranges of these options, and the whole that they make with the stages.
Does not own: what a stage may say (``config.schema``), reading files (``config.load``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from typing_extensions import Self

from growth_megatron.config.schema import StageConfig
from growth_megatron.config.section import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    refuse,
)
from growth_megatron.config.words import did_you_mean


class CheckpointConfig(Section):
    """When to save, what to keep, where to resume from."""

    interval_steps: PositiveInt | None = Field(None, description="default: only at the end of each stage")
    keep_last: PositiveInt = Field(2, description="newest checkpoints that stay; older ones are removed")
    keep_every_steps: PositiveInt | None = Field(None, description="checkpoints at these steps are permanent")
    async_save: bool = Field(False, description="training goes on while a process of its own writes")
    resume: str = Field("auto", min_length=1, description="auto | must | never | path or URL of a checkpoint")
    store: str | None = Field(
        None, min_length=1, description="URL, as s3://bucket/run: checkpoints are copied there, and fetched from there"
    )
    mode: Literal["continue", "branch"] = Field(
        "continue", description="from a path: at its stage and step, or at the start of this run's first stage"
    )
    data: Literal["same", "new"] = Field(
        "same", description="from a path: its data from where it was, or this run's data from their first sample"
    )

    @field_validator("resume")
    @classmethod
    def _resume(cls, value: str) -> str:
        words = ("auto", "must", "never")
        if value not in words and (hint := did_you_mean(value, words)):
            raise ValueError(f"is {value!r}{hint} A folder of that name is written ./{value}")
        return value

    @model_validator(mode="after")
    def _from_a_path(self) -> Self:
        text = f"needs the path of a checkpoint as resume, which is {self.resume}; set that, or leave this out"
        given = (("mode", self.mode == "branch"), ("data", self.data == "new"))
        refuse([(key, text) for key, is_set in given if is_set and self.resume in ("auto", "must", "never")])
        return self


class EvaluationConfig(Section):
    """Validation loss on held-out data, and lm-eval's tasks."""

    interval_steps: PositiveInt | None = Field(None, description="default: only at the end of each stage")
    samples: PositiveInt = Field(256, description="sequences per evaluation, the same each time")
    tasks: tuple[str, ...] = Field((), description="of lm-eval, or growth_paper; evaluated with the live model")
    tasks_interval_steps: PositiveInt | None = Field(None, description="default: only at the end of each stage")
    tasks_limit: PositiveInt | None = Field(None, description="documents of each task; default: all")
    include_path: str | None = Field(None, min_length=1, description="folder with more tasks; their code is run")


class WandbConfig(Section):
    """Where wandb files the run."""

    project: str = Field("growth-megatron", description="of wandb")
    entity: str | None = Field(None, description="team or user; default: the account's")
    name: str | None = Field(None, description="default: the run directory's")
    group: str | None = Field(None, description="runs that wandb shows together")
    tags: tuple[str, ...] = Field((), description="words by which wandb filters")


class LoggingConfig(Section):
    """What is reported; metrics.jsonl is always written."""

    interval_steps: PositiveInt = Field(10, description="steps between two lines on the console and in metrics.jsonl")
    tensorboard: bool = Field(False, description="also writes RUN/tensorboard")
    wandb: WandbConfig | None = Field(None, description="offline when no API key is set")
    peak_tflops_per_s: PositiveFloat | None = Field(
        None, description="dense peak of one device, for MFU; default: by name"
    )
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="first and last step of the run that torch.profiler records, on every rank, to RUN/profiles"
    )

    @field_validator("profile_steps")
    @classmethod
    def _order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"{list(value)} must rise; write the first step, then the last")
        return value


class RunSection(Section):
    """Where the run lives and what seeds it."""

    directory: str = Field(min_length=1, description="of the run: checkpoints, metrics, logs")
    seed: NonNegativeInt = Field(1234, lt=2**63, description="of initial values and of the order of data")
    timeout_s: PositiveFloat | None = Field(
        None,
        description="seconds without any progress after which the run ends itself; default: 20 of its longest steps, "
        "at least 300; 1800 where it saves, grows or begins",
    )


class RunConfig(Section):
    """A whole run: what is shared by all stages, and the stages."""

    run: RunSection
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _chain(cls, stages: tuple[StageConfig, ...], info: ValidationInfo) -> tuple[StageConfig, ...]:
        first, problems = stages[0], []
        checkpoint = info.data.get("checkpoint")
        if first.growth is not None and (checkpoint is None or checkpoint.mode != "branch"):
            text = "the first stage has nothing to grow from; remove its growth, or name a checkpoint: from: RUN@STEP"
            problems.append(("0.growth", text))
        names = [stage.name for stage in stages]
        for index, stage in enumerate(stages):
            if stage.num_steps == 0 and (index or len(stages) == 1 or stage.growth is not None):
                problems.append(
                    (f"{index}.training.steps", "is 0, which only a first stage that is then grown may have")
                )
            if stage.name in names[:index]:
                text = f"{stage.name} is the name of an earlier stage; give each stage its own"
                problems.append((f"{index}.name", text))
            for section, key in (("model", "vocab_size"), ("model", "vocab_multiple"), ("data", "tokenizer")):
                here, there = (getattr(getattr(one, section), key) for one in (stage, first))
                if here != there:
                    text = f"{here} differs from the first stage's {there}; set it once, at the top level"
                    problems.append((f"{index}.{section}.{key}", text))
        refuse(problems or (info.context.chain_problems(stages) if info.context else []))
        return stages
