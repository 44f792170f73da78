"""Identity blocks (LLaMA-Pro, arXiv 2401.02415): each new layer stands behind the one it copies, with zero outputs.

A block whose output projections are zero passes the residual stream on unchanged. Its gains stay: with them zero the
block could never learn.
"""

from __future__ import annotations

from growth_megatron.growth.operators.base import Depth, Operator
from growth_megatron.growth.operators.interpolate import interpolate_layers

OPERATOR = Operator(
    "identity",
    depth=Depth(
        "identity",
        "after their layer, copies with o = down = 0 (LLaMA-Pro, arXiv 2401.02415)",
        interpolate_layers,
        repeats="zero_output",
    ),
)
