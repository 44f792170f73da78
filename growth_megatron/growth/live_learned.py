"""Learned growth while its maps are trained: the modules compute with what the maps make of the source's weights.

Owns: this rank's share of that, its gradients, their sum over the ranks.
Does not own: what the maps do (``growth.learned``), the steps (``train.learning``).

One tensor is worked on at a time: its live values are computed for ``pour`` and once more, under autograd, when its
gradient is there. What is frozen stays in memory, in float32: all that goes into what a rank holds a part of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from growth_megatron.checkpoint.torch_dist.live_model import ModelShard, model_shards
from growth_megatron.growth.learned import Growing, Maps, base_prefix, source_key
from growth_megatron.growth.learned_maps import depth_maps, is_mapped
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.architecture import Kind, Row, layer_key, row_of, split_layer_key
from growth_megatron.model.tensors import Region, TensorSource, whole

_Base = tuple[str, int | None]
"""A tensor's name, and the source's layer or None: all layers, or no layer's."""


class LearnedWeights:
    """A live map. ``maps`` are trainable, ``[target size, source size]`` in float32, and the same on all ranks."""

    def __init__(self, plan: GrowthPlan, source: TensorSource, models: Sequence[MegatronModule], maps: Maps) -> None:
        """The models have their gradient buffers; tensors that no map touches are filled here, once."""
        self._plan, self._source, self._prefix = plan, source, base_prefix(source)
        parameters = [param for model in models for param in model.parameters()]
        self._device = parameters[0].device
        self.maps = {name: value.detach().to(self._device, copy=True).requires_grad_() for name, value in maps.items()}
        self._growing = Growing(plan.source_geometry, plan.target_geometry, self.maps)
        self._owners = {param.untyped_storage().data_ptr(): param for param in parameters}
        self._shards: list[ModelShard] = []
        self._base: dict[_Base, list[torch.Tensor]] = {}
        with torch.no_grad():
            for shard in model_shards(models):
                if is_mapped(row_of(shard.key), maps):
                    self._shards.append(shard)
                    self._keep_base(shard)
                else:
                    shard.data.copy_(self._read(source_key(plan, shard.key), shard.region))

    @torch.no_grad()
    def pour(self, stage_step: int) -> None:
        """Whatever the step, by the maps as they are."""
        for shard in self._shards:
            shard.data.copy_(self._live(shard))

    def pull_back(self) -> None:
        """dL/dmaps, summed over the ranks (what several hold counts once), averaged over data-parallel ones."""
        for value in self.maps.values():
            value.grad = torch.zeros_like(value)
        for shard in self._shards:
            if shard.is_first:
                self._live(shard).backward(self._gradient(shard))  # type: ignore[no-untyped-call]
        gradients = [value.grad for value in self.maps.values() if value.grad is not None]
        summed = torch.cat([gradient.flatten() for gradient in gradients])
        # One sum over all ranks gives all of them the same bits.
        dist.all_reduce(summed)
        summed /= parallel_state.get_data_parallel_world_size()
        for gradient, part in zip(gradients, torch.split(summed, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def put_back(self) -> None:
        """Nothing: the modules' parameters are the live weights' alone."""

    def is_over(self, stage_step: int) -> bool:
        """Not before the maps are carried out."""
        return False

    def digest(self) -> str:
        """Of the maps on this rank."""
        contents = (value.detach().cpu().numpy().tobytes() for value in self.maps.values())
        return hashlib.sha256(b"".join(contents)).hexdigest()

    def _live(self, shard: ModelShard) -> torch.Tensor:
        row, base = row_of(shard.key), self._base[self._base_of(shard)]
        names, place = depth_maps(row), split_layer_key(shard.key)
        if place is not None and names[0] in self.maps:
            base = [
                (self.maps[name][place[0]].unsqueeze(0) @ piece.flatten(1)).view(piece.shape[1:])
                if self._growing.is_in(row, number, shard.region)
                else piece[0]
                for number, (name, piece) in enumerate(zip(names, base, strict=True))
            ]
        return self._growing.widen(row, base, shard.region)

    def _gradient(self, shard: ModelShard) -> torch.Tensor:
        """Of the shard's shape: the rows of its parameter's that it is a view of."""
        owner = self._owners[shard.data.untyped_storage().data_ptr()]
        first = (shard.data.storage_offset() - owner.storage_offset()) // owner.stride(0)
        gradient: torch.Tensor = owner.main_grad
        return gradient[first : first + len(shard.data)]

    def _base_of(self, shard: ModelShard) -> _Base:
        row, place = row_of(shard.key), split_layer_key(shard.key)
        if place is None or depth_maps(row)[0] in self.maps:
            return row.name, None
        assert self._plan.layers is not None
        return row.name, self._plan.layers[place[0]]

    def _keep_base(self, shard: ModelShard) -> None:
        """Pieces of the source's tensor, of all layers ``[layers, ...]`` where they are mixed."""
        base, row = self._base_of(shard), row_of(shard.key)
        if base in self._base:
            return
        rows, *rest = whole(row.shape(self._plan.source_geometry))
        if split_layer_key(shard.key) is None:
            rows = shard.region[0] if row.axes[0].kind is Kind.VOCABULARY else rows
            self._base[base] = [self._read(source_key(self._plan, shard.key), (rows, *rest))]
            return
        layers = range(self._plan.source_geometry.num_layers) if base[1] is None else [base[1]]
        pieces = [self._pieces(row, layer, (rows, *rest)) for layer in layers]
        self._base[base] = [torch.stack(piece) for piece in zip(*pieces, strict=True)] if base[1] is None else pieces[0]

    def _pieces(self, row: Row, layer: int, region: Region) -> list[torch.Tensor]:
        return self._growing.pieces(row, self._read(layer_key(layer, row.name), region))

    def _read(self, key: str, region: Region) -> torch.Tensor:
        return self._source.read(self._prefix + key, region).to(self._device, torch.float32)
