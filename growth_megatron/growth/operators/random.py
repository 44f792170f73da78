"""The paper's random operator (arXiv 2405.15319), without masks (``masked`` has them): new parameters act at once."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, Width
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.rules import RANDOM

OPERATOR = Operator(
    "random",
    depth=Depth("random", "on top, initialised anew", stack_layers, repeats="initial"),
    width=Width("random", "initialised anew", copies=False, closing=RANDOM),
)
