"""When to grow, and by how much: the fitted guideline of "Stacking Your Transformers" (arXiv 2405.15319, section 4.2).

Owns: the formula, the range it was fitted in, what is said outside of it. Does not own: how it is asked for
(``commands.guideline``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GROWTH_FACTOR = 4
"""The paper's recommendation; 2 to 4 are about equally good there, and its own formula for the factor is not usable."""
FITTED_PARAMETERS = (0.37e9, 3e9)
"""The smallest, called 410M, has 374M parameters in all."""
FITTED_FLOPS = (0.8e20, 1.5e21)
_FAR = 3.0  # times below what was fitted
LARGEST_SHARE = 0.25
"""Of the target's tokens, for the base: beyond the fitted range the formula asks for more than there are."""


@dataclass(frozen=True)
class Guideline:
    """What the paper's fit says of a target model of ``parameters``, to be trained on ``tokens``."""

    parameters: float
    tokens: float
    flops: float
    """6 N D of the target."""
    fitted_growth_tokens: float
    growth_tokens: float
    """Tokens of the base before it grows, at most ``LARGEST_SHARE`` of all."""
    growth_factor: int
    warnings: tuple[str, ...]

    @property
    def is_covered(self) -> bool:
        """Whether it is any advice: far below what it was fitted to, the formula rises without bound."""
        return min(self.parameters / FITTED_PARAMETERS[0], self.flops / FITTED_FLOPS[0]) >= 1 / _FAR


def guideline(parameters: float, tokens: float) -> Guideline:
    """log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, with C = 6 N D.

    Args:
        parameters: N, of the target.
        tokens: D, that the target is to be trained on.

    Raises: ValueError if one is not positive and finite.
    """
    if not (1 <= parameters < math.inf and 1 <= tokens < math.inf and 6 * parameters * tokens < math.inf):
        raise ValueError(f"parameters are {parameters:g} and tokens {tokens:g}; both must be finite and at least 1")
    flops = 6 * parameters * tokens
    fitted = 10 ** (0.88 * math.log10(parameters) + 163.27 / math.log10(flops) - 5.74)
    warnings = []
    for name, value, (low, high) in (
        ("parameters", parameters, FITTED_PARAMETERS),
        ("FLOPs", flops, FITTED_FLOPS),
    ):
        if not low <= value <= high:
            warnings.append(f"{value:.3g} {name} are outside of what was fitted, {low:.3g} to {high:.3g}: extrapolated")
    if fitted > LARGEST_SHARE * tokens:
        warnings.append(f"the fit asks for {fitted:.3g} tokens, more than {LARGEST_SHARE:.0%} of all: cut to that")
    return Guideline(
        parameters, tokens, flops, fitted, min(fitted, LARGEST_SHARE * tokens), GROWTH_FACTOR, tuple(warnings)
    )
