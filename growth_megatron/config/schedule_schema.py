"""What ``schedule:`` may say, of a stage and of a growth that learns: the learning rate.

Owns: names, types and ranges. Does not own: the curves (``train.schedule``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from growth_megatron.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section, refuse


class ScheduleConfig(Section):
    """Learning rate as a pure function of the step within its scope."""

    kind: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after the warm-up; wsd: constant, then linear to the minimum"
    )
    learning_rate: PositiveFloat = Field(le=1e6, description="peak")
    min_learning_rate: NonNegativeFloat = Field(0.0, description="at the end")
    warmup_steps: NonNegativeInt = Field(0, description="linear, from 0 to the peak")
    decay_steps: PositiveInt | None = Field(
        None,
        description="cosine: step at which the minimum is reached; wsd: length of the final decay; default: "
        "the stage's length (cosine), a tenth of it (wsd)",
    )

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            text = f"{self.min_learning_rate} is above learning_rate {self.learning_rate}; lower it"
            refuse([("min_learning_rate", text)])
        return self
