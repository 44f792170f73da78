"""What a grown checkpoint says of itself: its manifest, its optimizer's step and groups, its byte objects.

Owns: how these follow from the source's. Does not own: the tensors (``growth.view``), the writing (``growth.link``,
``checkpoint.torch_dist.writer``).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from growth_megatron.checkpoint.folder.manifest import GrowthRecord, Manifest, Multipliers, library_version
from growth_megatron.checkpoint.huggingface.safetensors_file import packed
from growth_megatron.checkpoint.origin import Origin, fresh_objects
from growth_megatron.checkpoint.torch_dist.optimizer_groups import regroup
from growth_megatron.growth.rules import GrowthPlan, OptimizerState
from growth_megatron.model.architecture import LAYER_PREFIX

_LAYER_OBJECT = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<name>.*)")
_STACKED_OBJECT = re.compile(
    r"(?P<key>decoder\.layers\..*)/shard_(?P<layer>\d+)(?P<offset>[.\d]*)_\d+(?P<shape>[.\d]*)"
)


def grown_manifest(
    origin: Origin,
    plan: GrowthPlan,
    policy: OptimizerState,
    stage: int | None,
    config_hash: str | None,
    counters: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of ``origin`` grown, complete but for its files.

    Args:
        stage: index of the stage that goes on from it; default: the one after the source's.
        config_hash: of the configuration the growth is part of; default: the source's.
        counters: fields in which the stage that goes on differs from the source, such as its data; default: none.
    """
    source, record = origin.manifest, growth_record(origin, plan, policy)
    return source.model_copy(
        update={
            **(counters or {}),
            "library_version": record.library_version,
            "stage": stage if stage is not None else source.stage + origin.is_of_a_run,
            "stage_step": 0,
            "geometry": plan.target_geometry,
            "files": {},
            "config_hash": config_hash or source.config_hash,
            "multipliers": grown_multipliers(source.multipliers, plan, policy),
            "lineage": (*source.lineage, record),
            "validation_loss": None,
        }
    )


def growth_record(origin: Origin, plan: GrowthPlan, policy: OptimizerState) -> GrowthRecord:
    """What the history of a grown model says of this growth."""
    return GrowthRecord(
        operator=plan.operator,
        options=dict(plan.options),
        layers=plan.layers,
        optimizer_state=policy,
        step=origin.manifest.step,
        source=str(origin.path),
        source_manifest_sha256=origin.identity,
        source_geometry=plan.source_geometry,
        target_geometry=plan.target_geometry,
        seed=plan.seed,
        library_version=library_version(),
        validation_loss_before=origin.manifest.validation_loss,
        maps_sha256=None if plan.maps is None else hashlib.sha256(packed(plan.maps)).hexdigest(),
    )


def grown_multipliers(
    before: Mapping[str, Multipliers], plan: GrowthPlan, policy: OptimizerState
) -> dict[str, Multipliers]:
    """Those of the source times the plan's; a fresh optimizer has none."""
    if policy == "reset":
        return {}
    product = {}
    for key in {**before, **plan.multipliers}:
        old, new = before.get(key, Multipliers()), plan.multipliers.get(key, Multipliers())
        product[key] = Multipliers(
            learning_rate=old.learning_rate * new.learning_rate,
            weight_decay=old.weight_decay * new.weight_decay,
            epsilon=old.epsilon * new.epsilon,
        )
    return product


def grown_common(origin: Origin, manifest: Manifest, policy: OptimizerState) -> dict[str, Any]:
    """Content of ``common.pt``: the optimizer's step kept or zero, its groups those of the grown multipliers."""
    common = origin.common()
    if policy == "reset":
        common = _with_step_zero(common)
    if manifest.multipliers or origin.manifest.multipliers:
        return regroup(common, manifest.multipliers, manifest.geometry)
    return dict(common)


def grown_objects(origin: Origin, plan: GrowthPlan) -> dict[str, bytes]:
    """The byte objects of the grown model, under the names that written checkpoints have."""
    objects, layers = origin.objects(), plan.layers
    if not layers:  # the source has none whose objects could go on
        return {**objects, **fresh_objects(plan.target_geometry)}
    return {_per_layer(name): content for key, content in objects.items() for name in object_targets(key, layers)}


def _per_layer(name: str) -> str:
    """The name of an object where tensors have one key per layer, as written ones do."""
    match = None if _LAYER_OBJECT.fullmatch(name) else _STACKED_OBJECT.fullmatch(name)
    if match is None:
        return name
    return f"{LAYER_PREFIX}{match['layer']}.{match['key'].removeprefix(LAYER_PREFIX)}/shard_0_1"


def object_targets(key: str, layers: Sequence[int]) -> list[str]:
    """Names under which a stored byte object goes on: once for every layer that comes from its layer."""
    if match := _LAYER_OBJECT.fullmatch(key):
        number = int(match["layer"])
        return [f"{LAYER_PREFIX}{layer}.{match['name']}" for layer, of in enumerate(layers) if of == number]
    if match := _STACKED_OBJECT.fullmatch(key):
        number, rest = int(match["layer"]), f"{match['offset']}_{len(layers)}{match['shape']}"
        return [f"{match['key']}/shard_{layer}{rest}" for layer, of in enumerate(layers) if of == number]
    return [key]


def job_fingerprint(manifest: Manifest) -> str:
    """Identity of the growth that leads to ``manifest``: an unfinished attempt at the same one can be gone on with."""
    fields = manifest.model_dump(mode="json", exclude={"files"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _with_step_zero(value: Any) -> Any:
    """A copy of ``common.pt``'s content in which every optimizer parameter group stands before its first step."""
    if isinstance(value, dict):
        copy = {key: _with_step_zero(item) for key, item in value.items()}
        for group in copy.get("param_groups") or ():
            if isinstance(group, dict) and group.get("step") is not None:
                group["step"] = group["step"] * 0  # keeps its type: int, float or tensor
        return copy
    if isinstance(value, list):
        return [_with_step_zero(item) for item in value]
    return value
