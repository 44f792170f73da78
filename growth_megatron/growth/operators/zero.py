"""The paper's zero operator (arXiv 2405.15319): new parts that do nothing yet, so that the function is kept."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator, Width
from growth_megatron.growth.operators.stack import stack_layers

OPERATOR = Operator(
    "zero",
    depth=Depth("zero", "on top, copies with o = down = 0", stack_layers, repeats="zero_output"),
    width=Width(
        "zero",
        "zero where they write, new weights where they read; gains by sqrt(d/D)",
        copies=False,
    ),
)
