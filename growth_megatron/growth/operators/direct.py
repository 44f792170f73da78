"""The paper's direct operator (arXiv 2405.15319): G_stack in depth, G_split in width."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Operator
from growth_megatron.growth.operators.split import SPLIT
from growth_megatron.growth.operators.stack import STACK

OPERATOR = Operator("direct", depth=STACK, width=SPLIT)
