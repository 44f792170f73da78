"""Old and new parameters of a grown model, and frozen ones, treated apart by the optimizer.

Owns: factors of the update as functions of the stage's step, their application to each element, norms of old and new.
Does not own: who is new or frozen (``growth.new_parts``), the step (``train.engine``).

An update that is scaled by f is one with f times the learning rate, decoupled weight decay included. Where f is 0 the
gradient is set to 0 before the norm is taken, so that clipping sees what is trained alone. All follows from the stage's
step and the configuration: nothing of it is stored, and a run resumes exactly, at any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import MegatronModule, param_is_not_shared

from growth_megatron.checkpoint.torch_dist.live_model import model_shards
from growth_megatron.config.schema import ModelConfig, OptimizerConfig
from growth_megatron.growth.new_parts import frozen_keys, new_mask
from growth_megatron.growth.rules import GrowthPlan

Figures = dict[str, float]


def update_factors(settings: OptimizerConfig, stage_step: int) -> tuple[float, float]:
    """Of the update of old and of new parameters, where the stage has made ``stage_step`` steps."""
    only_new = settings.train_only == "new" and stage_step < (settings.train_only_steps or math.inf)
    of_new = settings.new_parameters
    warm = min(1.0, (stage_step + 1) / of_new.warmup_steps) if of_new.warmup_steps else 1.0
    return float(not only_new), of_new.learning_rate_multiplier * warm


def is_counted(shard: torch.Tensor) -> bool:
    """Whether this rank is the one to count an optimizer's parameter in a norm over all ranks."""
    return bool(param_is_not_shared(shard) and param_is_not_tensor_parallel_duplicate(shard))


@dataclass
class _Shard:
    """What this rank's optimizer holds of one parameter: flat, as ``new`` is, which is a scalar where all are alike."""

    values: torch.Tensor
    new: torch.Tensor
    has_old: bool
    has_new: bool
    is_frozen: bool
    optimizer: torch.optim.Optimizer
    before: torch.Tensor | None = None

    def factors(self, of_old: float, of_new: float) -> torch.Tensor:
        """Of each element's update."""
        if self.is_frozen:
            return torch.zeros_like(self.values)
        return torch.where(self.new, of_new, of_old).to(self.values)

    def changes(self, of_old: float, of_new: float, has_own_decay: bool) -> bool:
        """Whether its update or decay is not the optimizer's own."""
        if self.is_frozen:
            return True
        return (self.has_old and of_old != 1.0) or (self.has_new and (of_new != 1.0 or has_own_decay))


class ParameterGroups:
    """Stands by the optimizer of a stage whose parameters are not all treated alike, or are to be told apart.

    A step is ``begin``, the optimizer's own, and ``end``. Those of ``begin`` whose update is changed are copied until
    ``end``, at most 4 bytes for each parameter that this rank's optimizer holds.
    """

    def __init__(
        self,
        settings: OptimizerConfig,
        plan: GrowthPlan | None,
        geometry: ModelConfig,
        models: Sequence[MegatronModule],
        optimizers: Sequence[MegatronOptimizer],
    ) -> None:
        """``plan``: the growth that the stage began with; without one no parameter is new."""
        self._settings, self.has_new = settings, plan is not None
        frozen = frozenset(frozen_keys(settings.freeze, geometry))
        masks = _masks(plan, frozen, models)
        self._shards: list[_Shard] = []
        self._changed: list[_Shard] = []
        self._factors = 1.0, 1.0
        for optimizer in optimizers:
            for param, values in _shards_of(optimizer):
                part = optimizer._get_model_param_range_map(param)["param"]
                new, is_frozen = masks[param]
                own = new.view(-1)[part.start : part.end]
                has_old, has_new = not bool(own.all()), bool(own.any())
                own = own.clone() if has_old and has_new else own.any()
                self._shards.append(_Shard(values, own, has_old, has_new, is_frozen, optimizer.optimizer))
            optimizer.optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def begin(self, stage_step: int) -> None:
        """With the gradients ready and before their norm is taken: those of what is not trained become 0."""
        self._factors = update_factors(self._settings, stage_step)
        has_own_decay = self._settings.new_parameters.weight_decay is not None
        self._changed = [shard for shard in self._shards if shard.changes(*self._factors, has_own_decay)]
        for shard in self._changed:
            shard.before = shard.values.detach().clone()
            if shard.values.grad is not None and (shard.is_frozen or 0.0 in self._factors):
                shard.values.grad.mul_(shard.factors(*self._factors) != 0)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Between the optimizer's update of its masters and their copy into the model."""
        decay, groups = self._settings.new_parameters.weight_decay, _groups_of(optimizer)
        for shard in self._changed:
            if shard.optimizer is not optimizer or shard.before is None:
                continue
            group = groups[shard.values]
            if decay is not None and not shard.is_frozen:
                more = group["lr"] * (group["weight_decay"] - decay * group.get("wd_mult", 1.0))
                shard.values.add_(shard.before * shard.new, alpha=more)
            shard.values.copy_(torch.lerp(shard.before, shard.values, shard.factors(*self._factors)))

    @torch.no_grad()
    def end(self, measures: bool) -> Figures:
        """On all ranks, also those that hold nothing, after the step or when it is not made: the copies go.

        ``measures``: norms over all ranks of weights, clipped gradients and updates, of old and of new parameters; none
        where no parameter is new.
        """
        figures = self._measured() if measures and self.has_new else Figures()
        for shard in self._changed:
            shard.before = None
        return figures

    def _measured(self) -> Figures:
        sums = torch.zeros(2, 3, dtype=torch.float64, device=torch.cuda.current_device())
        groups: dict[torch.Tensor, Mapping[str, Any]] = {}
        for optimizer in {id(shard.optimizer): shard.optimizer for shard in self._shards}.values():
            groups |= _groups_of(optimizer)
        for shard in self._shards:
            if is_counted(shard.values) and shard.values.grad is not None:
                update = _update(shard, shard.optimizer.state[shard.values], groups[shard.values])
                for row, chosen in enumerate((~shard.new, shard.new)):
                    for column, tensor in enumerate((shard.values, shard.values.grad, update)):
                        sums[row, column] += torch.linalg.vector_norm(tensor * chosen, dtype=torch.float64) ** 2
        dist.all_reduce(sums)
        names = [f"{of}_{what}_norm" for of in ("old", "new") for what in ("weight", "grad", "update")]
        return dict(zip(names, sums.sqrt().flatten().tolist(), strict=True))


def _groups_of(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, Mapping[str, Any]]:
    return {param: group for group in optimizer.param_groups for param in group["params"]}


def _update(shard: _Shard, state: Mapping[str, torch.Tensor], group: Mapping[str, Any]) -> torch.Tensor:
    """The step just made; without a copy of the values before it, from the moments that made it."""
    if shard.before is not None:
        return shard.values - shard.before
    (beta1, beta2), steps, rate = group["betas"], float(state["step"]), group["lr"]
    deviation = (state["exp_avg_sq"] / (1 - beta2**steps)).sqrt_().add_(group["eps"])
    decay = rate * group["weight_decay"]
    step: torch.Tensor = (state["exp_avg"] / (1 - beta1**steps)).div_(deviation).mul_(rate)
    return step.add_(shard.values, alpha=decay).div_(decay - 1)  # before it they were (values + step) / (1 - decay)


def _masks(
    plan: GrowthPlan | None, frozen: frozenset[str], models: Sequence[MegatronModule]
) -> dict[torch.nn.Parameter, tuple[torch.Tensor, bool]]:
    """For each parameter of this rank which of its elements are new, and whether it is frozen."""
    rules = {rule.target: rule for rule in plan.rules} if plan else {}
    result: dict[torch.nn.Parameter, tuple[torch.Tensor, bool]] = {}
    for model in models:
        for param in model.parameters():
            result[param] = torch.zeros(param.shape, dtype=torch.bool, device=param.device), False
    places = sorted(((param.data_ptr(), param) for param in result), key=lambda place: place[0])
    for data, key, region, _ in model_shards(models):
        param = next(param for start, param in reversed(places) if start <= data.data_ptr())
        mask, _ = result[param]
        offset = (data.data_ptr() - param.data_ptr()) // data.element_size()
        view = mask.as_strided(data.shape, data.stride(), offset)
        if key in rules:
            view.copy_(new_mask(rules[key], region).to(view.device).expand(view.shape))
        result[param] = mask, key in frozen
    return result


def _shards_of(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Each parameter of which this rank's optimizer holds a part, with that part's float32 master."""
    pairs = (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    )
    for models, shards in pairs:
        for params, parts in zip(models, shards, strict=True):
            yield from zip(params, parts, strict=True)
