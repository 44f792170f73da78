"""Global tensors and where they come from: the protocol that all rooms above speak.

Owns: ``TensorSource``, specifications and regions of tensors, megatron-core's prefixes of optimizer state, and the
source that adds the optimizer state of a first step.
Does not own: which tensors a model has (``model.architecture``), any file (``checkpoint``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from growth_megatron.errors import CheckpointError

MASTER_PREFIX = "optimizer.state.param."
FIRST_MOMENT_PREFIX = "optimizer.state.exp_avg."
SECOND_MOMENT_PREFIX = "optimizer.state.exp_avg_sq."
STATE_PREFIXES = ("", MASTER_PREFIX, FIRST_MOMENT_PREFIX, SECOND_MOMENT_PREFIX)
MOMENT_PREFIXES = (FIRST_MOMENT_PREFIX, SECOND_MOMENT_PREFIX)
"""Names of megatron-core: a weight's float32 master and Adam moments are stored under its own key with these."""

Region = tuple[slice, ...]
"""One slice with explicit bounds and step 1 per axis."""


@dataclass(frozen=True)
class TensorSpec:
    """Global shape and element type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """Names global tensors and reads any region of one, lazily."""

    def keys(self) -> list[str]:
        """Names of all tensors."""
        ...

    def spec(self, key: str) -> TensorSpec:
        """Global shape and stored type of one."""
        ...

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of ``region`` of a tensor, of that shape, in its stored type, on the CPU."""
        ...


def split_state_key(key: str) -> tuple[str, str]:
    """Prefix (one of ``STATE_PREFIXES``) and model key of a stored tensor's name."""
    for prefix in STATE_PREFIXES[1:]:
        if key.startswith(prefix):
            return prefix, key.removeprefix(prefix)
    return "", key


def whole(shape: tuple[int, ...]) -> Region:
    """The region that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


@runtime_checkable
class StateSource(Protocol):
    """A source that computes a weight and its optimizer state from values that they share."""

    def read_state(self, name: str, region: Region, prefixes: Sequence[str]) -> Iterator[torch.Tensor]:
        """As ``read_state`` below: tensors of the region's shape."""
        ...


def read_state(source: TensorSource, name: str, region: Region, prefixes: Sequence[str]) -> Iterator[torch.Tensor]:
    """``region`` of the tensors ``PREFIX + name`` of a source, one after the other, in the order of ``prefixes``.

    Each is of the region's shape. What a weight and its master are both computed from is computed once; each tensor can
    go before the next is read.
    """
    if isinstance(source, StateSource):
        yield from source.read_state(name, region, prefixes)
    else:
        yield from (source.read(prefix + name, region) for prefix in prefixes)


class WithFreshOptimizer:
    """A source of weights that also has the optimizer state of a first step.

    Masters are the weights in float32. Both moments are zeros, constants that cost nothing in memory or on the disk.
    """

    def __init__(self, weights: TensorSource) -> None:
        """Raises CheckpointError if the source has optimizer state already."""
        self._weights = weights
        for key in weights.keys():
            if split_state_key(key)[0]:
                raise CheckpointError(f"the source has optimizer state already ({key}); take its weights alone")

    def keys(self) -> list[str]:
        """Those of the weights, under every prefix."""
        return [prefix + key for prefix in STATE_PREFIXES for key in self._weights.keys()]

    def spec(self, key: str) -> TensorSpec:
        """The weight's, float32 for its state."""
        prefix, name = split_state_key(key)
        spec = self._weights.spec(name)
        return TensorSpec(spec.shape, torch.float32) if prefix else spec

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of ``region``, of its shape."""
        prefix, name = split_state_key(key)
        (values,) = self.read_state(name, region, (prefix,))
        return values

    def read_state(self, name: str, region: Region, prefixes: Sequence[str]) -> Iterator[torch.Tensor]:
        """Tensors of the region's shape; the weights are read once for themselves and their master."""
        weights: torch.Tensor | None = None
        for prefix in prefixes:
            if prefix in MOMENT_PREFIXES:
                check_region(prefix + name, self.spec(name).shape, region)
                yield constant(torch.zeros(()), region_shape(region))
                continue
            if weights is None:
                weights = self._weights.read(name, region)
            yield weights.to(torch.float32, copy=True) if prefix else weights


def region_shape(region: Region) -> list[int]:
    """Shape of the values of a region."""
    return [part.stop - part.start for part in region]


def constant(element: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of ``shape`` in which one element in memory, of shape (), stands for all: its strides are 0.

    Moments that are zero are kept like that everywhere, also in files, where torch.save writes the one element.
    """
    return element.expand(*shape)


def is_constant(values: torch.Tensor) -> bool:
    """Whether one element in memory stands for all, whatever the shape."""
    return values.numel() > 1 and not any(s for n, s in zip(values.shape, values.stride(), strict=True) if n > 1)


def check_region(key: str, shape: tuple[int, ...], region: Region) -> None:
    """Raises CheckpointError unless ``region`` lies within ``shape``, with explicit bounds and step 1."""
    fits = len(region) == len(shape) and all(
        part.step in (None, 1)
        and part.start is not None
        and part.stop is not None
        and 0 <= part.start <= part.stop <= size
        for part, size in zip(region, shape, strict=False)
    )
    if not fits:
        raise CheckpointError(f"{key} has shape {shape}; the region {region} is not within it")


def row_blocks(shape: tuple[int, ...], elements: int) -> Iterator[Region]:
    """A tensor of ``shape`` cut into regions of whole rows, each of at most ``elements`` or one row."""
    if not shape:
        yield ()
        return
    rows = max(1, elements // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *whole(shape[1:]))
