"""What an operator of growth declares.

Owns: the declarations and the check that most layer lists share. Plain values, no torch.
Does not own: the operators (one module of this package each), the registry (``growth.operators``), the maps that follow
from a declaration (``growth.plan``, ``growth.width``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from growth_megatron.errors import GrowthError
from growth_megatron.growth.layers import MAX_LAYERS, LayerList
from growth_megatron.growth.rules import RANDOM, ZERO


@dataclass(frozen=True)
class Depth:
    """What becomes of the layers.

    ``repeats`` says what a layer named again in the list becomes: a ``copy``; a copy with ``zero_output``, which
    passes the residual stream on unchanged; or a layer of ``initial`` values.
    """

    name: str
    new_layers: str  # in words, for tables
    layers: LayerList
    repeats: Literal["copy", "zero_output", "initial"] = "copy"
    is_masked: bool = False  # new layers act through masks (``growth.masks``)
    is_learned: bool = False  # all layers are mixed by learned maps (``growth.learned``), with this list to begin with

    @property
    def keeps_function(self) -> bool:
        """Whether a deeper model with all source layers in order is the same function."""
        return self.repeats == "zero_output" or self.is_masked

    @property
    def adds_layers(self) -> bool:
        """Whether a layer named again stands for a new one, so that every source layer must be named."""
        return self.repeats != "copy"


@dataclass(frozen=True)
class Width:
    """What becomes of hidden size, heads, head channels and ffn.

    New coordinates are copies of old ones, or added. ``closing`` is what stands in the last factor of each path
    through an added coordinate: ``ZERO`` keeps the function, ``RANDOM`` does not.
    """

    name: str
    new_coordinates: str  # in words, for tables
    copies: bool = True
    closing: int = ZERO
    order: Literal["interleaved", "tiled"] = "interleaved"
    has_fixed_order: bool = False
    whole_multiples: bool = False
    optimizer_state: Literal["reset", "carry", "asymmetric"] = "reset"
    has_fixed_state: bool = False
    is_masked: bool = False  # new coordinates act through masks (``growth.masks``)
    is_learned: bool = False  # all coordinates are mixed by learned maps (``growth.learned``)

    @property
    def keeps_function(self) -> bool:
        """Whether the wider model is the same function."""
        return self.copies or self.closing != RANDOM or self.is_masked

    @property
    def closes_with_zeros(self) -> bool:
        """Whether coordinates are added that do nothing yet."""
        return not self.copies and self.closing == ZERO


@dataclass(frozen=True)
class Operator:
    """A name that ``growth.operator`` takes, by itself or on one side of DEPTH+WIDTH."""

    name: str
    depth: Depth | None = None
    width: Width | None = None

    @property
    def function(self) -> str:
        """What becomes of the function, in words."""
        parts = {side: part.keeps_function for side, part in (("depth", self.depth), ("width", self.width)) if part}
        if all(parts.values()):
            return "kept"
        kept = [side for side, is_kept in parts.items() if is_kept]
        return f"kept in {kept[0]}" if kept else "changed"


def check_growing(operator: str, source_layers: int, target_layers: int) -> None:
    """Raises GrowthError unless there are at least as many target as source layers, and not absurdly many."""
    if source_layers < 1 or target_layers < source_layers:
        raise GrowthError(
            f"cannot {operator} {source_layers} layers to {target_layers}; "
            f"the target needs at least as many layers as the source, and both at least 1"
        )
    if target_layers > MAX_LAYERS:
        raise GrowthError(f"cannot {operator} to {target_layers} layers; at most {MAX_LAYERS} are possible")
