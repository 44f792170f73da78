"""Learned growth, LiGO (arXiv 2303.00980), the paper's G_learn: small maps from the source's weights to the target's
are trained for some steps on the data that come next, then carried out.

At first the layers are those of ``stack``, and new coordinates are random mixtures of all old ones.
"""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, Width
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.rules import RANDOM

OPERATOR = Operator(
    "learn",
    depth=Depth("learn", "every layer a learned mixture of all, from `stack` on", stack_layers, is_learned=True),
    width=Width(
        "learn",
        "every coordinate a learned mixture of all, from the old ones and random mixtures on",
        copies=False,
        closing=RANDOM,
        has_fixed_state=True,
        is_learned=True,
    ),
)
