"""Learned growth as values: what the maps make of the source's tensors, and the maps themselves on the disk.

Owns: the target's tensors as functions of maps and source, region by region; first values of the maps; their file.
Does not own: which maps there are (``growth.learned_maps``), their training (``growth.live_learned``,
``train.learning``).

W'_i = B_out (sum_j D_ij W_j) B_in^T with one B for each axis that grows and one D for each kind of tensor. What is
computed here for a checkpoint is in float64, rounded once: how the work is cut changes no more than the last bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from growth_megatron.checkpoint.huggingface.safetensors_file import SafetensorsFile
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.words import listed
from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.growth.learned_maps import (
    FFN,
    GROUPS,
    HEADS,
    RESIDUAL,
    VALUES,
    axis_order,
    depth_maps,
    map_shapes,
)
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.architecture import EMBEDDING, OUTPUT, Kind, Row, layer_key, row_of, split_layer_key
from growth_megatron.model.tensors import MASTER_PREFIX, Region, TensorSource, region_shape, whole
from growth_megatron.parallel.counter_rng import normal_rows

MAPS_NAME = "learned_maps.safetensors"
"""Of a grown checkpoint: the maps that it was grown by."""

Maps = Mapping[str, torch.Tensor]


def initial_maps(plan: GrowthPlan) -> dict[str, torch.Tensor]:
    """Float32 ``[target size, source size]`` by name: old coordinates as they are and new ones normal of variance
    1 / target size; each layer the one that the plan lists.
    """
    maps = {}
    for name, (size, old) in map_shapes(plan.source_geometry, plan.target_geometry, plan.layers or ()).items():
        first = torch.zeros(size, old)
        if name in (RESIDUAL, FFN, GROUPS, HEADS, VALUES):
            first[:old] = torch.eye(old)
            drawn = normal_rows(plan.seed, f"learned:{name}", range(old, size), old)
            first[old:] = torch.from_numpy(drawn) / size**0.5
        else:
            first[torch.arange(size), torch.tensor(plan.layers)] = 1.0
        maps[name] = first
    return maps


class Growing:
    """What the maps of a growth do to the tensors of its source; differentiable in the maps, in their type."""

    def __init__(self, source: ModelConfig, target: ModelConfig, maps: Maps) -> None:
        self.maps = maps
        self._groups = source.num_query_groups
        self._heads = source.num_attention_heads // self._groups
        self._grown_heads = target.num_attention_heads // target.num_query_groups
        self._channels = source.head_dim
        self._grown_ffn = target.ffn_hidden_size

    def pieces(self, row: Row, weights: torch.Tensor) -> list[torch.Tensor]:
        """A tensor ``[rows, ...]`` of the source taken apart into q, k and v or gate and up, ``[rows of one, ...]``."""
        if row.axes[0].kind is Kind.QKV:
            apart = weights.view(self._groups, self._heads + 2, self._channels, *weights.shape[1:])
            return [part.flatten(0, 2) for part in torch.split(apart, [self._heads, 1, 1], dim=1)]
        return list(weights.chunk(len(depth_maps(row))))

    def is_in(self, row: Row, piece: int, region: Region) -> bool:
        """Whether ``widen`` needs a piece for a region of the target's tensor: gate and up lie one above the other."""
        if row.axes[0].kind is not Kind.GATE_UP:
            return True
        first, last = region[0].start, region[0].stop
        return bool(piece * self._grown_ffn < last and first < (piece + 1) * self._grown_ffn)

    def widen(self, row: Row, pieces: Sequence[torch.Tensor], region: Region) -> torch.Tensor:
        """``region`` of a target tensor, of its shape, out of pieces of the source's size; of an embedding or output
        the region's rows are given.
        """
        values = pieces[0]
        for number in axis_order(row):
            kind, part = row.axes[number].kind, region[number]
            if kind is Kind.QKV:
                values = self._qkv([piece.reshape(len(piece), -1) for piece in pieces], part)
            elif kind is Kind.GATE_UP:
                values = self._gate_up(pieces, part)
            elif number:
                values = self._along(kind, values.T, part).T
            else:
                values = self._along(kind, values.reshape(len(values), -1), part)
        return values.reshape(region_shape(region))

    def _along(self, kind: Kind, values: torch.Tensor, part: slice) -> torch.Tensor:
        """``[source size, n] -> [part, n]``."""
        if kind is Kind.VOCABULARY:
            return values
        if kind is Kind.HEADS:
            first, last, within = self._whole_groups(part, self._grown_heads * self._channels)
            apart = values.reshape(self._groups, self._heads, self._channels, -1).transpose(1, 2)  # [g, c, h, n]
            rows = slice(first * self._channels, last * self._channels)
            mixed = self._rows(VALUES, apart.flatten(0, 1).flatten(1), rows)
            mixed = mixed.reshape(last - first, self._channels, self._heads, -1).transpose(1, 2)
            return self._inside(mixed).reshape(-1, values.shape[1])[within]
        return self._rows({Kind.RESIDUAL: RESIDUAL, Kind.FFN: FFN}.get(kind, ""), values, part)

    def _rows(self, name: str, values: torch.Tensor, part: slice) -> torch.Tensor:
        weights = self.maps.get(name)
        return values[part] if weights is None else weights[part] @ values

    def _qkv(self, pieces: Sequence[torch.Tensor], part: slice) -> torch.Tensor:
        """q, k, v ``[rows, n]`` each -> ``[part, n]`` of the fused rows, q..q k v of each group."""
        channels, columns = self._channels, pieces[0].shape[1]
        first, last, within = self._whole_groups(part, (self._grown_heads + 2) * channels)
        groups = slice(first, last)
        q, k = (self._rows(GROUPS, piece.reshape(self._groups, -1), groups) for piece in pieces[:2])
        v = self._rows(VALUES, pieces[2], slice(first * channels, last * channels))
        apart = [values.reshape(last - first, -1, channels, columns) for values in (q, k, v)]
        apart[0] = self._inside(apart[0])
        return torch.cat(apart, dim=1).reshape(-1, columns)[within]

    def _inside(self, values: torch.Tensor) -> torch.Tensor:
        """Heads of each group: ``[g, source heads, c, n] -> [g, target heads, c, n]``."""
        weights = self.maps.get(HEADS)
        return values if weights is None else torch.einsum("th,ghcn->gtcn", weights, values)

    def _gate_up(self, pieces: Sequence[torch.Tensor], part: slice) -> torch.Tensor:
        size = self._grown_ffn
        bounds = [(max(part.start - start, 0), min(part.stop - start, size)) for start in (0, size)]
        return torch.cat(
            [self._rows(FFN, piece, slice(a, b)) for piece, (a, b) in zip(pieces, bounds, strict=True) if a < b]
        )

    def _whole_groups(self, part: slice, rows: int) -> tuple[int, int, slice]:
        """First and last group (exclusive) that ``part`` lies in, of ``rows`` each, and its place in them."""
        first, last = part.start // rows, -(-part.stop // rows)
        return first, last, slice(part.start - first * rows, part.stop - first * rows)


def source_key(plan: GrowthPlan, key: str) -> str:
    """The source's tensor that a target tensor outside the layers is made of."""
    return EMBEDDING.name if key == OUTPUT.name and plan.source_geometry.tie_embeddings else key


def base_prefix(source: TensorSource) -> str:
    """Of the tensors that are mapped: float32 masters where there are any."""
    return MASTER_PREFIX if any(key.startswith(MASTER_PREFIX) for key in source.keys()) else ""


class MappedWeights:
    """The weights of the grown model, region by region, in float32 (float64 of a float64 source)."""

    def __init__(self, source: TensorSource, plan: GrowthPlan) -> None:
        assert plan.maps is not None
        self._source, self._plan, self._prefix = source, plan, base_prefix(source)
        is_double = source.spec(self._prefix + EMBEDDING.name).dtype == torch.float64
        self._dtype = torch.float64 if is_double else torch.float32
        maps = {name: values.double() for name, values in plan.maps.items()}
        self._growing = Growing(plan.source_geometry, plan.target_geometry, maps)
        self._mixed = lru_cache(maxsize=2)(self._mix)  # the regions of a tensor are read one after the other

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of ``region`` of a target tensor, of its shape."""
        row, place = row_of(key), split_layer_key(key)
        if place is not None:
            pieces = self._mixed(row, place[0])
        else:
            rows, *rest = whole(row.shape(self._plan.source_geometry))
            rows = region[0] if row.axes[0].kind is Kind.VOCABULARY else rows
            pieces = [self._read(source_key(self._plan, key), (rows, *rest))]
        return self._growing.widen(row, pieces, region).to(self._dtype)

    def _mix(self, row: Row, layer: int) -> list[torch.Tensor]:
        plan, maps = self._plan, self._growing.maps
        region, layers = whole(row.shape(plan.source_geometry)), range(plan.source_geometry.num_layers)
        names = depth_maps(row)
        if names[0] not in maps:
            assert plan.layers is not None
            return self._growing.pieces(row, self._read(layer_key(plan.layers[layer], row.name), region))
        total: list[torch.Tensor] = []
        for number in layers:
            pieces = self._growing.pieces(row, self._read(layer_key(number, row.name), region))
            parts = [maps[name][layer, number] * piece for name, piece in zip(names, pieces, strict=True)]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return total

    def _read(self, key: str, region: Region) -> torch.Tensor:
        return self._source.read(self._prefix + key, region).double()


def read_maps(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Maps of a file, or of the checkpoint whose folder is given, and the file's checksum.

    Raises: CheckpointError where there is none, or it is damaged.
    """
    file = path / MAPS_NAME if path.is_dir() else path
    return SafetensorsFile(file).read_all(), hashlib.sha256(file.read_bytes()).hexdigest()


def with_maps(plan: GrowthPlan, path: Path, sha256: str | None = None) -> GrowthPlan:
    """The plan with the maps of a file or checkpoint; ``sha256``: what the file's must be.

    Raises:
        GrowthError: the plan has no maps, or others.
        CheckpointError: there is no such file, or it is damaged.
    """
    if not plan.is_learned:
        raise GrowthError(f"maps are given, and {plan.operator} has none; leave them out, or use the operator learn")
    maps, found = read_maps(path)
    if sha256 not in (None, found):
        raise CheckpointError(f"{path}: {MAPS_NAME} does not have the checksum on record; it was changed")
    check_maps(plan, maps)
    return dataclasses.replace(plan, maps=maps)


def check_maps(plan: GrowthPlan, maps: Maps) -> None:
    """Raises GrowthError unless ``maps`` are those of the plan's geometries, and finite."""
    wanted = map_shapes(plan.source_geometry, plan.target_geometry, plan.layers or ())
    found = {name: tuple(values.shape) for name, values in maps.items()}
    differing = {name: shape for name, shape in wanted.items() if found.get(name) != shape}
    wrong = [f"{name} is {found.get(name, 'not there')}, not {shape}" for name, shape in differing.items()]
    wrong += [f"{name} is of no map here" for name in sorted(found.keys() - wanted.keys())]
    if wrong:
        raise GrowthError(f"the maps are of another growth: {listed(wrong)}; give those of a growth of these sizes")
    for name, values in maps.items():
        if not torch.isfinite(values).all():
            raise GrowthError(f"the map {name} holds values that are not finite; learn the maps anew")
