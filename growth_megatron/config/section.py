"""What all sections of a configuration share: their base class, number types, how several problems become one error.

Owns: no option. Does not own: the sections (``config.schema`` and the schemas beside it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _number(value: Any) -> Any:
    """Pydantic counts true as 1; in a configuration that is a mistake."""
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "must be a number, not true or false")
    return value


PositiveInt = Annotated[int, Field(ge=1), BeforeValidator(_number)]
NonNegativeInt = Annotated[int, Field(ge=0), BeforeValidator(_number)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number)]


class GrowthRules(Protocol):
    """What the room of growth, which stands above this one, knows of a configuration; validation's context."""

    def option_problems(self, growth: Any) -> list[tuple[str, str]]:
        """(key of ``growth:``, what is wrong) of the options of a ``GrowthConfig`` alone."""
        ...

    def chain_problems(self, stages: Sequence[Any]) -> list[tuple[str, str]]:
        """(key below ``stages``, what is wrong) of each ``StageConfig`` that cannot come out of the one before it."""
        ...


def whole_number(value: Any) -> int:
    """A positive whole number as pydantic would read it, 0 where ``value`` is none; for use before validation."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def refuse(problems: Sequence[tuple[str, str]]) -> None:
    """Raise one validation error for all ``(dotted key, what is wrong)``, if there are any."""
    if problems:
        text = "; ".join(f"{key}: {wrong}" for key, wrong in problems)
        raise PydanticCustomError("combination", "{text}", {"text": text, "problems": list(problems)})


def divisors(*values: int) -> str:
    """Common divisors of ``values``, as a message lists them."""
    common = math.gcd(*values)
    return ", ".join(str(d) for d in range(1, min(common, 64) + 1) if common % d == 0)


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
