"""The operators of growth: one module each, found by the registry, and what a configuration makes of their names.

Owns: the registry; the meaning of ``growth.operator``; which options go with which operator.
Does not own: which geometries an operator can lead to (``growth.conditions``), what becomes of tensors
(``growth.plan``). No torch.

To add an operator, add a module with ``OPERATOR`` in it, and tests of its list or maps: the names, messages, help,
the table and drawings of docs/operators.md and the plan follow.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Literal

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.words import did_you_mean
from growth_megatron.errors import GrowthError
from growth_megatron.growth.layers import resolve_layers
from growth_megatron.growth.operators.base import Depth, Operator, Width

Problem = tuple[str, str]
"""A key of ``growth:`` and what is wrong with it."""

_NOT_OPERATORS = ("base",)


@cache
def registry() -> dict[str, Operator]:
    """All operators by name: those of depth and width first, then of the depth, then of the width."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_OPERATORS)
    found = [importlib.import_module(f"{__name__}.{name}").OPERATOR for name in names]
    found.sort(key=lambda operator: (None in (operator.depth, operator.width), operator.depth is None))
    return {operator.name: operator for operator in found}


@dataclass(frozen=True)
class Choice:
    """What a growth's options choose, with every default filled in."""

    growth: GrowthConfig
    depth: Depth | None
    width: Width | None

    @property
    def state_policy(self) -> Literal["reset", "carry", "asymmetric"]:
        """``optimizer_state``, or the operator's own."""
        return self.growth.optimizer_state or (self.width.optimizer_state if self.width else "reset")

    @property
    def is_learned(self) -> bool:
        """Whether the target's weights are what learned maps make of the source's."""
        return self.width is not None and self.width.is_learned

    def layers(self, source_layers: int, target_layers: int) -> tuple[int, ...]:
        """Source layer of each target layer, as given or the operator's own; empty where the source has no layers.

        Raises: GrowthError if there is none.
        """
        if self.depth is None:
            return tuple(range(source_layers))
        if source_layers == 0:
            return self._from_no_layers(target_layers)
        return resolve_layers(self.growth.layers, source_layers, target_layers, self.depth.layers)

    def _from_no_layers(self, target_layers: int) -> tuple[int, ...]:
        assert self.depth is not None
        if target_layers and self.depth.repeats != "initial":
            raise GrowthError(
                f"{self.depth.name} makes new layers out of old ones, and the source has none; use random or masked"
            )
        if self.growth.layers not in (None, ()):
            raise GrowthError(f"layers {self.growth.layers!r}: the source has none to name; leave the list out")
        return ()

    @property
    def copy_order(self) -> Literal["interleaved", "tiled"]:
        """``order``, or the operator's own."""
        return self.growth.order or (self.width.order if self.width else "interleaved")


def choose(growth: GrowthConfig) -> Choice:
    """The operators that ``growth`` names.

    Raises:
        GrowthError: an unknown name, or options that do not go together.
    """
    problems = option_problems(growth)
    if problems:
        raise GrowthError("; ".join(f"{key}: {text}" for key, text in problems))
    return _choice(growth)


def option_problems(growth: GrowthConfig) -> list[Problem]:
    """Everything that is wrong with a growth whatever the geometries are."""
    parts = growth.operator.split("+")
    known = registry()
    unknown = [part for part in parts if part not in known]
    if unknown:
        allowed = f"allowed: {', '.join(known)}, or DEPTH+WIDTH"
        return [
            ("operator", f"{part!r} is no operator{did_you_mean(part, known) or ';'} {allowed}") for part in unknown
        ]
    depths = [name for name, operator in known.items() if operator.depth]
    widths = [name for name, operator in known.items() if operator.width]
    if len(parts) > 2 or (len(parts) == 2 and (parts[0] not in depths or parts[1] not in widths)):
        text = f"is {growth.operator!r}; write DEPTH+WIDTH with DEPTH out of {', '.join(depths)} and WIDTH out of "
        return [("operator", text + ", ".join(widths))]
    return _combination_problems(_choice(growth))


def _choice(growth: GrowthConfig) -> Choice:
    parts = growth.operator.split("+")
    return Choice(growth, registry()[parts[0]].depth, registry()[parts[-1]].width)


def _combination_problems(choice: Choice) -> list[Problem]:
    growth, width = choice.growth, choice.width
    problems = []
    if growth.multipliers and choice.state_policy != "carry":
        problems.append(("multipliers", f"needs optimizer_state carry, here it is {choice.state_policy}"))
    if width and width.has_fixed_order and growth.order not in (None, width.order):
        problems.append(("order", f"{width.name} has {width.order} copies; remove order, or use the operator split"))
    if width and width.has_fixed_state and choice.state_policy != width.optimizer_state:
        text = f"{width.name} has {width.optimizer_state} moments, here it is {choice.state_policy}; remove it, or "
        problems.append(("optimizer_state", text + "use split"))
    if growth.ramp and not any(part and part.is_masked for part in (choice.depth, width)):
        text = f"is about masks, and {growth.operator} has none; remove it, or use masked"
        problems.append(("ramp", text))
    problems += _learning_problems(choice)
    if width is None or not width.copies:
        about_copies = {
            "order": growth.order is not None,
            "shares": growth.shares != "even",
            "cancelling_noise": growth.cancelling_noise > 0,
        }
        text = f"is about copies along the width, and {growth.operator} makes none; remove it, or use split"
        problems += [(key, text) for key, is_given in about_copies.items() if is_given]
    return problems


def _learning_problems(choice: Choice) -> list[Problem]:
    growth, parts = choice.growth, (choice.depth, choice.width)
    learned = [part.name for part in parts if part is not None and part.is_learned]
    if not learned:
        text = f"is about learned maps, and {growth.operator} has none; remove it, or use the operator learn"
        return [("learn", text)] if growth.learn else []
    if len(learned) < len(parts):
        return [("operator", f"{learned[0]} has maps for depth and width at once; write {learned[0]} alone")]
    if growth.noise:
        return [("noise", f"{learned[0]} starts from random mixtures as it is; remove it")]
    return []


def names_by_side() -> dict[str, list[str]]:
    """Names for a help text: of ``both``, ``depth`` and ``width``."""
    sides: dict[str, list[str]] = {"both": [], "depth": [], "width": []}
    for name, operator in registry().items():
        side = "both" if operator.depth and operator.width else "depth" if operator.depth else "width"
        sides[side].append(name)
    return sides


def markdown_table() -> str:
    """All operators as docs/operators.md shows them."""
    rows = ["| operator | depth: the new layers | width: the new coordinates | the function |", "|---|---|---|---|"]
    for name, operator in registry().items():
        parts = []
        for part, text in ((operator.depth, "new_layers"), (operator.width, "new_coordinates")):
            own = "" if part is None else f"as `{part.name}`" if part.name != name else getattr(part, text)
            parts.append(own)
        rows.append(f"| `{name}` | {parts[0]} | {parts[1]} | {operator.function} |")
    return "\n".join(rows)
