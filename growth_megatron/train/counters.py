"""Where a run stands, as values.

Owns: the counters of a run and their arithmetic.
Does not own: their storage (``checkpoint.folder.manifest``).
"""

from __future__ import annotations

import dataclasses

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import (
    StageConfig,
)
from growth_megatron.model.cost import flops_per_token, parameter_count

BAND_STEPS = 32
"""Over about so many steps the band of usual losses is averaged, in each stage anew."""


@dataclasses.dataclass(frozen=True)
class Counters:
    """Counters of a run; ``step``, tokens and flops count over all stages."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    flops: float = 0.0
    flops_6nd: float | None = 0.0
    """6 N D with all parameters, embeddings included; None after a checkpoint that did not count it."""
    skipped_samples: int = 0
    """As ``consumed_samples`` of the data that the stage reads: both begin anew where a stage brings others."""
    skipped_steps: int = 0
    loss_mean: float = 0.0
    loss_deviation: float = 0.0

    @property
    def next_sample(self) -> int:
        """Of the stream: where the next step begins to read."""
        return self.consumed_samples + self.skipped_samples

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Counters:
        """The counters that a checkpoint was saved with."""
        stored = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(cls)}
        return cls(**{**stored, "flops_6nd": 0.0} if manifest.flops == 0 else stored)

    def entering(self, stage: StageConfig, before: StageConfig) -> Counters:
        """From one stage to the next: other samples than those of the stage before begin with their first."""
        if stage.stream == before.stream:
            return self
        return dataclasses.replace(self, consumed_samples=0, skipped_samples=0)

    def after_step(self, stage: StageConfig) -> Counters:
        """The counters one optimizer step later."""
        more_6nd = 6.0 * parameter_count(stage.model).total * stage.tokens_per_step
        return dataclasses.replace(
            self,
            step=self.step + 1,
            stage_step=self.stage_step + 1,
            consumed_samples=self.consumed_samples + stage.training.global_batch_size,
            consumed_tokens=self.consumed_tokens + stage.tokens_per_step,
            flops=self.flops + float(flops_per_token(stage.model)) * stage.tokens_per_step,
            flops_6nd=None if self.flops_6nd is None else self.flops_6nd + more_6nd,
        )

    def after_learning(self, stage: StageConfig, map_flops: int, steps: int) -> Counters:
        """The counters after some steps of learning maps with ``stage``'s model and batch, no steps of the run."""
        tokens = steps * stage.tokens_per_step
        more_6nd = 6.0 * parameter_count(stage.model).total * tokens
        return dataclasses.replace(
            self,
            consumed_samples=self.consumed_samples + steps * stage.training.global_batch_size,
            consumed_tokens=self.consumed_tokens + tokens,
            flops=self.flops + float(flops_per_token(stage.model)) * tokens + float(map_flops) * steps,
            flops_6nd=None if self.flops_6nd is None else self.flops_6nd + more_6nd,
        )

    def with_loss(self, loss: float) -> Counters:
        """The running band of losses with that of the step just taken."""
        share = 1 / min(max(self.stage_step, 1), BAND_STEPS)
        mean = self.loss_mean + share * (loss - self.loss_mean)
        deviation = self.loss_deviation + share * (abs(loss - mean) - self.loss_deviation)
        return dataclasses.replace(self, loss_mean=mean, loss_deviation=deviation)

    def ends_stage(self, config: RunConfig) -> bool:
        """Whether the present stage has all its steps."""
        return self.stage_step >= config.stages[self.stage].num_steps

    def ends_run(self, config: RunConfig) -> bool:
        """Whether the last stage has all its steps."""
        return self.ends_stage(config) and self.stage == len(config.stages) - 1
