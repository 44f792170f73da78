"""MIDAS (arXiv 2409.19044): the middle block follows itself, again and again if the target asks for it."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, check_growing


def midas_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """The middle block, at most half of the layers, as often as the target needs, the last time maybe in part."""
    check_growing("midas", source_layers, target_layers)
    missing = target_layers - source_layers
    size = min(missing, max(1, source_layers // 2))
    if size == 0:
        return tuple(range(source_layers))
    start = (source_layers - size) // 2
    end = start + size
    middle = [*range(start, end)] * (missing // size)
    return (*range(end), *middle, *range(end - missing % size, end), *range(end, source_layers))


OPERATOR = Operator("midas", depth=Depth("midas", "the middle block again (arXiv 2409.19044)", midas_layers))
