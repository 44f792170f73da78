"""Whether the losses of two runs may be set side by side, as far as their configurations say.

Owns: which settings decide it, the sentences. Pure. Does not own: the losses (``report.compare``).

A run's last stage is what counts: at its end the loss was reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growth_megatron.config.lines import geometry_changes
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.words import listed

_SHOWN = 8  # settings in a sentence
_TRAINING = ("global_batch_size", "steps", "tokens", "precision")


def differences(name: str, run: RunConfig, other_name: str, other: RunConfig) -> list[str]:
    """Sentences on what makes the losses of ``run`` say less about growth than they seem to; none if nothing does."""
    said = []
    if found := _different(_held_out(run), _held_out(other)):
        said.append(
            f"warning: the held-out text of {name} is not that of {other_name} ({found}): their held-out losses cannot "
            "be compared"
        )
    own, others = run.stages[-1].model, other.stages[-1].model
    sizes = [change for change in geometry_changes(others, own) if not change.startswith(("sequence", "vocabulary"))]
    if sizes:
        said.append(f"note: {name} ends as another model than {other_name}: {listed(sizes)}")
    if found := _different(_settings(run), _settings(other)):
        said.append(f"note: what else the last stages of {name} and {other_name} have different: {found}")
    return said


def _held_out(config: RunConfig) -> dict[str, Any]:
    stage = config.stages[-1]
    data = stage.data
    text: dict[str, Any] = {"data.validation": _paths(data.validation)}
    if not data.validation:
        text = {"data.train": _paths(data.train), "data.validation_fraction": data.validation_fraction}
    return {
        **text,
        "data.tokenizer": data.tokenizer,
        "model.vocab_size": stage.model.vocab_size,
        "model.sequence_length": stage.model.sequence_length,
        "evaluation.samples": config.evaluation.samples,
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    stage = config.stages[-1]
    training = stage.training.model_dump(include=set(_TRAINING))
    optimizer = stage.optimizer.model_dump(exclude={"new_parameters"})  # growth's own
    parts = {"schedule": stage.schedule.model_dump(), "optimizer": optimizer, "training": training}
    flat = {f"{section}.{key}": value for section, values in parts.items() for key, value in values.items()}
    return {**flat, "data.train": _paths(stage.data.train)}


def _paths(entries: Any) -> list[str]:
    return [entry.path if entry.weight is None else f"{entry.path} x {entry.weight:g}" for entry in entries]


def _different(own: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    found = [key for key in dict.fromkeys([*own, *others]) if own.get(key) != others.get(key)]
    return listed([f"{key} {_shown(own.get(key))} against {_shown(others.get(key))}" for key in found], _SHOWN)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(value)
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
