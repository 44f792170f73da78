"""G_split, widthwise direct growth (arXiv 2405.15319): copies side by side, what reads them shares the weight."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Operator, Width

SPLIT = Width("split", "copies side by side (0 0 1 1), what reads them shares the weight; any ratio")
OPERATOR = Operator("split", width=SPLIT)
