"""What a user reads when a configuration is wrong.

Owns: turning validation errors into ``file:line: section.key: what is wrong, what is allowed, what to do``.
Does not own: the rules (``config.schema``, ``config.checks``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from growth_megatron.config.document import Node
from growth_megatron.config.schema import RunConfig, StageConfig
from growth_megatron.config.words import closest

STAGE_SECTIONS = ("model", "parallel", "optimizer", "schedule", "training")

# Names of other tools that no spelling distance would find.
_SYNONYMS = {
    "lr": "learning_rate", "max_lr": "learning_rate", "min_lr": "min_learning_rate", "eps": "epsilon",
    "max_grad_norm": "clip_grad", "grad_clip": "clip_grad",
    "dim": "hidden_size", "d_model": "hidden_size", "n_embd": "hidden_size", "n_layers": "num_layers",
    "n_layer": "num_layers", "num_hidden_layers": "num_layers", "n_heads": "num_attention_heads",
    "n_head": "num_attention_heads", "num_key_value_heads": "num_query_groups", "n_kv_heads": "num_query_groups",
    "intermediate_size": "ffn_hidden_size", "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rope_base",
    "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std",
    "seq_len": "sequence_length", "max_position_embeddings": "sequence_length",
    "max_steps": "steps", "train_iters": "steps", "batch_size": "global_batch_size", "dtype": "precision",
    "tp": "tensor_parallel_size",
    "pp": "pipeline_parallel_size",
    "dp": "data_parallel_size",
    "save_interval": "interval_steps", "log_interval": "interval_steps", "eval_interval": "interval_steps",
}  # fmt: skip


_EXPONENTS = {"k": 3, "m": 6, "b": 9, "t": 12}


@dataclass(frozen=True, order=True)
class Problem:
    """One line of a ConfigError."""

    place: str
    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.path}: {self.text}" if self.path else f"{self.place}: {self.text}"


def render(problems: Iterable[Problem]) -> str:
    """All problems, each once, in the order of the files."""

    def position(problem: Problem) -> tuple[str, int, str]:
        name, _, line = problem.place.rpartition(":")
        return (name, int(line), problem.path) if line.isdigit() else (problem.place, 0, problem.path)

    return "\n".join(str(problem) for problem in sorted(dict.fromkeys(problems), key=position))


def locate(root: Node, keys: Sequence[str | int]) -> tuple[Node, str]:
    """Nearest node on the way along ``keys``, and the dotted path that names the key to the user."""
    node = root
    for position, key in enumerate(keys):
        below = node.child(key)
        if below is None:
            if not isinstance(node.value, dict):
                return node, node.path  # the rest of the keys are members of a union, not of the file
            if position == 2 and keys[0] == "stages" and key in STAGE_SECTIONS:
                return root, ".".join(map(str, keys[2:]))
            return node, ".".join([node.path, *map(str, keys[position:])]).strip(".")
        node = below
    return node, node.path


def from_validation(errors: Sequence[ErrorDetails], root: Node) -> list[Problem]:
    """Problems of pydantic's errors over the tree ``root``, which has the shape of a RunConfig."""
    problems: list[Problem] = []
    excused: set[str] = set()  # names that a misspelt key was meant to give
    for error in (e for e in errors if e["type"] == "extra_forbidden"):
        node, path = locate(root, error["loc"])
        text, meant = _unknown(str(error["loc"][-1]), error["loc"][:-1])
        excused.add(f"{path.rpartition('.')[0]}/{meant}")
        problems.append(Problem(node.place, path, text))
    for error in (e for e in errors if e["type"] != "extra_forbidden"):
        keys = error["loc"]
        node, path = locate(root, keys)
        if error["type"] == "too_short" and node.value:
            continue  # pydantic counts valid entries; the invalid ones have their own error
        if error["type"] == "combination":
            problems += _combination(root, keys, error["ctx"]["problems"])
        elif error["type"] != "missing":
            problems.append(Problem(node.place, path, _bad_value(node, error)))
        elif f"{path.rpartition('.')[0]}/{keys[-1]}" not in excused:
            problems.append(Problem(node.place, path, f"is required and missing; add it{_hint(keys)}"))
    return problems


def _combination(root: Node, keys: tuple[str | int, ...], entries: Sequence[tuple[str, str]]) -> list[Problem]:
    """Problems that a validator of several keys reports, each at the key it names."""
    problems = []
    for name, text in entries:
        full = [*keys, *(int(key) if key.isdigit() else key for key in name.split(".") if key)]
        node, path = locate(root, full)
        problems.append(Problem(node.place, path, text))
    return problems


def suggest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that ``word`` was probably meant to be."""
    allowed = list(allowed)
    if _SYNONYMS.get(word.lower()) in allowed:
        return _SYNONYMS[word.lower()]
    return next(iter(closest(word, allowed)), None)


def _unknown(key: str, parent: tuple[str | int, ...]) -> tuple[str, str | None]:
    """Wording for an unknown key of ``parent``, and the key of ``parent`` that was probably meant."""
    section = _section(parent)
    names = [*(section or RunConfig).model_fields, *(() if parent else ("base", *STAGE_SECTIONS))]
    if not parent and key == "growth":
        return "belongs to a stage; write it in an entry of stages, from the second on", None
    if key in RunConfig.model_fields and len(parent) == 2 and parent[0] == "stages":
        return f"is shared by all stages; move it to the top level (a stage may have {', '.join(names)})", None
    meant = suggest(key, names)
    if homes := _homes().get(key):
        hint = f", or write {meant} if that was meant" if meant else ""
        return f"unknown key here; it belongs to {' or '.join(homes)}, move it there{hint}", meant
    elsewhere = suggest(key, _homes())
    if meant is None and elsewhere is not None:
        places = " or ".join(f"{home}.{elsewhere}" for home in _homes()[elsewhere])
        return f"unknown key; did you mean {places}? Correct or remove it", None
    hint = f"did you mean {meant}? " if meant else ""
    return f"unknown key; {hint}allowed: {', '.join(names)}; correct or remove it", meant


def _bad_value(node: Node, error: ErrorDetails) -> str:
    """The value, pydantic's words, what the field is about, and the slip that was probably made."""
    value = node.plain()
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    shown = "empty" if value is None or value == [] else str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, dict | list) and len(shown) > 60:
        shown = "a mapping" if isinstance(value, dict) else "a list"
    if error["type"] == "model_type" and (section := _section(error["loc"])):
        return f"is {shown}; should be a mapping of keys ({', '.join(section.model_fields)})"
    should = error["msg"].removeprefix("Input ").replace("tuple", "list")
    text = f"is {shown}; {should[0].lower()}{should[1:]}{_hint(error['loc'])}"
    if isinstance(value, str):
        meant = suggest(value, re.findall(r"'([^']+)'", should) if error["type"] == "literal_error" else ())
        number = re.fullmatch(r"([0-9.]+) ?([kmbt])", value.lower())
        if meant:
            text += f"; did you mean {meant}?"
        elif number and error["type"] in ("int_parsing", "float_parsing"):
            text += f"; write {number[1]}e{_EXPONENTS[number[2]]}"
    if error["type"] == "string_type" and isinstance(value, int | float):
        text += f"; put it in quotes: '{node.raw or value}'"
    return text


def _hint(keys: tuple[str | int, ...]) -> str:
    """In brackets: what a field is about, or what a section needs at least."""
    if section := _section(keys):
        needed = [name for name, field in section.model_fields.items() if field.is_required()]
        return f" (a section with at least {', '.join(needed)})" if needed else ""
    for length in range(len(keys), 0, -1):  # what follows a field's name is a member of its union
        owner = _section(keys[: length - 1]) if length > 1 else RunConfig
        field = owner.model_fields.get(str(keys[length - 1])) if owner else None
        if field is not None:
            return f" ({field.description})" if field.description else ""
    return ""


def _section(keys: Sequence[str | int]) -> type[BaseModel] | None:
    """The section of the schema at ``keys``; None for a field that is no section."""
    here: type[BaseModel] | None = RunConfig
    for key in keys:
        if isinstance(key, str) and here is not None:
            field = here.model_fields.get(key)
            here = None if field is None else next(_sections_in(field.annotation), None)
    return here


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


@cache
def _homes() -> dict[str, list[str]]:
    """Sections in which each key lives."""
    homes: dict[str, list[str]] = {}
    for name in (*RunConfig.model_fields, *StageConfig.model_fields):
        section = _section((name,)) or _section(("stages", 0, name))
        for key in section.model_fields if section and section is not StageConfig else ():
            homes.setdefault(key, []).append("growth of a stage" if name == "growth" else name)
    return homes
