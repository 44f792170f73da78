"""Gradual stacking (Reddi et al. 2023): the last layers are put on top once more."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, check_growing


def gradual_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """At most doubled in one hop; further layers repeat what is then on top."""
    check_growing("gradual", source_layers, target_layers)
    layers = list(range(source_layers))
    while (missing := target_layers - len(layers)) > 0:
        layers += layers[-missing:]
    return tuple(layers)


OPERATOR = Operator("gradual", depth=Depth("gradual", "the last layers again, at most doubled a hop", gradual_layers))
