"""Sentences that several rooms say: what was probably meant.

Owns: the one did-you-mean. Does not own: numbers and units (``config.units``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that ``word`` was probably meant to be, if one is near enough."""
    close = difflib.get_close_matches(word.lower().replace("-", "_"), list(allowed), 1, 0.6)
    return close[0] if close else None


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``; did you mean X?`` to go behind what is wrong; nothing where no allowed word is near."""
    found = closest(word, allowed)
    return f"; did you mean {found}?" if found else ""
