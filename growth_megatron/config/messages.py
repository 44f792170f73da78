"""What a user reads when a configuration is wrong.

Owns: turning validation errors into ``file:line: section.key: what is wrong, what is allowed, what to do``.
Does not own: the rules (``config.schema``, ``config.checks``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from growth_megatron.config.document import Node
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import StageConfig
from growth_megatron.config.words import closest

STAGE_SECTIONS = ("model", "parallel", "optimizer", "schedule", "training", "data")

_SYNONYMS = {
    other: ours
    for ours, others in {
        "learning_rate": "lr max_lr", "min_learning_rate": "min_lr", "epsilon": "eps", "steps": "max_steps train_iters",
        "clip_grad": "max_grad_norm grad_clip", "hidden_size": "dim d_model n_embd",
        "num_layers": "n_layers n_layer num_hidden_layers", "num_attention_heads": "n_heads n_head",
        "num_query_groups": "num_key_value_heads n_kv_heads", "ffn_hidden_size": "intermediate_size",
        "norm_epsilon": "rms_norm_eps", "rope_base": "rope_theta", "tie_embeddings": "tie_word_embeddings",
        "init_std": "initializer_range", "sequence_length": "seq_len",
        "global_batch_size": "batch_size", "precision": "dtype", "tensor_parallel_size": "tp",
        "pipeline_parallel_size": "pp", "data_parallel_size": "dp",
        "interval_steps": "save_interval log_interval eval_interval",
    }.items()
    for other in others.split()
}  # fmt: skip
"""Names of other tools that no spelling distance would find."""

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
    for error in sorted(errors, key=lambda error: error["type"] != "extra_forbidden"):
        keys, kind = error["loc"], error["type"]
        node, path = locate(root, keys)
        section = path.rpartition(".")[0]
        if kind == "extra_forbidden":
            text, meant = _unknown(str(keys[-1]), keys[:-1])
            excused.add(f"{section}/{meant}")
            problems.append(Problem(node.place, path, text))
        elif kind == "combination":  # of several keys, each with its own problem
            for name, text in error["ctx"]["problems"]:
                below = [int(key) if key.isdigit() else key for key in name.split(".") if key]
                node, path = locate(root, [*keys, *below])
                problems.append(Problem(node.place, path, text))
        elif kind == "missing":
            if f"{section}/{keys[-1]}" not in excused:
                problems.append(Problem(node.place, path, f"is required and missing; add it{_hint(keys)}"))
        elif kind != "too_short" or not node.value:  # pydantic counts valid entries; the others have their own error
            problems.append(Problem(node.place, path, _bad_value(node, error)))
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
        hint = f"did you mean {meant}? " if meant else ""
        home = f"{key} belongs to {' or '.join(homes)}, move it there if that was meant"
        return f"unknown key here; {hint}allowed: {', '.join(names)}; {home}, or remove it", meant
    elsewhere = suggest(key, _homes())
    if meant is None and elsewhere is not None:
        places = " or ".join(f"{home}.{elsewhere}" for home in _homes()[elsewhere])
        return f"unknown key; did you mean {places}? Correct or remove it", None
    hint = f"did you mean {meant}? " if meant else ""
    return f"unknown key; {hint}allowed: {', '.join(names)}; correct or remove it", meant


def _bad_value(node: Node, error: ErrorDetails) -> str:
    """The value, pydantic's words, what the field is about, and the slip that was probably made."""
    value, kind = node.plain(), error["type"]
    if kind == "value_error":
        return str(error["ctx"]["error"])
    shown = "empty" if value is None or value == [] else str(value).lower() if isinstance(value, bool) else repr(value)
    if isinstance(value, dict | list) and len(shown) > 60:
        shown = "a mapping" if isinstance(value, dict) else "a list"
    if kind == "model_type" and (section := _section(error["loc"])):
        return f"is {shown}; should be a mapping of keys ({', '.join(section.model_fields)})"
    should = error["msg"].removeprefix("Input ").replace("tuple", "list")
    text = f"is {shown}; {should[0].lower()}{should[1:]}{_hint(error['loc'])}"
    if kind == "string_type" and isinstance(value, int | float):
        return f"{text}; put it in quotes: '{value}'"
    meant = suggest(str(value), re.findall(r"'([^']+)'", should) if kind == "literal_error" else ())
    number = re.fullmatch(r"([0-9.]+) ?([kmbt])", str(value).lower())
    if number and kind in ("int_parsing", "float_parsing"):
        return f"{text}; write {number[1]}e{_EXPONENTS[number[2]]}"
    return f"{text}; did you mean {meant}?" if meant else text


def _hint(keys: tuple[str | int, ...]) -> str:
    """In brackets: what a field is about, or what a section needs at least."""
    if section := _section(keys):
        needed = [name for name, field in section.model_fields.items() if field.is_required()]
        return f" (a section with at least {', '.join(needed)})" if needed else ""
    while keys:  # what follows a field's name is a member of its union
        *above, name = keys
        owner = _section(above)
        if field := owner.model_fields.get(str(name)) if owner else None:
            return f" ({field.description})" if field.description else ""
        keys = tuple(above)
    return ""


def _section(keys: Sequence[str | int]) -> type[BaseModel] | None:
    """The section of the schema at ``keys``; None for a field that is no section."""
    here: type[BaseModel] | None = RunConfig
    for key in keys:
        if isinstance(key, str) and here is not None:
            field = here.model_fields.get(key)
            here = None if field is None else _section_in(field.annotation)
    return here


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


@cache
def _homes() -> dict[str, list[str]]:
    """Sections in which each key lives."""
    homes: dict[str, list[str]] = {}
    for name in (*RunConfig.model_fields, *StageConfig.model_fields):
        section = _section((name,)) or _section(("stages", 0, name))
        for key in section.model_fields if section and section is not StageConfig else ():
            homes.setdefault(key, []).append("growth of a stage" if name == "growth" else name)
    return homes
