"""What ``growth:`` may say: the options of a growth and their types.

Owns: names and types. Does not own: which operators there are and which options go with them (``growth.operators``),
which geometries an operator can lead to (``growth.conditions``).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, model_validator
from typing_extensions import Self

from growth_megatron.config.schedule_schema import ScheduleConfig
from growth_megatron.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    refuse,
)

Ramp = tuple[NonNegativeInt, PositiveInt]
"""Steps of the stage: up to the first a mask is closed, from the last on it is open."""


class MaskRamps(Section):
    """The ramp of each kind of mask, by default in the order of the paper, whose steps have 2.1 million tokens."""

    depth: Ramp = Field((0, 5000), description="of new layers")
    ffn: Ramp = Field((0, 5000), description="of new ffn units")
    hidden: Ramp = Field((5000, 10000), description="of new channels of the residual stream")
    heads: Ramp = Field((10000, 15000), description="of new heads")

    @model_validator(mode="after")
    def _order(self) -> Self:
        pairs = {kind: getattr(self, kind) for kind in type(self).model_fields}
        wrong = {kind: ramp for kind, ramp in pairs.items() if ramp[0] >= ramp[1]}
        refuse([(kind, f"{list(ramp)} must rise; write the first step, then the last") for kind, ramp in wrong.items()])
        return self


class LearnConfig(Section):
    """The phase in which the maps of a learned growth are trained, on the data that come next."""

    steps: PositiveInt = Field(100, description="of the phase; their tokens and FLOPs count")
    schedule: ScheduleConfig = ScheduleConfig(learning_rate=1e-3, warmup_steps=10)
    global_batch_size: PositiveInt | None = Field(None, description="sequences per step; default: the stage's")
    save_interval_steps: PositiveInt = Field(10, description="what a killed phase loses at most")


class GrowthConfig(Section):
    """How a stage's model comes out of the one before it; ``growth.conditions`` says what each operator can do."""

    operator: str = Field("direct", min_length=1, description="what is done, or DEPTH+WIDTH as in identity+split")
    layers: str | tuple[NonNegativeInt, ...] | None = Field(
        None,
        description="source layer of each target layer: from 0, as 0,1,0,1 or 0-23,6-29 or 0-3 x6; or the paper's "
        "1-234*7-56; default: the operator's",
    )
    optimizer_state: Literal["reset", "carry", "asymmetric"] | None = Field(
        None,
        description="moments zero, carried by the exact rule, or carried for old coordinates only; default: the "
        "operator's, most often reset",
    )
    schedule: Literal["restart", "continue"] = Field(
        "restart", description="warm up again from the stage's first step, or one schedule over both stages"
    )
    order: Literal["interleaved", "tiled"] | None = Field(
        None, description="of copies along a width axis; default: the operator's, most often interleaved"
    )
    shares: Literal["even", "uneven"] = Field("even", description="of the copies of a coordinate in what reads them")
    cancelling_noise: NonNegativeFloat = Field(
        0.0, description="noise that cancels over the copies of a coordinate, in units of init_std"
    )
    noise: Fraction = Field(0.0, description="the paper's a in W <- (1 - a) W + a noise, on the layers' matrices")
    ramp: MaskRamps | None = Field(None, description="steps over which masks open, as {hidden: [0, 500]}")
    learn: LearnConfig | None = Field(None, description="of learned maps, as {steps: 200}")
    multipliers: bool = Field(
        False, description="learning rate, weight decay and epsilon per parameter such that the source run is followed"
    )

    @model_validator(mode="after")
    def _known_to_the_operators(self, info: ValidationInfo) -> Self:
        if info.context:
            refuse(info.context.option_problems(self))
        return self
