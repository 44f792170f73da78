"""Parameter groups of the optimizer as ``common.pt`` holds them.

Owns: what sets the group of a parameter with multipliers apart, and the groups that a load finds in ``common.pt``.
Does not own: the live groups (``train.engine``), the file (``checkpoint.torch_dist.reader``), the tensors' state.

megatron-core makes one group of all parameters with the same overrides. On load it looks for each live group by
(wd_mult, lr_mult, is_expert_parallel, is_decoupled_lr) and fails where ``common.pt`` has none. epsilon is not among
these: two groups that differ in it alone are one to the load, so the engine keeps the multipliers itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from growth_megatron.checkpoint.folder.manifest import Multipliers
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import CheckpointError
from growth_megatron.model.architecture import layer_key, model_rows, without_layer_number

LEARNING_RATE, WEIGHT_DECAY, EPSILON = "lr_mult", "wd_mult", "eps_mult"
"""The first two are megatron-core's names; the third is ours and rides along in the group."""

_SETTINGS = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "eps": EPSILON}
_NONE = Multipliers()
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}
_FRESH_GROUP: Mapping[str, Any] = {
    "is_expert_parallel": False,
    "default_config": True,
    "wd_mult": 1.0,
    "lr_mult": 1.0,
    "is_decoupled_lr": False,
    "max_lr": 0.0,
    "min_lr": 0.0,
    "lr": 0.0,
    "weight_decay": 0.0,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "step": 0,  # an int: the Adam of apex and Transformer Engine takes no float
    # torch.optim.AdamW
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
    # FusedAdam of apex and Transformer Engine
    "bias_correction": True,
}


def group_overrides(multipliers: Multipliers, decays: bool) -> dict[str, float]:
    """How the group of a parameter differs from megatron-core's default one; without decay that is times 0."""
    wanted = {
        LEARNING_RATE: multipliers.learning_rate,
        WEIGHT_DECAY: multipliers.weight_decay if decays else 0.0,
        EPSILON: multipliers.epsilon,
    }
    return {name: value for name, value in wanted.items() if value != 1.0}


def fresh_common() -> dict[str, Any]:
    """``common.pt`` of a model before its first step, as megatron-core's own save of one has it.

    Learning rate and weight decay are 0: the engine puts the configured ones in before each step.
    """
    groups = [{**_FRESH_GROUP, WEIGHT_DECAY: weight_decay} for weight_decay in (1.0, 0.0)]
    return {
        "optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"},
        "content_metadata": dict(_FORMAT),
    }


def regroup(common: Mapping[str, Any], multipliers: Mapping[str, Multipliers], geometry: ModelConfig) -> dict[str, Any]:
    """A copy of ``common`` with the groups of an optimizer of ``geometry`` with ``multipliers``.

    Step, betas and all else of a group is taken over from ``common``, whatever groups it has.

    Raises:
        CheckpointError: ``common`` has no parameter groups, or a multiplier is of no tensor of ``geometry``.
    """
    check_multipliers(multipliers, geometry)
    result = copy.deepcopy(dict(common))
    try:
        inner = result["optimizer"]["optimizer"]
        before: list[dict[str, Any]] = inner["param_groups"]
        template = {name: value for name, value in before[0].items() if name != EPSILON}
    except (KeyError, IndexError, TypeError, AttributeError):
        raise CheckpointError("common.pt has no parameter groups of an optimizer that others could follow") from None
    for setting, multiplier in _SETTINGS.items():
        if (value := _unscaled(before, setting, multiplier)) is not None:
            template[setting] = value
    inner["param_groups"] = [_group(template, overrides) for overrides in _distinct(multipliers, geometry)]
    return result


def check_multipliers(multipliers: Mapping[str, Multipliers], geometry: ModelConfig) -> None:
    """Raises CheckpointError if a multiplier is of no tensor of ``geometry``: it would do nothing, unnoticed."""
    known = {without_layer_number(key) for key in model_rows(geometry)}
    if unknown := sorted(multipliers.keys() - known):
        raise CheckpointError(
            f"there are multipliers for {', '.join(unknown)}, which the model does not have; "
            f"its tensors are {', '.join(sorted(known))}"
        )


def describe_multipliers(multipliers: Mapping[str, Multipliers]) -> str:
    """One line: what is multiplied by how much, the tensors with the same factors together."""
    names: dict[tuple[float, float, float], list[str]] = {}
    for key, factors in multipliers.items():
        name = key.removeprefix(layer_key("*", "")).removesuffix(".weight")
        names.setdefault((factors.learning_rate, factors.weight_decay, factors.epsilon), []).append(name)
    parts = [f"{lr:g}, {wd:g}, {eps:g}: {', '.join(keys)}" for (lr, wd, eps), keys in names.items()]
    return f"learning rate, weight decay and epsilon are multiplied by {'; '.join(parts)}"


def _distinct(multipliers: Mapping[str, Multipliers], geometry: ModelConfig) -> list[dict[str, float]]:
    """Overrides of each group, once, in megatron-core's order: the default group first."""
    found: set[tuple[tuple[str, float], ...]] = set()
    for key, row in model_rows(geometry).items():
        overrides = group_overrides(multipliers.get(without_layer_number(key), _NONE), row.decays)
        found.add(tuple(sorted(overrides.items())))
    return [dict(overrides) for overrides in sorted(found)]


def _group(template: Mapping[str, Any], overrides: Mapping[str, float]) -> dict[str, Any]:
    group = {**copy.deepcopy(dict(template)), LEARNING_RATE: 1.0, WEIGHT_DECAY: 1.0, **overrides}
    group["default_config"] = LEARNING_RATE not in overrides
    for setting, multiplier in _SETTINGS.items():
        if setting in group:
            group[setting] *= group.get(multiplier, 1.0)
    return group


def _unscaled(groups: list[dict[str, Any]], setting: str, multiplier: str) -> float | None:
    """``setting`` without its group's multiplier; None if no group tells, as one with weight decay times 0 does not."""
    for group in groups:
        factor = group.get(multiplier, 1.0)
        if setting in group and factor:
            return float(group[setting] / factor)
    return None
