"""SPARKLING (arXiv 2602.02472): copies whose moments are kept for the first of them and zero for the others."""

from __future__ import annotations

from growth_megatron.growth.operators.base import Operator, Width

OPERATOR = Operator(
    "sparkling",
    width=Width(
        "sparkling",
        "as `split`, moments `asymmetric` (arXiv 2602.02472)",
        optimizer_state="asymmetric",
        has_fixed_state=True,
    ),
)
