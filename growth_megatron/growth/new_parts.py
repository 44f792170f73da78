"""Which parameters a growth has added and which were there before, by its plan; which are frozen, by their names.

Owns: the answers, and their words. Does not own: what the optimizer makes of them (``train.parameter_groups``).

Old is the first copy of each coordinate of the source and of each of its layers; what has no source, and every later
copy, is new. An element of a matrix is old where both its row and its column are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from growth_megatron.config.schema import ModelConfig, OptimizerConfig
from growth_megatron.config.units import format_count
from growth_megatron.config.words import did_you_mean, listed
from growth_megatron.errors import ConfigError
from growth_megatron.growth.rules import GrowthPlan, TensorRule
from growth_megatron.model.architecture import model_rows, tensor_shapes

if TYPE_CHECKING:
    import torch

    from growth_megatron.model.tensors import Region


def count_new(plan: GrowthPlan) -> int:
    """New parameters of the target model."""
    return sum(math.prod(rule.shape) - _count_old(rule) for rule in plan.rules)


def _count_old(rule: TensorRule) -> int:
    if rule.state != "old":
        return 0
    return math.prod(axis.target_size if axis.new is None else axis.new.count(False) for axis in rule.axes)


def new_mask(rule: TensorRule, region: Region) -> torch.Tensor:
    """True where new, in a shape that broadcasts to ``region`` of the target tensor."""
    import torch

    mask = torch.full([1] * len(rule.axes), rule.state != "old")
    for number, axis in enumerate(rule.axes):
        if axis.new_tensor is not None:
            shape = [1] * len(rule.axes)
            shape[number] = -1
            mask = mask | axis.new_tensor[region[number]].view(shape)
    return mask


def frozen_keys(patterns: Sequence[str], geometry: ModelConfig) -> list[str]:
    """The tensors that ``optimizer.freeze`` names.  Raises: ConfigError for a pattern that names none."""
    keys = list(model_rows(geometry))
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in keys):
            hint = did_you_mean(pattern, keys) or f"; its tensors are {listed(keys, 12, ', ')}"
            raise ConfigError(f"optimizer.freeze: {pattern!r} names no tensor of the model{hint}")
    return [key for key in keys if any(fnmatchcase(key, pattern) for pattern in patterns)]


def describe_groups(settings: OptimizerConfig, plan: GrowthPlan | None, geometry: ModelConfig) -> str:
    """What is trained otherwise than the rest of the model, in words; empty where nothing is."""
    parts, new = [], settings.new_parameters
    sizes = {key: math.prod(shape) for key, shape in tensor_shapes(geometry).items()}
    if plan is not None and settings.tells_new_apart:
        how = [f"learning rate x {new.learning_rate_multiplier:g}", f"warm-up {new.warmup_steps} steps"]
        if new.weight_decay is not None:
            how.append(f"weight decay {new.weight_decay:g}")
        if settings.train_only == "new":
            how.append(f"trained alone for {settings.train_only_steps or 'all'} steps")
        parts.append(f"new parameters ({format_count(count_new(plan))} of {format_count(sum(sizes.values()))}): ")
        parts[-1] += ", ".join(how)
    if frozen := frozen_keys(settings.freeze, geometry):
        count = format_count(sum(sizes[key] for key in frozen))
        parts.append(f"not trained: {len(frozen)} tensor{'s' if len(frozen) > 1 else ''} ({count} parameters)")
    return "; ".join(parts)
