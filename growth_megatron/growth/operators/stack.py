"""G_stack, depthwise direct growth (arXiv 2405.15319): target layer j is source layer j mod l, 123123."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, check_growing


def stack_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """Source layers again from the first one; the target need not be a multiple."""
    check_growing("stack", source_layers, target_layers)
    return tuple(target % source_layers for target in range(target_layers))


STACK = Depth("stack", "G_stack: layer j is layer j mod l (123123)", stack_layers)
OPERATOR = Operator("stack", depth=STACK)
