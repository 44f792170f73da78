"""Learned growth before it is carried out: which maps there are, and what a step of learning them costs. No torch.

Owns: names and shapes of the maps, FLOPs and memory of pouring weights out of them and of pulling gradients back, the
phase as it is configured.
Does not own: what the maps do to a tensor (``growth.learned``), a plan of a whole run (``train.plan``).

There is one map for each axis that grows, shared by all tensors along it, and for each kind of tensor one that mixes
layers. Query heads, keys and values grow by whole groups: q by ``groups`` x ``heads``, k by ``groups``, both whole
heads, so that rotary pairs stay; v by ``values`` and the columns of o by ``values`` x ``heads``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from growth_megatron.config.growth_schema import LearnConfig
from growth_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.architecture import (
    IN_LAYER,
    Kind,
    Row,
    layer_rows,
    numel,
    outer_rows,
)
from growth_megatron.model.cost import FP32_BYTES, layers_of_rank, outer_of_rank

RESIDUAL, FFN, GROUPS, HEADS, VALUES = "residual", "ffn", "groups", "heads", "values"
"""Maps along the width."""

_PIECES: Mapping[Kind, tuple[str, ...]] = {Kind.QKV: (".q", ".k", ".v"), Kind.GATE_UP: (".gate", ".up")}


def depth_maps(row: Row) -> list[str]:
    """Names of the maps that mix the layers of a tensor, one for each piece of a fused one."""
    return [f"depth.{row.name}{piece}" for piece in _PIECES.get(row.axes[0].kind, ("",))]


def phase_of(stage: StageConfig) -> tuple[LearnConfig, StageConfig]:
    """The options of the phase before ``stage``, and the stage as the phase trains it: same model, own batch."""
    assert stage.growth is not None
    learn = stage.growth.learn or LearnConfig()
    batch = learn.global_batch_size or stage.training.global_batch_size
    changes = {
        "training": stage.training.model_copy(update={"global_batch_size": batch}),
        "parallel": stage.parallel.model_copy(update={"overlap_param_gather": False}),
    }
    return learn, stage.model_copy(update=changes)


def axis_order(row: Row) -> tuple[int, ...]:
    """The axis of which a tensor-parallel rank has a part comes first: what is left to do is the smaller."""
    return (1, 0) if row.split_axis == 1 else tuple(range(len(row.axes)))


def map_shapes(source: ModelConfig, target: ModelConfig, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Name -> (target size, source size) of every map; along what does not grow there is none."""
    before, after = source.num_query_groups, target.num_query_groups
    sizes = {
        RESIDUAL: (target.hidden_size, source.hidden_size),
        FFN: (target.ffn_hidden_size, source.ffn_hidden_size),
        GROUPS: (after, before),
        HEADS: (target.num_attention_heads // after, source.num_attention_heads // before),
        VALUES: (after * source.head_dim, before * source.head_dim),
    }
    shapes = {name: shape for name, shape in sizes.items() if shape[0] != shape[1]}
    if tuple(layers) != tuple(range(source.num_layers)):
        names = [name for row in layer_rows(target) for name in depth_maps(row)]
        shapes |= dict.fromkeys(names, (len(layers), source.num_layers))
    return shapes


def learned_reading(plan: GrowthPlan) -> tuple[int, int]:
    """Entries that are read of the source to write the target, every layer again for each that it is mixed into; and of
    the largest of its tensors.
    """
    source, target = plan.source_geometry, plan.target_geometry
    maps = map_shapes(source, target, plan.layers or ())
    read = sum(numel(row, source) for row in outer_rows(target))
    for row in layer_rows(target):
        mixed = source.num_layers if depth_maps(row)[0] in maps else 1
        read += target.num_layers * mixed * numel(row, source)
    return read, max(numel(row, source) for row in layer_rows(target))


@dataclass(frozen=True)
class MapCosts:
    """What a step costs beside forward and backward of the target, and a rank's memory beside weights and gradients.

    ``base_bytes``: the source's weights, frozen, in float32; ``map_bytes``: maps, their gradients and Adam's moments;
    ``temporary_bytes``: of the tensor that needs most, one is worked on at a time.
    """

    flops: int
    base_bytes: int
    map_bytes: int
    temporary_bytes: int

    @property
    def extra_bytes(self) -> int:
        """All of it."""
        return self.base_bytes + self.map_bytes + self.temporary_bytes


def map_costs(
    source: ModelConfig,
    target: ModelConfig,
    layers: Sequence[int],
    parallel: ParallelConfig | None = None,
    pipeline_rank: int = 0,
) -> MapCosts:
    """Of one step, over all ranks that hold one model (each data-parallel replica does it again), and of one rank."""
    parallel = parallel or ParallelConfig()
    maps = map_shapes(source, target, layers)
    mixes = bool(maps.keys() - {RESIDUAL, FFN, GROUPS, HEADS, VALUES})
    products = _Products(source, target, maps, mixes)
    flops = sum(products.flops(row) * target.num_layers for row in layer_rows(target))
    flops += sum(products.flops(row) for row in outer_rows(target))
    held = layers_of_rank(target.num_layers, parallel, pipeline_rank)
    kept = source.num_layers if mixes else len({layers[layer] for layer in held})
    base = kept * sum(numel(row, source) for row in layer_rows(target) if is_mapped(row, maps))
    outer = outer_of_rank(target, parallel, pipeline_rank) if RESIDUAL in maps else []
    tensor = parallel.tensor_parallel_size
    base += sum(numel(row, source) // (tensor if row.is_matrix else 1) for row in outer)
    entries = sum(math.prod(shape) for shape in maps.values())
    temporary = max(products.temporary(row, tensor) for row in (*layer_rows(target), *outer))
    # Value, gradient, two moments; all gradients once more while they are added up over the ranks.
    return MapCosts(flops, FP32_BYTES * base, 5 * FP32_BYTES * entries, FP32_BYTES * temporary)


def is_mapped(row: Row, maps: Mapping[str, object]) -> bool:
    """Whether any map takes part in a tensor."""
    along = {
        Kind.RESIDUAL: (RESIDUAL,), Kind.FFN: (FFN,), Kind.GATE_UP: (FFN,), Kind.QKV: (GROUPS, HEADS, VALUES),
        Kind.HEADS: (HEADS, VALUES),
    }  # fmt: skip
    names = [name for axis in row.axes for name in along.get(axis.kind, ())]
    return any(name in maps for name in (*names, *depth_maps(row)))


class _Products:
    """The matrix products by which each tensor comes about."""

    def __init__(self, source: ModelConfig, target: ModelConfig, maps: Mapping[str, object], mixes: bool) -> None:
        self._source, self._target, self._maps, self._mixes = source, target, maps, mixes

    def flops(self, row: Row) -> int:
        """To pour it; to pour it again for the gradients; those of the maps, and of what a product reads if a map made
        that.
        """
        mixed = self._mixes and row in IN_LAYER
        total = 3 * 2 * self._source.num_layers * numel(row, self._source) if mixed else 0
        sizes, learned = list(row.shape(self._source)), mixed
        for number in axis_order(row):
            rest = math.prod(sizes) // sizes[number]
            chains = self._along(row.axes[number].kind, rest)
            for chain in chains:
                total += 3 * sum(chain) + sum(chain if learned else chain[1:])
            learned = learned or bool(chains)
            sizes[number] = row.shape(self._target)[number]
        return total

    def temporary(self, row: Row, tensor: int) -> int:
        """Elements while the gradients of a tensor are computed: layers mixed, half and wholly grown, and gradients."""
        sizes = [list(row.shape(self._source))]
        for number in axis_order(row):
            if self._along(row.axes[number].kind, 1):
                sizes.append(list(sizes[-1]))
                sizes[-1][number] = row.shape(self._target)[number]
        split = tensor if row.split_axis is not None else 1
        alone = 2 if row.axes[0].kind is Kind.GATE_UP else 1  # gate and up come one after the other
        mixed = math.prod(sizes[0]) // alone if self._mixes and row in IN_LAYER else 0
        grown, half = (math.prod(size) // (alone * split) for size in (sizes[-1], sizes[len(sizes) // 2]))
        if len(sizes) == 3:
            return mixed + grown + half + max(mixed, half)
        # q, k and v are joined, and their gradients parted.
        joined = 2 * grown if row.axes[0].kind is Kind.QKV and RESIDUAL not in self._maps else 0
        return mixed + joined + (grown + mixed if len(sizes) == 2 else 0)

    def _along(self, kind: Kind, rest: int) -> list[list[int]]:
        """FLOPs of the products along an axis, those in a chain one after the other; ``rest``: size of the other."""
        before, after = self._source.num_query_groups, self._target.num_query_groups
        heads, channels = self._source.num_attention_heads // before, self._source.head_dim
        grown_heads = self._target.num_attention_heads // after
        groups = self._product(GROUPS, after, before, channels * rest)
        values = self._product(VALUES, after * channels, before * channels, rest)
        inside = self._product(HEADS, grown_heads, heads, after * channels * rest)
        ffn = self._product(FFN, self._target.ffn_hidden_size, self._source.ffn_hidden_size, rest)
        chains = {
            Kind.QKV: [[flops * heads for flops in groups] + inside, groups, values],
            Kind.HEADS: [[flops * heads for flops in values] + inside],
            Kind.GATE_UP: [ffn, ffn],
            Kind.FFN: [ffn],
            Kind.RESIDUAL: [self._product(RESIDUAL, self._target.hidden_size, self._source.hidden_size, rest)],
        }.get(kind, [])
        return [chain for chain in chains if chain]

    def _product(self, name: str, rows: int, inner: int, columns: int) -> list[int]:
        return [2 * rows * inner * columns] if name in self._maps else []
