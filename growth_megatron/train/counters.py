"""Where a run stands, as values.

Owns: the counters of a run and their arithmetic.
Does not own: their storage (``checkpoint.folder.manifest``).
"""

from __future__ import annotations

import dataclasses

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.config.schema import RunConfig, StageConfig
from growth_megatron.model.cost import flops_per_token


@dataclasses.dataclass(frozen=True)
class Counters:
    """Counters of a run; ``step``, samples, tokens and flops count over all stages."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    flops: float = 0.0

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> Counters:
        """The counters that a checkpoint was saved with."""
        return cls(**{field.name: getattr(manifest, field.name) for field in dataclasses.fields(cls)})

    def after_step(self, stage: StageConfig) -> Counters:
        """The counters one optimizer step later."""
        return dataclasses.replace(
            self,
            step=self.step + 1,
            stage_step=self.stage_step + 1,
            consumed_samples=self.consumed_samples + stage.training.global_batch_size,
            consumed_tokens=self.consumed_tokens + stage.tokens_per_step,
            flops=self.flops + float(flops_per_token(stage.model)) * stage.tokens_per_step,
        )

    def ends_stage(self, config: RunConfig) -> bool:
        """Whether the present stage has all its steps."""
        return self.stage_step >= config.stages[self.stage].num_steps

    def ends_run(self, config: RunConfig) -> bool:
        """Whether the last stage has all its steps."""
        return self.ends_stage(config) and self.stage == len(config.stages) - 1
