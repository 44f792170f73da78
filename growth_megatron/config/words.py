"""Parts of sentences that several rooms print: what was probably meant, and how many more there are.

Owns: the one did-you-mean, lists cut short. Does not own: numbers and units (``config.units``), models and layouts in a
line (``config.lines``), messages on a configuration (``config.messages``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_CUTOFF = 0.65  # of difflib's ratio: one slip in a short word, two or three in a long one


def closest(word: str, allowed: Iterable[str], count: int = 1) -> list[str]:
    """Up to ``count`` of the ``allowed`` words that ``word`` may have been meant to be, the likeliest first."""
    by_plain = {name.lower().replace("-", "_"): name for name in allowed}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), by_plain, count, _CUTOFF)
    return [by_plain[name] for name in found]


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``; did you mean X?`` to follow what is wrong with ``word``; empty where nothing is near."""
    near = closest(word, allowed)
    return f"; did you mean {near[0]}?" if near else ""


def listed(items: Sequence[str], shown: int = 5, separator: str = "; ") -> str:
    """The first ``shown`` of ``items`` in one text, and how many more there are."""
    rest = f" (and {len(items) - shown} more)" if len(items) > shown else ""
    return separator.join(items[:shown]) + rest
