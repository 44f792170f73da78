"""From a YAML file and command-line changes to a checked ``RunConfig``.

Owns: includes (``base:``), the order of precedence, merging the top level into each stage, reporting all errors at
once.
Does not own: syntax (``config.document``, ``config.overrides``), rules (``config.schema``; those of growths are handed
in), words (``config.messages``).

Precedence, later wins: the files of ``base:`` in their order, the file itself, overrides. A stage's own sections win
over the top level, whichever layer either comes from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from growth_megatron.config.document import Node, dump, merge, read
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.messages import STAGE_SECTIONS, Problem, from_validation, locate, render
from growth_megatron.config.overrides import PLACE, Override, apply_overrides
from growth_megatron.config.schema import RunConfig, StageConfig
from growth_megatron.config.words import closest
from growth_megatron.errors import ConfigError

DEFAULT_STAGE = "main"


@dataclass(frozen=True)
class LoadedConfig:
    """A valid configuration and its hash."""

    config: RunConfig
    hash: str

    @property
    def text(self) -> str:
        """Effective YAML: every value of every stage, defaults included."""
        return dump(self.config.model_dump(mode="json", exclude_none=True))


class GrowthRules(Protocol):
    """What the room of growth, which stands above this one, knows of a configuration."""

    def option_problems(self, growth: GrowthConfig) -> list[tuple[str, str]]:
        """(key of ``growth:``, what is wrong) of options alone."""
        ...

    def chain_problems(self, stages: Sequence[StageConfig]) -> list[tuple[str, str]]:
        """(dotted key, what is wrong) of stages that cannot come out of the ones before them."""
        ...


def read_config(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), growth: GrowthRules | None = None
) -> LoadedConfig:
    """Read, merge and validate a run's configuration.

    Args:
        path: YAML file; its ``base:`` names files relative to itself.
        growth: what is asked about growths; without it they are not checked, as suits a configuration of the past.
        overrides: ``a.b=c``, values in YAML; stages by name or index (``stages.0.training.steps=5``).

    Raises:
        ConfigError: everything that is wrong, one ``file:line: section.key: ...`` a line.
    """
    path = Path(path)
    root, changes = apply_overrides(_with_bases(path, _read(path), (path,)), overrides)
    effective = _expand(root)
    config, problems = _validate(effective, growth)
    problems += _without_effect(effective, changes)
    if config is None or problems:
        raise ConfigError(render(problems))
    return LoadedConfig(config, config_hash(config))


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the effective configuration, defaults included; the same however it was written down."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read(path: Path, mentioned: str = "") -> Node:
    """``document.read``, with a hint on the name; ``mentioned`` is the place of the ``base:`` that names the file."""
    if path.is_file():
        return read(path)
    prefix = f"{mentioned}: base: " if mentioned else ""
    if path.is_dir():
        raise ConfigError(f"{prefix}{path}: is a folder; give a YAML file")
    if not path.parent.is_dir():
        raise ConfigError(f"{prefix}{path}: no such file, nor folder {path.parent}; give the path of a YAML file")
    names = sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml"))
    near = [path.parent / name for name in closest(path.name, names)]
    hint = f"did you mean {near[0]}?" if near else "give the path of a YAML file"
    raise ConfigError(f"{prefix}{path}: no such file; {hint}")


def _with_bases(path: Path, node: Node, chain: tuple[Path, ...]) -> Node:
    """``node`` over the files of its ``base:``, recursively."""
    own = replace(node, value={key: child for key, child in node.value.items() if key != "base"})
    base = node.child("base")
    if base is None or base.value is None:
        return own
    entries = base.value if isinstance(base.value, list) else [base]
    merged: Node | None = None
    for entry in entries:
        if not isinstance(entry.value, str):
            raise ConfigError(f"{entry.place}: base: must be a file or a list of files, relative to this file")
        target = Path(os.path.normpath(path.parent / entry.value))
        resolved = [item.resolve() for item in chain]
        if target.resolve() in resolved:
            circle = " -> ".join(map(str, (*chain[resolved.index(target.resolve()) :], target)))
            raise ConfigError(f"{entry.place}: base: files include each other: {circle}; remove one of these includes")
        below = _with_bases(target, _read(target, entry.place), (*chain, target))
        merged = below if merged is None else merge(merged, below)
    return own if merged is None else merge(merged, own)


def _expand(root: Node) -> Node:
    """A tree in the shape of RunConfig: the top level's stage sections merged into each stage."""
    shared = {key: root.value[key] for key in STAGE_SECTIONS if key in root.value}
    content = {
        key: node
        for key, node in root.value.items()
        if key not in STAGE_SECTIONS and (node.value is not None or key not in RunConfig.model_fields)
    }
    stages = content.get("stages")
    if stages is None:
        only = Node({"name": Node(DEFAULT_STAGE, root.place, "name"), **_present(shared)}, root.place)
        content["stages"] = Node([only], root.place)
    elif isinstance(stages.value, list):
        expanded = [_expand_stage(stage, index, shared) for index, stage in enumerate(stages.value)]
        content["stages"] = replace(stages, value=expanded)
    return replace(root, value=content)


def _expand_stage(stage: Node, index: int, shared: dict[str, Node]) -> Node:
    if not isinstance(stage.value, dict):
        return stage
    content = _present(dict(stage.value))
    for key, below in shared.items():
        content[key] = merge(below, content[key], key) if key in content else below
    if index > 0 and "growth" not in content:
        content["growth"] = Node({}, stage.place, f"{stage.path}.growth")
    return replace(stage, value=_present(content))


def _present(content: dict[str, Node]) -> dict[str, Node]:
    """Without sections that were left empty."""
    return {
        key: node for key, node in content.items() if node.value is not None or key not in (*STAGE_SECTIONS, "growth")
    }


def _validate(effective: Node, growth: GrowthRules | None) -> tuple[RunConfig | None, list[Problem]]:
    config: RunConfig | None = None
    problems: list[Problem] = []
    data: dict[str, Any] = effective.plain()
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        problems = from_validation(error.errors(), effective)
    if growth is not None:
        found = list(_option_problems(data, growth))
        found = found or growth.chain_problems(config.stages if config else _valid_stages(data))
        for key, text in found:
            node, path = locate(effective, [int(part) if part.isdigit() else part for part in key.split(".")])
            problems.append(Problem(node.place, path, text))
    return config, problems


def _option_problems(data: dict[str, Any], growth: GrowthRules) -> Iterator[tuple[str, str]]:
    """Of each stage whose ``growth:`` is valid by itself, so that faults elsewhere do not hide them."""
    stages = data["stages"] if isinstance(data["stages"], list) else []
    for index, stage in enumerate(stages):
        try:
            options = GrowthConfig.model_validate(stage["growth"])
        except (ValidationError, TypeError, KeyError):
            continue
        yield from ((f"stages.{index}.growth.{key}", text) for key, text in growth.option_problems(options))


def _valid_stages(data: dict[str, Any]) -> list[StageConfig]:
    """All stages if each is valid by itself, so that faults elsewhere do not hide faults of the chain; else none."""
    try:
        return [StageConfig.model_validate(stage) for stage in data["stages"]]
    except (ValidationError, TypeError):
        return []


def _without_effect(effective: Node, changes: Sequence[Override]) -> list[Problem]:
    """Overrides of the top level that every stage overrules."""
    stages = effective.value["stages"].value
    if not isinstance(stages, list) or not stages:
        return []
    problems = []
    for change in changes:
        if change.keys[0] not in STAGE_SECTIONS or len(change.keys) == 1 or isinstance(change.node.value, dict):
            continue
        path = ".".join(change.keys)
        if not any(_written_at(stage, path) for stage in stages):
            text = f"has no effect, every stage sets it or its alternative; write {stages[0].path}.{path}=..."
            problems.append(Problem(PLACE, path, text))
    return problems


def _written_at(node: Node, path: str) -> bool:
    if node.place == PLACE and node.path == path:
        return True
    below = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    return any(_written_at(child, path) for child in below)
