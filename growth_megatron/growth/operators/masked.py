"""Masked structural growth, the paper's G_random (arXiv 2405.15319): as ``random``, behind masks that open over steps.

At first the model is the source, at the end an ordinary one; in between the masks are folded into the weights that it
computes with (``growth.masks``). Optimizer state is carried: function and gradients stay what they were.
"""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, Width
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.rules import RANDOM

OPERATOR = Operator(
    "masked",
    depth=Depth(
        "masked",
        "as `random`, behind masks that open over steps",
        stack_layers,
        repeats="initial",
        is_masked=True,
    ),
    width=Width(
        "masked",
        "as `random`, behind masks that open over steps; moments `carry`",
        copies=False,
        closing=RANDOM,
        optimizer_state="carry",
        is_masked=True,
    ),
)
