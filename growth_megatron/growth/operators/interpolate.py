"""Interpolation (arXiv 2405.15319): copies follow their layer, 112233."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, check_growing


def interpolate_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """Each source layer, then its copies, spread as evenly as the sizes allow."""
    check_growing("interpolate", source_layers, target_layers)
    return tuple(target * source_layers // target_layers for target in range(target_layers))


OPERATOR = Operator("interpolate", depth=Depth("interpolate", "copies follow their layer (112233)", interpolate_layers))
