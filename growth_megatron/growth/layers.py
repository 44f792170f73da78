"""Layer lists: which source layer each layer of a deeper model is taken from.

Owns: the notations people write, the lists of the depth operators, the connection rate.
Does not own: tensors. A layer list is a plain tuple, target layer -> source layer, both counted from 0.

Two notations are read:

- the paper's (arXiv 2405.15319): each digit is a source layer counted from 1, ``-`` separates segments, ``S*k`` repeats
  segment S k times. ``12-3456*5-56`` is 1 2, five times 3 4 5 6, then 5 6. It cannot name a tenth layer.
- a list with commas, counted from 0, for any number of layers: ``0,1,0,1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from growth_megatron.errors import ConfigError

MAX_LAYERS = 4096
"""Longest list accepted; it only guards against a mistyped repeat count filling the memory."""

_NOTATIONS = (
    "allowed: the paper's notation, digits counted from 1, '-' between segments, '*k' to repeat a segment "
    "(1-234*7-56), or a list with commas counted from 0 (0,1,0,1)"
)


def parse_layers(notation: str, source_layers: int) -> tuple[int, ...]:
    """Source layer, from 0, of each target layer named by ``notation``.

    Raises:
        ConfigError: the notation is malformed or names a layer that the source does not have.
    """
    if "," in notation:
        return _parse_list(notation, source_layers)
    layers: list[int] = []
    column = 1
    for segment in notation.split("-"):
        layers += _parse_segment(notation, segment, column, source_layers)
        if len(layers) > MAX_LAYERS:
            raise _error(notation, column, f"more than {MAX_LAYERS} layers", "use a smaller repeat count")
        column += len(segment) + 1
    return tuple(layers)


def stack_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """G_stack: target layer j is source layer j mod ``source_layers``; the target need not be a multiple.

    Raises:
        ConfigError: fewer target than source layers.
    """
    _check_growing("stack", source_layers, target_layers)
    return tuple(target % source_layers for target in range(target_layers))


def interpolate_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """112233: the copies of a layer follow it (arXiv 2405.15319, interpolation; LLaMA-Pro's places for new blocks)."""
    _check_growing("interpolate", source_layers, target_layers)
    return tuple(target * source_layers // target_layers for target in range(target_layers))


def solar_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """SOLAR's depth up-scaling (arXiv 2312.15166): all but the last m layers, then all but the first m."""
    _check_growing("solar", source_layers, target_layers)
    if target_layers % 2 or target_layers > 2 * source_layers:
        largest = 2 * source_layers
        nearest = min(largest, target_layers + target_layers % 2)
        raise ConfigError(
            f"solar joins two stretches of the same length: num_layers {target_layers} is not an even number up to "
            f"{largest}, twice the source's {source_layers}; nearest possible: {nearest}"
        )
    kept = target_layers // 2
    return (*range(kept), *range(source_layers - kept, source_layers))


def midas_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """MIDAS (arXiv 2409.19044): the middle block, at most half of the layers, follows itself again and again."""
    _check_growing("midas", source_layers, target_layers)
    missing = target_layers - source_layers
    size = min(missing, max(1, source_layers // 2))
    if size == 0:
        return tuple(range(source_layers))
    start = (source_layers - size) // 2
    end = start + size
    middle = [*range(start, end)] * (missing // size)
    return (*range(end), *middle, *range(end - missing % size, end), *range(end, source_layers))


def gradual_layers(source_layers: int, target_layers: int) -> tuple[int, ...]:
    """Gradual stacking (Reddi et al. 2023): the last layers are put on top once more; at most doubled in one hop."""
    _check_growing("gradual", source_layers, target_layers)
    layers = list(range(source_layers))
    while (missing := target_layers - len(layers)) > 0:
        layers += layers[-missing:]
    return tuple(layers)


DEPTH_LISTS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "stack": stack_layers,
    "interpolate": interpolate_layers,
    "solar": solar_layers,
    "midas": midas_layers,
    "gradual": gradual_layers,
    "identity": interpolate_layers,
    "zero": stack_layers,
    "random": stack_layers,
}
"""Layer list of each depth operator; where new layers are not copies, a repeated entry says where they stand."""


def resolve_layers(
    layers: str | Sequence[int] | None, source_layers: int, target_layers: int, operator: str = "stack"
) -> tuple[int, ...]:
    """Layer list of a growth as configured: a notation, a list counted from 0, or None for the operator's own.

    Raises:
        ConfigError: malformed, out of range, or not ``target_layers`` long.
    """
    if layers is None:
        return DEPTH_LISTS[operator](source_layers, target_layers)
    if isinstance(layers, str):
        resolved = parse_layers(layers, source_layers)
    else:
        resolved = tuple(layers)
        for position, layer in enumerate(resolved):
            if not 0 <= layer < source_layers:
                raise ConfigError(
                    f"layers {list(resolved)}: entry {position} is {layer}; allowed: 0 to {source_layers - 1}, "
                    f"the source has {source_layers} layers counted from 0"
                )
    if len(resolved) != target_layers:
        raise ConfigError(
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


def _check_growing(operator: str, source_layers: int, target_layers: int) -> None:
    if source_layers < 1 or target_layers < source_layers:
        raise ConfigError(
            f"cannot {operator} {source_layers} layers to {target_layers}; "
            f"the target needs at least as many layers as the source, and both at least 1"
        )
    if target_layers > MAX_LAYERS:
        raise ConfigError(f"cannot {operator} to {target_layers} layers; at most {MAX_LAYERS} are possible")


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
    layers = []
    column = 1
    for entry in notation.split(","):
        text = entry.strip()
        where = column + len(entry) - len(entry.lstrip())
        if not (text.isascii() and text.isdigit()):
            raise _error(notation, where, f"{text!r} is not a layer number", _NOTATIONS)
        if len(text) > 9 or int(text) >= source_layers:
            allowed = f"allowed: 0 to {source_layers - 1}, the source has {source_layers} layers counted from 0"
            raise _error(notation, where, f"there is no layer {text}", allowed)
        layers.append(int(text))
        column += len(entry) + 1
    if len(layers) > MAX_LAYERS:
        raise _error(notation, 1, f"more than {MAX_LAYERS} layers", "use a shorter list")
    return tuple(layers)


def _error(notation: str, column: int, wrong: str, remedy: str) -> ConfigError:
    return ConfigError(f"layers {notation!r}, column {column}: {wrong}; {remedy}")
