"""Masked growth: the factors on trainable weights that make them those of the model as it acts, an ordinary LLaMA.

Owns: the factors of every tensor at a step of the stage, a stored checkpoint seen through them.
Does not own: when masks open (``growth.ramps``), the parameters of a model that trains (``growth.live``).

A mask c stands at what writes a new part: its rows of o and down and its column of the embedding (a channel of the
residual stream), its columns of down (an ffn unit) or of o (a head), all of o and down (a layer). With w the sum of the
masks over the D channels of the stream, gains times sqrt(w / D) and epsilon times w / D make of every norm the one over
the masked width: x / sqrt(mean(x^2) + eps w / D) sqrt(w / D) = x / sqrt(sum(x^2) / w + eps). Norms of q and k share the
epsilon, but not the width; with them the stream is scaled by sqrt(D / w) instead. Before a tied output new channels are
masked twice, in the stream and in the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.origin import Origin
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import plan_of_record, writes_stream
from growth_megatron.growth.ramps import gate, last_step, mask_ramps
from growth_megatron.growth.rules import AxisRule, GrowthPlan
from growth_megatron.model.architecture import (
    FINAL_NORM,
    Axis,
    Kind,
    Row,
    layer_key,
    layer_rows,
    row_of,
    split_layer_key,
)
from growth_megatron.model.cost import layers_of_rank, outer_of_rank
from growth_megatron.model.tensors import MOMENT_PREFIXES, Region, TensorSource, TensorSpec, split_state_key, whole

Factor = torch.Tensor | float
"""Broadcasts to the region that it multiplies."""

_MASKS = {Kind.RESIDUAL: "hidden", Kind.HEADS: "heads", Kind.FFN: "ffn"}


def masked_plan(manifest: Manifest) -> GrowthPlan | None:
    """The growth whose masks are not open yet, of the checkpoint that ``manifest`` is of; None if there are none."""
    if not manifest.lineage:
        return None
    record = manifest.lineage[-1]
    choice = choose(GrowthConfig(operator=record.operator, ramp=record.options.get("ramp")))
    ramps = mask_ramps(record.source_geometry, record.target_geometry, choice)
    since = manifest.step - record.step  # a branch counts its stage anew
    return plan_of_record(record) if since < last_step(ramps) else None


class Masks:
    """The masks of a growth after ``step`` steps of its stage.

    ``gates`` says how far each kind is open, ``norm_epsilon`` is that of the model as it acts.
    """

    def __init__(self, plan: GrowthPlan, step: int) -> None:
        source, self._target = plan.source_geometry, plan.target_geometry
        self._rules = {rule.target: rule for rule in plan.rules}
        self.gates = {kind: gate(ramp, step) for kind, ramp in plan.ramps.items()}
        size = self._target.hidden_size
        closed = (size - source.hidden_size) * (1 - self.gates.get("hidden", 1.0))
        share = 1 - closed / size  # w / D
        self._gain = math.sqrt(share)
        self._stream = 1 / self._gain if self._target.qk_norm else 1.0
        self.norm_epsilon = self._target.norm_epsilon * (1.0 if self._target.qk_norm else share)

    def factors(self, key: str, region: Region) -> list[Factor]:
        """What ``region`` of a weight is multiplied by, one after the other; empty where the weight acts as it is."""
        row, place = row_of(key), split_layer_key(key)
        axes = self._rules[key if place is None else layer_key(0, row.name)].axes  # layer 0 is an old one
        found = [
            factor.unsqueeze(-1) if isinstance(factor, torch.Tensor) and number == 0 and row.is_matrix else factor
            for number, axis in enumerate(row.axes)
            if (factor := self._along(row, axis, axes[number], region[number])) is not None
        ]
        if self._rules[key].state == "new" and row.is_matrix and writes_stream(row):
            found.append(self.gates.get("depth", 1.0))
        return [factor for factor in found if isinstance(factor, torch.Tensor) or factor != 1.0]

    def _along(self, row: Row, axis: Axis, rule: AxisRule, part: slice) -> Factor | None:
        """Along one axis: a number, or float64 ``[part]``."""
        if axis.kind is Kind.RESIDUAL and axis.use == "gain":
            return self._gain / (self._stream if row is FINAL_NORM and self._target.tie_embeddings else 1.0)
        if (axis.kind, axis.use) not in ((Kind.RESIDUAL, "out"), (Kind.HEADS, "in"), (Kind.FFN, "in")):
            return None
        opened = self.gates.get(_MASKS[axis.kind], 1.0)
        stream = self._stream if axis.kind is Kind.RESIDUAL else 1.0
        if opened == 1.0 or rule.index_tensor is None:
            return stream
        new = rule.index_tensor[part] < 0
        return torch.full(new.shape, stream, dtype=torch.float64).masked_fill_(new, opened * stream)


def masked(values: torch.Tensor, factors: Sequence[Factor]) -> torch.Tensor:
    """``values`` times all ``factors``, in float32 (float64 of float64), in memory of its own."""
    product = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32, copy=True)
    multiply(product, factors)
    return product


def multiply(values: torch.Tensor, factors: Sequence[Factor]) -> None:
    """``values`` times all ``factors``, in place."""
    for factor in factors:
        values.mul_(factor.to(values) if isinstance(factor, torch.Tensor) else factor)


def masked_elements(plan: GrowthPlan, parallel: ParallelConfig, pipeline_rank: int) -> int:
    """Elements of the weights that masks act on and a rank holds."""
    closed, target = Masks(plan, 0), plan.target_geometry
    keys = [row.name for row in outer_of_rank(target, parallel, pipeline_rank)]
    layers = layers_of_rank(target.num_layers, parallel, pipeline_rank)
    keys += [layer_key(layer, row.name) for layer in layers for row in layer_rows(target)]
    total = 0
    for key in keys:
        row, shape = row_of(key), row_of(key).shape(target)
        if closed.factors(key, whole(shape)):
            total += math.prod(shape) // (parallel.tensor_parallel_size if row.split_axis is not None else 1)
    return total


class MaskedSource:
    """The weights and masters of a source as they act; it has no moments, which are the trainable weights'."""

    def __init__(self, source: TensorSource, masks: Masks) -> None:
        self._source, self._masks = source, masks

    def keys(self) -> list[str]:
        """Those of the source, without moments."""
        return [key for key in self._source.keys() if not key.startswith(MOMENT_PREFIXES)]

    def spec(self, key: str) -> TensorSpec:
        """The source's."""
        return self._source.spec(key)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of ``region``, of its shape, rounded once to the type that is stored."""
        values = self._source.read(key, region)
        factors = self._masks.factors(split_state_key(key)[1], region)
        return masked(values, factors).to(values.dtype) if factors else values


def as_it_acts(origin: Origin) -> tuple[TensorSource, ModelConfig]:
    """Weights and geometry of the model that a path means: of a masked one, those that its masks make."""
    plan = masked_plan(origin.manifest)
    if plan is None:
        return origin.tensors, origin.geometry
    masks = Masks(plan, origin.manifest.stage_step)
    geometry = origin.geometry.model_copy(update={"norm_epsilon": masks.norm_epsilon})
    return MaskedSource(origin.tensors, masks), geometry
