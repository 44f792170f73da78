"""The tensors of a model in a table: those alike in all but the layer's number in one row.

Owns: which tensors share a row, the rows' order and their layout as text.
Does not own: what else is known of a checkpoint (``commands.inspect``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, is_stacked
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.tables import columns
from growth_megatron.model.architecture import LAYER_PREFIX, tensor_shapes
from growth_megatron.model.tensors import TensorSource

_LAYER_NUMBER = re.compile(rf"{re.escape(LAYER_PREFIX)}\d+\.")
_ANY_LAYER = f"{LAYER_PREFIX}*."


def tensor_table(source: TensorSource, geometry: ModelConfig) -> list[dict[str, Any]]:
    """Tensors alike in name, up to the layer, and in shape and type: how many; of a checkpoint, in how many chunks."""
    groups: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    for row in _checkpoint_rows(source) if isinstance(source, DistCheckpoint) else _rows(source):
        group = groups.setdefault((row["key"], tuple(row["shape"]), row["dtype"]), row)
        if group is not row:
            group.update({name: group[name] + row[name] for name in ("count", "chunks") if name in row})
    order = list(dict.fromkeys(_pattern(key) for key in tensor_shapes(geometry)))
    return sorted(groups.values(), key=lambda group: _place(group["key"], order))


def _checkpoint_rows(stored: DistCheckpoint) -> Iterator[dict[str, Any]]:
    for key, entry in stored.metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        count, shape, pattern = 1, list(entry.size), _pattern(key)
        if is_stacked(key):
            count, shape, pattern = shape[0], shape[1:], key.replace(LAYER_PREFIX, _ANY_LAYER, 1)
        yield {**_row(pattern, count, shape, entry.properties.dtype), "chunks": len(entry.chunks)}


def _rows(source: TensorSource) -> Iterator[dict[str, Any]]:
    for key in source.keys():
        spec = source.spec(key)
        yield _row(_pattern(key), 1, list(spec.shape), spec.dtype)


def _row(pattern: str, count: int, shape: list[int], dtype: torch.dtype) -> dict[str, Any]:
    return {"key": pattern, "count": count, "shape": shape, "dtype": str(dtype).removeprefix("torch.")}


def _pattern(key: str) -> str:
    return _LAYER_NUMBER.sub(_ANY_LAYER, key)


def _place(pattern: str, order: Sequence[str]) -> tuple[int, str, int, str]:
    """Weights first, in the model's order; then each part of the optimizer's state, in the same order."""
    for number, name in enumerate(order):
        if pattern == name or pattern.endswith(f".{name}"):
            return 0, pattern.removesuffix(name), number, pattern
    return 1, "", 0, pattern


def render_table(tensors: Sequence[dict[str, Any]], objects: int = 0) -> list[str]:
    """Lines of the table, and one for the byte objects beside the tensors."""
    has_chunks = any("chunks" in t for t in tensors)
    rows = [("tensors", "count", "shape", "type", "chunks" if has_chunks else "")]
    for t in tensors:
        shape = " x ".join(map(str, t["shape"])) or "scalar"
        rows.append((t["key"], str(t["count"]), shape, t["dtype"], str(t.get("chunks", ""))))
    lines = columns(rows, right=[1, 4])
    if objects:
        lines.append(f"and {objects} byte object{'s' if objects != 1 else ''}")
    return lines
