"""LIDAS (arXiv 2512.08819): one new block in the exact middle, made of the layers around it.

The model is seen as blocks as long as the new one. With an even number of them the new block comes between the two
middle ones and takes the last half of the one before and the first half of the one behind; with an odd number the
middle block is doubled, as in MIDAS.
"""

from __future__ import annotations

from growth_megatron.errors import GrowthError
from growth_megatron.growth.operators.base import Depth, Operator, check_growing


def middle_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """One hop at most doubles the layers."""
    check_growing("middle", source_layers, target_layers)
    size = target_layers - source_layers
    if size > source_layers:
        raise GrowthError(
            f"middle adds one block of at most the source's {source_layers} layers: num_layers {target_layers} is more "
            f"than {2 * source_layers}; grow in several stages"
        )
    if size == 0:
        return tuple(range(source_layers))
    start = (source_layers - size) // 2
    has_middle_block = source_layers // size % 2 == 1
    place = start + size if has_middle_block else source_layers // 2
    return (*range(place), *range(start, start + size), *range(place, source_layers))


OPERATOR = Operator(
    "middle",
    depth=Depth("middle", "one block in the middle, of the layers around it (LIDAS, arXiv 2512.08819)", middle_layers),
)
