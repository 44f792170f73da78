"""What ``growth:`` may say: the operators' names and their options.

Owns: names, types and which options go together. Does not own: which geometries an operator can lead to
(``growth.conditions``), what becomes of the tensors (``growth``).
"""

from __future__ import annotations

import difflib
from typing import Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from growth_megatron.config.section import Fraction, NonNegativeFloat, NonNegativeInt, Section, refuse

BOTH_OPERATORS = ("direct", "zero", "random")
DEPTH_OPERATORS = ("stack", "interpolate", "solar", "midas", "gradual", "identity")
WIDTH_OPERATORS = ("split", "hypercloning", "sparkling")
COPYING_WIDTH_OPERATORS = WIDTH_OPERATORS
"""Of the width operators those whose new coordinates are copies of old ones."""


class GrowthConfig(Section):
    """How a stage's model comes out of the one before it; ``growth.conditions`` says what each operator can do."""

    operator: str = Field(
        "direct",
        description="direct | zero | random; depth: stack | interpolate | solar | midas | gradual | identity; width: "
        "split | hypercloning | sparkling; or DEPTH+WIDTH, as in identity+split",
    )
    layers: str | tuple[NonNegativeInt, ...] | None = Field(
        None,
        description="explicit source layer of each target layer, as a list or in the paper's notation (1-234*7-56)",
    )
    optimizer_state: Literal["reset", "carry", "asymmetric"] | None = Field(
        None,
        description="moments zero, carried by the exact rule, or carried for old coordinates only; default: reset "
        "(sparkling: asymmetric)",
    )
    schedule: Literal["restart", "continue"] = "restart"
    order: Literal["interleaved", "tiled"] | None = Field(
        None, description="of copies along a width axis; default: interleaved (hypercloning: tiled)"
    )
    shares: Literal["even", "uneven"] = Field("even", description="of the copies of a coordinate in what reads them")
    cancelling_noise: NonNegativeFloat = Field(
        0.0, description="noise that cancels over the copies of a coordinate, in units of init_std"
    )
    noise: Fraction = Field(0.0, description="the paper's a in W <- (1 - a) W + a noise, on the layers' matrices")
    multipliers: bool = Field(
        False, description="learning rate, weight decay and epsilon per parameter such that the source run is followed"
    )

    @field_validator("operator")
    @classmethod
    def _operator(cls, value: str) -> str:
        parts = value.split("+")
        both, depth, width = set(BOTH_OPERATORS), set(DEPTH_OPERATORS), set(WIDTH_OPERATORS)
        known = [*BOTH_OPERATORS, *DEPTH_OPERATORS, *WIDTH_OPERATORS]
        for part in parts:
            if part not in known:
                close = difflib.get_close_matches(part, known, 1, 0.6)
                hint = f"; did you mean {close[0]}?" if close else "."
                raise ValueError(f"{part!r} is no operator{hint} Allowed: {', '.join(known)}, or DEPTH+WIDTH")
        if len(parts) > 2 or (len(parts) == 2 and (parts[0] not in both | depth or parts[1] not in both | width)):
            raise ValueError(
                f"is {value!r}; write DEPTH+WIDTH with DEPTH out of {', '.join([*DEPTH_OPERATORS, *BOTH_OPERATORS])} "
                f"and WIDTH out of {', '.join([*WIDTH_OPERATORS, *BOTH_OPERATORS])}"
            )
        return value

    @model_validator(mode="after")
    def _options(self) -> Self:
        problems = []
        if self.multipliers and self.state_policy != "carry":
            problems.append(("multipliers", f"needs optimizer_state carry, here it is {self.state_policy}"))
        if self.width_operator == "hypercloning" and self.order == "interleaved":
            problems.append(("order", "hypercloning tiles its copies; remove order, or use the operator split"))
        if self.width_operator == "sparkling" and self.state_policy != "asymmetric":
            text = f"sparkling has asymmetric moments, here it is {self.state_policy}; remove it, or use split"
            problems.append(("optimizer_state", text))
        copying = self.width_operator in COPYING_WIDTH_OPERATORS
        for key, given in (
            ("order", self.order is not None),
            ("shares", self.shares != "even"),
            ("cancelling_noise", self.cancelling_noise > 0),
        ):
            if given and not copying:
                text = f"is about copies along the width, and {self.operator} makes none; remove it, or use split"
                problems.append((key, text))
        refuse(problems)
        return self

    @property
    def depth_operator(self) -> str | None:
        """What becomes of the layers; None for an operator of the width alone."""
        name = self.operator.split("+")[0]
        return {"direct": "stack"}.get(name, None if name in WIDTH_OPERATORS else name)

    @property
    def width_operator(self) -> str | None:
        """What becomes of hidden size, heads, head channels and ffn; None for an operator of the depth alone."""
        name = self.operator.split("+")[-1]
        return {"direct": "split"}.get(name, None if name in DEPTH_OPERATORS else name)

    @property
    def state_policy(self) -> str:
        """``optimizer_state`` with its default filled in."""
        return self.optimizer_state or ("asymmetric" if self.width_operator == "sparkling" else "reset")

    @property
    def copy_order(self) -> str:
        """``order`` with its default filled in."""
        return self.order or ("tiled" if self.width_operator == "hypercloning" else "interleaved")
