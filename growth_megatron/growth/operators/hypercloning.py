"""HyperCloning (arXiv 2409.12903): the whole model tiled, in whole multiples."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Operator, Width

OPERATOR = Operator(
    "hypercloning",
    width=Width(
        "hypercloning",
        "copies tiled (0 1 0 1), whole multiples (arXiv 2409.12903)",
        order="tiled",
        has_fixed_order=True,
        whole_multiples=True,
    ),
)
