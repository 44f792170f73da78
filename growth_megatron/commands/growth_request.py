"""What a growth asked for on the command line or in a GROWTH.yaml means, for a given source.

Owns: the settings' names and values, the file's form, which of the source's sizes stay when others change.
Does not own: what is possible (``growth.conditions``), the plan (``growth.plan``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from growth_megatron.config.document import our_name, parse, read
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.words import did_you_mean
from growth_megatron.errors import GrowthError
from growth_megatron.growth.conditions import GEOMETRY_FIELDS
from growth_megatron.growth.layers import parse_layers
from growth_megatron.growth.operators import option_problems

MODEL_SETTINGS = (*GEOMETRY_FIELDS, "tie_embeddings", "norm_epsilon")
GROWTH_SETTINGS = ("order", "shares", "cancelling_noise", "noise", "ramp", "multipliers")
_GROWTH_KEYS = ("operator", "layers", "optimizer_state", *GROWTH_SETTINGS)
_Section = TypeVar("_Section", GrowthConfig, ModelConfig)
_FILE_KEYS = ("model", "growth", "seed")


@dataclass(frozen=True)
class GrowthRequest:
    """Sizes to set, options of the growth as given, the seed, a file or checkpoint with learned maps."""

    model: Mapping[str, Any]
    growth: GrowthConfig
    seed: int = 0
    maps: Path | None = None

    def resolve(self, source: ModelConfig) -> tuple[ModelConfig, GrowthConfig]:
        """Target geometry and growth for a source.

        What is not set stays, ``head_dim`` too: a wider hidden size alone does not widen the heads. A model with a
        key/value head for every head stays one.

        Raises:
            GrowthError: nothing is asked for, or values that make no model or growth.
        """
        growth, changes = self.growth, dict(self.model)
        if growth.layers is not None and "num_layers" not in changes:
            count = _count(growth.layers, source.num_layers)
            if count < source.num_layers:
                raise GrowthError(
                    f"layers {growth.layers!r} names {count} of the source's {source.num_layers} layers; if fewer are "
                    f"meant, set num_layers={count} too; for a number of layers write --set num_layers=N"
                )
            changes["num_layers"] = count
        if not changes and not growth.noise:
            raise GrowthError("say what is to grow: --set num_layers=24 hidden_size=2048, or --layers 0,1,0,1")
        fields = source.model_dump()
        if source.num_query_groups == source.num_attention_heads:
            fields.pop("num_query_groups")
        target = _validated(ModelConfig, {**fields, **changes}, "model")
        return target, growth


def read_request(
    path: Path | None,
    *,
    settings: Sequence[str],
    operator: str | None,
    layers: str | None,
    optimizer_state: str | None,
    seed: int | None,
    maps: Path | None = None,
) -> GrowthRequest:
    """The request of a GROWTH.yaml (``model:``, ``growth:``, ``seed:``) with the command line's options put over it.

    Raises:
        GrowthError: unreadable, unknown or contradictory; the message names the nearest possible name.
    """
    document = _read_file(path) if path is not None else {}
    model, growth = dict(document.get("model") or {}), dict(document.get("growth") or {})
    given: dict[str, Any] = {}
    for setting in settings:
        key, value = _parse(setting)
        if given.setdefault(key, value) != value:
            raise GrowthError(f"--set gives {key} more than once ({given[key]} and {value}); keep one")
        (model if key in MODEL_SETTINGS else growth)[key] = value
    for key, option in (("operator", operator), ("layers", layers), ("optimizer_state", optimizer_state)):
        if option is not None:
            growth[key] = option
    chosen = seed if seed is not None else document.get("seed", 0)
    if isinstance(chosen, bool) or not isinstance(chosen, int) or chosen < 0:
        raise GrowthError(f"seed is {chosen!r}; allowed: whole numbers from 0")
    config = _validated(GrowthConfig, growth, "growth")
    if problems := option_problems(config):
        raise GrowthError(f"growth: {'; '.join(f'{key}: {text}' for key, text in problems)}")
    return GrowthRequest(model, config, chosen, maps)


def _count(layers: str | Sequence[int], source_layers: int) -> int:
    return len(parse_layers(layers, source_layers) if isinstance(layers, str) else layers)


def _read_file(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = read(path).plain()
    for key, allowed in ((None, _FILE_KEYS), ("model", MODEL_SETTINGS), ("growth", _GROWTH_KEYS)):
        section = document if key is None else document.get(key)
        if section is not None and not isinstance(section, dict):
            raise GrowthError(f"{path}: {key} holds {section!r}; write a mapping of settings")
        for name in section or {}:
            if name not in allowed:
                where = f"{key}.{name}" if key else str(name)
                raise GrowthError(f"{path}: unknown key {where}{_hint(str(name), allowed)}")
    return document


def _parse(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    key = our_name("model", key.strip().removeprefix("model.").removeprefix("growth."))
    if not equals:
        raise GrowthError(f"--set {setting}: not a setting; write key=value, as in num_layers=24")
    known = (*MODEL_SETTINGS, *GROWTH_SETTINGS)
    if key not in known:
        raise GrowthError(f"--set {setting}: cannot set {key}{_hint(key, known)}")
    return key, parse(text, "--set", numbered=False, path=key).plain()


def _hint(name: str, known: Sequence[str]) -> str:
    return (did_you_mean(name.rsplit(".", 1)[-1], known) or ";") + f" allowed: {', '.join(known)}"


def _validated(section: type[_Section], fields: Mapping[str, Any], name: str) -> _Section:
    try:
        return section.model_validate(dict(fields))
    except ValidationError as error:
        texts = []
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ")
            if problem["loc"][:1] == ("layers",):  # a union: pydantic says why it is none of each
                where, message = "layers", "write a list of layers counted from 0, or the paper's notation as text"
            value = fields.get(where)
            shown = f" (here {value!r})" if where in fields and not isinstance(value, dict) else ""
            texts.append(f"{where}: {message}{shown}" if where else message)
        raise GrowthError(f"{name}: {'; '.join(dict.fromkeys(texts))}") from None
