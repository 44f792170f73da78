"""The configurations of a probe: what each candidate is trained with, and what its stage goes on with.

Owns: how a candidate's sections lie over those of the stage that the checkpoint is of; that the probe is exactly the
beginning of that stage. Does not own: the runs (``commands.probe``), what a configuration may say (``config.schema``).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.origin import Origin
from growth_megatron.commands.train_file import former_run
from growth_megatron.config.document import Node, dump, read
from growth_megatron.config.lines import geometry_changes
from growth_megatron.config.load import LoadedConfig
from growth_megatron.config.messages import STAGE_SECTIONS
from growth_megatron.config.schema import StageConfig
from growth_megatron.config.words import did_you_mean
from growth_megatron.errors import CheckpointError, ConfigError, GrowthError
from growth_megatron.growth.conditions import check_growth
from growth_megatron.growth.configuration import load_config

_NAME = re.compile(r"(?!train$)[A-Za-z_][A-Za-z0-9_-]*")
_SECTIONS = (*STAGE_SECTIONS, "growth")


@dataclass(frozen=True)
class ProbeConfig:
    """One candidate: the YAML of its probe, and the configuration of the whole stage that it is the beginning of."""

    name: str
    probe: str
    loaded: LoadedConfig


def read_candidates(path: Path) -> dict[str, Node]:
    """Each candidate's sections by name; one without any is the model as it is, which shows what growth gives.

    Raises: ConfigError: no YAML mapping of names to stage sections.
    """
    found = read(path).value
    for name, node in found.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{node.place}: {name!r} cannot be a stage's name; use letters, digits, - and _ (not train)"
            )
        sections = {} if node.value is None else node.value
        if not isinstance(sections, dict):
            raise ConfigError(f"{node.place}: {name} must be sections, as {name}: {{growth: {{operator: stack}}, ...}}")
        for key in sections:
            if key not in _SECTIONS:
                hint = did_you_mean(key, _SECTIONS) or f"; allowed: {', '.join(_SECTIONS)}"
                raise ConfigError(f"{sections[key].place}: {name}.{key} is no section of a stage{hint}")
    return {name: node if node.value is not None else Node({}, node.place) for name, node in found.items()}


def probe_config(
    name: str, sections: Node, origin: Origin, steps: int, overrides: Sequence[str], folder: Path
) -> ProbeConfig:
    """The candidate ``name`` as a run in ``folder/NAME`` out of ``origin``, whose stage all else is taken from.

    The first ``steps`` of its stage are the probe: its schedule is the whole stage's, not one that is over by then.

    Raises:
        CheckpointError: the checkpoint is of no run.
        ConfigError, GrowthError: what the candidate asks for cannot be, or not in so few or so many steps.
    """
    content = former_run(origin)
    if content is None:
        raise CheckpointError(
            f"{origin.path} has no configuration with it (config.yaml or train.yaml), so it is not known which data a "
            "probe should train on; name a checkpoint of a run: RUN@STEP"
        )
    content["model"] = _without_derived(content["model"])
    content["parallel"].pop("data_parallel_size", None)
    content["run"]["directory"] = str(folder / name)
    resume = {"resume": str(origin.path.resolve()), "mode": "branch", "data": "same"}
    content["checkpoint"] = {**content.get("checkpoint", {}), **resume}
    content["stages"] = [{"name": name, **sections.plain()}]
    loaded = _loaded(name, dump(content), overrides)
    _check_growth(name, origin, loaded.config.stages[0])
    whole = loaded.config.stages[0].num_steps
    if steps >= whole:
        raise ConfigError(
            f"--steps {steps} is not less than the stage of candidate {name}, which has {whole} steps; give fewer, or "
            f"make the stage longer: --set training.steps={4 * steps}"
        )
    text = dump(_first_steps(loaded.config.model_dump(mode="json", exclude_none=True), steps, whole))
    _loaded(name, text, ())
    return ProbeConfig(name, text, loaded)


def _check_growth(name: str, origin: Origin, stage: StageConfig) -> None:
    if stage.growth is not None:
        try:
            check_growth(origin.geometry, stage.model, stage.growth)
        except GrowthError as error:
            raise GrowthError(f"candidate {name}: {error}") from None
    elif changes := geometry_changes(origin.geometry, stage.model):
        raise ConfigError(
            f"candidate {name} changes the model ({', '.join(changes)}) but has no growth that does so; add one: "
            "growth: {}, or growth: {operator: stack}"
        )


def _without_derived(model: Mapping[str, Any]) -> dict[str, Any]:
    """Without the values that follow from others, so that they do for the candidate as they do in a stage."""
    derived = {
        "num_query_groups": model["num_attention_heads"],
        "head_dim": model["hidden_size"] // model["num_attention_heads"],
        "max_position_embeddings": model["sequence_length"],
    }
    return {key: value for key, value in model.items() if derived.get(key) != value}


def _first_steps(content: dict[str, Any], steps: int, whole: int) -> dict[str, Any]:
    """The configuration of the first ``steps`` of a stage of ``whole``, with the learning rates of that."""
    (stage,) = content["stages"]
    schedule, training = stage["schedule"], stage["training"]
    if schedule["kind"] == "cosine":
        schedule.setdefault("decay_steps", whole)
    elif schedule["kind"] == "wsd":
        decay = schedule.pop("decay_steps", None) or max(1, whole // 10)
        if steps > whole - decay:
            raise ConfigError(
                f"--steps {steps} reaches into the decay of the stage's schedule, which begins after {whole - decay}; "
                f"give at most {whole - decay}"
            )
        schedule["kind"] = "constant"
    if schedule["warmup_steps"] > steps:
        raise ConfigError(
            f"--steps {steps} ends within the warm-up of {schedule['warmup_steps']} steps, where nothing can be told; "
            f"give more, or shorten it for all candidates: --set schedule.warmup_steps={max(1, steps // 10)}"
        )
    stage["training"] = {key: value for key, value in training.items() if key != "tokens"} | {"steps": steps}
    content["logging"] = {"interval_steps": 1}
    evaluation = content["evaluation"]
    content["evaluation"] = {"samples": evaluation["samples"], "interval_steps": max(1, steps // 4)}
    return content


def _loaded(name: str, text: str, overrides: Sequence[str]) -> LoadedConfig:
    """What ``text`` says; a message on it names the candidate, since nobody has seen the text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_config(path, overrides)
        except ConfigError as error:
            place = rf"{re.escape(str(path))}:\d+: (stages\.{name}\.)?"
            raise ConfigError(re.sub(place, f"candidate {name}: ", str(error))) from None
