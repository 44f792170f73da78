"""SOLAR's depth up-scaling (arXiv 2312.15166): two stretches of the source's layers, overlapping in the middle."""

from __future__ import annotations

from growth_megatron.errors import GrowthError
from growth_megatron.growth.operators.base import Depth, Operator, check_growing


def solar_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """All but the last m layers, then all but the first m."""
    check_growing("solar", source_layers, target_layers)
    if target_layers % 2 or target_layers > 2 * source_layers:
        largest = 2 * source_layers
        nearest = min(largest, target_layers + target_layers % 2)
        raise GrowthError(
            f"solar joins two stretches of the same length: num_layers {target_layers} is not an even number up to "
            f"{largest}, twice the source's {source_layers}; nearest possible: {nearest}"
        )
    kept = target_layers // 2
    return (*range(kept), *range(source_layers - kept, source_layers))


OPERATOR = Operator(
    "solar",
    depth=Depth("solar", "all but the last m layers, then all but the first m (arXiv 2312.15166)", solar_layers),
)
