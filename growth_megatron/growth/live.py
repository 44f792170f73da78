"""Growth that acts while it trains: a live map stands between what is trained and what megatron-core's modules hold.

Owns: what a live map can do, masked growth as one, which one a checkpoint asks for.
Does not own: the factors of masks (``growth.masks``), when a step calls the map (``train.engine``).

Forward, backward, schedules and communication see an ordinary LLaMA; no module changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.torch_dist.live_model import model_shards
from growth_megatron.growth.masks import Factor, Masks, masked, masked_plan, multiply
from growth_megatron.growth.ramps import last_step
from growth_megatron.growth.rules import GrowthPlan


class LiveMap(Protocol):
    """From the trainable parameters to this rank's live weights, and back with their gradients."""

    def pour(self, stage_step: int) -> None:
        """Put the live weights into the modules' parameters; before forward, when all parameters are complete."""
        ...

    def pull_back(self) -> None:
        """Turn the live weights' gradients into the trainable parameters'; after their reduction, before clipping."""
        ...

    def put_back(self) -> None:
        """Put back what the parameters held; before the update, and before anything is saved."""
        ...

    def is_over(self, stage_step: int) -> bool:
        """Whether the trainable parameters are the live weights from this step on."""
        ...


class MaskedWeights:
    """Masked growth: each live weight is the trainable one of the same name, times its masks."""

    def __init__(self, plan: GrowthPlan, models: Sequence[MegatronModule]) -> None:
        self._plan = plan
        closed = Masks(plan, 0)  # masks only open: what they touch at all, they touch here
        self._shards = [shard for shard in model_shards(models) if closed.factors(shard.key, shard.region)]
        # Whatever kernels they run on, norms keep their epsilon as ``eps``; those of q and k keep theirs as it is.
        norms = [module for model in models for module in model.modules() if hasattr(module, "eps")]
        self._norms = norms if closed.norm_epsilon != plan.target_geometry.norm_epsilon else []
        self._poured: list[tuple[torch.Tensor, list[Factor], torch.Tensor]] = []

    @torch.no_grad()
    def pour(self, stage_step: int) -> None:
        """Costs one copy of the masked weights, until they are put back."""
        masks = Masks(self._plan, stage_step)
        for param, key, region, _ in self._shards:
            if factors := masks.factors(key, region):
                self._poured.append((param, factors, param.clone()))
                param.copy_(masked(param, factors))
        self._set_epsilon(masks.norm_epsilon)

    @torch.no_grad()
    def pull_back(self) -> None:
        """dL/dW = c dL/dW_live, where W_live = c W."""
        for param, factors, _ in self._poured:
            multiply(param.main_grad, factors)  # type: ignore[attr-defined]

    @torch.no_grad()
    def put_back(self) -> None:
        """Bit by bit what was there before ``pour``."""
        for param, _, kept in self._poured:
            param.copy_(kept)
        self._poured = []
        self._set_epsilon(self._plan.target_geometry.norm_epsilon)

    def is_over(self, stage_step: int) -> bool:
        """Whether all masks are open."""
        return stage_step >= last_step(self._plan.ramps)

    def _set_epsilon(self, epsilon: float) -> None:
        for norm in self._norms:
            norm.eps = epsilon


def live_map(manifest: Manifest, models: Sequence[MegatronModule]) -> LiveMap | None:
    """The map under which a checkpoint's model goes on training; None where it is trained as it is."""
    plan = masked_plan(manifest)
    return None if plan is None else MaskedWeights(plan, models)
