"""Layer lists: which source layer each layer of a deeper model is taken from.

Owns: the notations people write, the connection rate.
Does not own: the lists of the operators (``growth.operators``), tensors. A layer list is a plain tuple, target layer ->
source layer, both counted from 0.

Two notations are read:

- the paper's (arXiv 2405.15319): each digit is a source layer counted from 1, ``-`` separates segments, ``S*k`` repeats
  segment S k times. ``12-3456*5-56`` is 1 2, five times 3 4 5 6, then 5 6. It cannot name a tenth layer.
- a list with commas, counted from 0, for any number of layers, with ranges and repeats: ``0,1,0,1``, ``0-23,6-29``,
  ``0-3 x6``. ``config.lines.compact_layers`` writes such a list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from growth_megatron.errors import GrowthError

MAX_LAYERS = 4096
"""Longest list accepted; it only guards against a mistyped repeat count filling the memory."""

LayerList = Callable[[int, int], tuple[int, ...]]
"""(source layers, target layers) -> source layer, from 0, of each target layer. Raises GrowthError."""

_FROM_ZERO = re.compile(r"\s*0\s*(-\s*[0-9]+\s*)?")
"""A list of one entry: no layer of the paper's notation is 0."""
_ENTRY = re.compile(r"([0-9]{1,9})(?:\s*-\s*([0-9]{1,9}))?(?:\s*[x*]\s*([0-9]{1,9}))?")

_NOTATIONS = (
    "allowed: the paper's notation, digits counted from 1, '-' between segments, '*k' to repeat a segment "
    "(1-234*7-56), or a list with commas counted from 0, with ranges and repeats (0,1,0,1 or 0-23,6-29 or 0-3 x6)"
)


def parse_layers(notation: str, source_layers: int) -> tuple[int, ...]:
    """Source layer, from 0, of each target layer named by ``notation``.

    Raises:
        GrowthError: the notation is malformed or names a layer that the source does not have.
    """
    if "," in notation or "x" in notation or _FROM_ZERO.fullmatch(notation):
        return _parse_list(notation, source_layers)
    layers: list[int] = []
    column = 1
    for segment in notation.split("-"):
        layers += _parse_segment(notation, segment, column, source_layers)
        if len(layers) > MAX_LAYERS:
            raise _error(notation, column, f"more than {MAX_LAYERS} layers", "use a smaller repeat count")
        column += len(segment) + 1
    return tuple(layers)


def resolve_layers(
    layers: str | Sequence[int] | None, source_layers: int, target_layers: int, own: LayerList
) -> tuple[int, ...]:
    """Layer list of a growth as configured: a notation, a list counted from 0, or None for ``own``, the operator's.

    Raises:
        GrowthError: malformed, out of range, or not ``target_layers`` long.
    """
    if layers is None:
        return own(source_layers, target_layers)
    if isinstance(layers, str):
        resolved = parse_layers(layers, source_layers)
    else:
        resolved = tuple(layers)
        for position, layer in enumerate(resolved):
            if not 0 <= layer < source_layers:
                raise GrowthError(
                    f"layers {list(resolved)}: entry {position} is {layer}; allowed: 0 to {source_layers - 1}, "
                    f"the source has {source_layers} layers counted from 0"
                )
    if len(resolved) != target_layers:
        raise GrowthError(
            f"layers {layers!r} gives {len(resolved)} layers but the target model has {target_layers}; "
            f"change the list, or set num_layers to {len(resolved)}"
        )
    return resolved


def connection_rate(layers: Sequence[int]) -> float:
    """Share of consecutive target layers that were consecutive in the source, 0 to 1; 1 for a single layer."""
    pairs = list(pairwise(layers))
    if not pairs:
        return 1.0
    return sum(after == before + 1 for before, after in pairs) / len(pairs)


def _parse_segment(notation: str, segment: str, column: int, source_layers: int) -> list[int]:
    digits, star, count = segment.partition("*")
    if not digits:
        raise _error(notation, column, "a segment without layers", "write at least one digit before '*' and '-'")
    layers = []
    for offset, character in enumerate(digits):
        if character not in "123456789":
            hint = "counted from 1, or use commas to count from 0" if character == "0" else _NOTATIONS
            raise _error(notation, column + offset, f"{character!r} is not a layer digit 1 to 9", hint)
        if int(character) > source_layers:
            allowed = f"allowed: 1 to {min(source_layers, 9)}, the source has {source_layers} layers"
            raise _error(notation, column + offset, f"there is no layer {character}", allowed)
        layers.append(int(character) - 1)
    if not star:
        return layers
    where = column + len(digits) + 1
    if not (count.isascii() and count.isdigit()) or int(count[:9]) < 1:
        raise _error(notation, where, f"{count!r} is not a repeat count", "write a whole number from 1 after '*'")
    if len(count) > 9 or int(count) * len(layers) > MAX_LAYERS:
        raise _error(notation, where, f"more than {MAX_LAYERS} layers", "use a smaller repeat count")
    return layers * int(count)


def _parse_list(notation: str, source_layers: int) -> tuple[int, ...]:
    layers: list[int] = []
    column = 1
    for entry in notation.split(","):
        text = entry.strip()
        where = column + len(entry) - len(entry.lstrip())
        match = _ENTRY.fullmatch(text)
        if match is None:
            raise _error(notation, where, f"{text!r} is not a layer number or a range", _NOTATIONS)
        first, last, times = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if max(first, last) >= source_layers:
            allowed = f"allowed: 0 to {source_layers - 1}, the source has {source_layers} layers counted from 0"
            raise _error(notation, where, f"there is no layer {max(first, last)}", allowed)
        if last < first or times < 1:
            raise _error(notation, where, f"{text!r} holds no layer", "write the smaller number first, and x1 or more")
        if len(layers) + (last - first + 1) * times > MAX_LAYERS:
            raise _error(notation, where, f"more than {MAX_LAYERS} layers", "use a shorter list")
        layers += [*range(first, last + 1)] * times
        column += len(entry) + 1
    return tuple(layers)


def _error(notation: str, column: int, wrong: str, remedy: str) -> GrowthError:
    return GrowthError(f"layers {notation!r}, column {column}: {wrong}; {remedy}")
