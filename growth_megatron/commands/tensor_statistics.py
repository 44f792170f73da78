"""One tensor of a checkpoint in figures: where it lies and how its values are spread.

Owns: what ``inspect --tensor`` says, and the search for the tensor that was meant.
Does not own: the checkpoint as a whole (``commands.inspect``), reading (``checkpoint.torch_dist.reader``).

Memory: some tens of megabytes; a tensor is read in blocks of rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.tables import columns
from growth_megatron.config.units import format_bytes
from growth_megatron.config.words import closest
from growth_megatron.errors import CheckpointError
from growth_megatron.model.architecture import LAYER_PREFIX
from growth_megatron.model.tensors import Region, TensorSource, row_blocks

_FIRST_VALUES = 8
_BLOCK_ELEMENTS = 1 << 20
_LAYER = re.compile(rf"{re.escape(LAYER_PREFIX)}(\d+|\*)\.")


def tensor_statistics(source: TensorSource, key: str) -> dict[str, Any]:
    """Shape, type, storage and statistics of one tensor, as JSON-able data.

    ``min``, ``max``, ``mean``, ``std`` (of the population) and ``rms`` are over the finite values, null if there are
    none; ``zeros`` is a share of all elements. ``first_values`` are those of the first row.

    Raises:
        CheckpointError: no such tensor (the message names what is near), or its data are damaged.
    """
    if key not in source.keys():
        raise CheckpointError(f"there is no tensor {key}{_meant(key, source.keys())}")
    spec = source.spec(key)
    chunks = _stored_chunks(source, key) if isinstance(source, DistCheckpoint) else []
    spread = _Spread()
    for region in row_blocks(spec.shape, _BLOCK_ELEMENTS):
        spread.add(source.read(key, region))
    start = tuple(slice(0, min(size, 1)) for size in spec.shape[:-1])
    start += tuple(slice(0, min(size, _FIRST_VALUES)) for size in spec.shape[-1:])
    first = source.read(key, start).flatten().tolist()
    return {
        "key": key,
        "shape": list(spec.shape),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "elements": spread.elements,
        "bytes": spread.elements * spec.dtype.itemsize,
        "chunks": [chunk.as_dict() for chunk in chunks],
        **spread.as_dict(),
        "first_values": [value if math.isfinite(value) else str(value) for value in first],
    }


def render_tensor(description: dict[str, Any]) -> str:
    """``tensor_statistics``' answer as text."""
    d = description
    shape = " x ".join(map(str, d["shape"])) or "scalar"
    rows = [
        ("tensor", d["key"]),
        ("shape", f"{shape}, {d['dtype']}: {d['elements']:,} elements, {format_bytes(d['bytes'])}"),
    ]
    files: dict[str, Counter[str]] = {}
    for chunk in d["chunks"]:
        files.setdefault(chunk["file"], Counter())[" x ".join(map(str, chunk["sizes"])) or "scalar"] += 1
    for number, (name, sizes) in enumerate(files.items()):
        text = ", ".join(f"{count} of {size}" for size, count in sizes.items())
        rows.append(("chunks" if number == 0 else "", f"{text} in {name}"))
    for name in ("min", "max", "mean", "std", "rms"):
        rows.append((name, "none: no finite value" if d[name] is None else f"{d[name]:.6g}"))
    rows += [
        ("zeros", f"{100 * d['zeros']:.4g} %"),
        ("non-finite", f"{d['non_finite']:,}" if d["non_finite"] else "none"),
        ("first values", " ".join(v if isinstance(v, str) else f"{v:.6g}" for v in d["first_values"])),
    ]
    return "\n".join(columns(rows))


@dataclass(frozen=True)
class _Chunk:
    """One stored piece of a tensor: its place in the tensor, and in which file its bytes lie."""

    region: Region
    file: str
    offset: int
    length: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "offsets": [part.start for part in self.region],
            "sizes": [part.stop - part.start for part in self.region],
            "file": self.file,
            "file_offset": self.offset,
            "file_bytes": self.length,
        }


class _Spread:
    """Running statistics in float64; deviations are merged block by block, so a large mean costs no digits."""

    def __init__(self) -> None:
        self.elements = self._finite = self._zeros = 0
        self._min, self._max = math.inf, -math.inf
        self._mean = self._deviation = 0.0  # mean, and sum of squared differences from it

    def add(self, values: torch.Tensor) -> None:
        self.elements += values.numel()
        self._zeros += int((values == 0).sum())
        wide = values.double()
        wide = wide[wide.isfinite()]
        count = wide.numel()
        if not count:
            return
        self._min, self._max = min(self._min, float(wide.min())), max(self._max, float(wide.max()))
        mean = float(wide.mean())
        step, total = mean - self._mean, self._finite + count
        self._deviation += float((wide - mean).square().sum()) + step * step * self._finite * count / total
        self._mean += step * count / total
        self._finite = total

    def as_dict(self) -> dict[str, Any]:
        variance = self._deviation / max(self._finite, 1)
        figures = {
            "min": self._min,
            "max": self._max,
            "mean": self._mean,
            "std": math.sqrt(variance),
            "rms": math.sqrt(variance + self._mean**2),
        }
        return {
            **{name: value if self._finite else None for name, value in figures.items()},
            "zeros": self._zeros / self.elements if self.elements else 0.0,
            "non_finite": self.elements - self._finite,
        }


def _stored_chunks(checkpoint: DistCheckpoint, key: str) -> list[_Chunk]:
    """Chunks of a tensor as shown; where layers are the first axis of the stored one, those of its layer."""
    stored_key, layer = key, None
    if key not in checkpoint.metadata.state_dict_metadata:
        match = _LAYER.search(key)
        assert match is not None  # DistCheckpoint shows a stored key with nothing but the layer's number put in
        stored_key, layer = key.replace(match[0], LAYER_PREFIX, 1), int(match[1])
    entry = checkpoint.metadata.state_dict_metadata[stored_key]
    assert isinstance(entry, TensorStorageMetadata)
    chunks = []
    for chunk in entry.chunks:
        region = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        if layer is not None:
            if not region[0].start <= layer < region[0].stop:
                continue
            region = region[1:]
        info = (checkpoint.metadata.storage_data or {}).get(MetadataIndex(stored_key, chunk.offsets))
        if info is None:
            raise CheckpointError(f"{checkpoint.path} does not say in which file {stored_key} lies; it is damaged")
        chunks.append(_Chunk(region, info.relative_path, info.offset, info.length))
    return chunks


def _meant(key: str, keys: Sequence[str]) -> str:
    """What to name instead: the layer that there is, or the keys closest to ``key``."""
    known: dict[str, str] = {}
    for name in keys:  # one of its layers stands for each
        known.setdefault(_LAYER.sub(f"{LAYER_PREFIX}*.", name), name)
    pattern = _LAYER.sub(f"{LAYER_PREFIX}*.", key)
    if pattern in known:
        numbers = [int(match[1]) for name in keys if (match := _LAYER.search(name))]
        return f"; name one layer out of 0 to {max(numbers)}, as in {known[pattern]}"
    close = [name for name in known if name.endswith(f".{key}") or f"{key}." in name]
    close = close or closest(pattern, known, 3)
    if not close:
        return "; growth-megatron inspect lists the tensors"
    asked = match[1] if (match := _LAYER.search(key)) else "0"
    names = [name.replace("*", asked) for name in close[:3]]
    names = [name if name in keys else known[before] for name, before in zip(names, close, strict=False)]
    return f"; did you mean {' or '.join(names)}?"
