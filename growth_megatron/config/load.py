"""From a YAML file and command-line changes to a checked ``RunConfig``.

Owns: includes (``base:``), the order of precedence, merging the top level into each stage, reporting all errors at
once.
Does not own: syntax (``config.document``, ``config.overrides``), rules (``config.schema``; those of growths are handed
in), words (``config.messages``).

``from: RUN@STEP`` of the first stage is ``checkpoint.resume`` with ``mode: branch``.

Precedence, later wins: the files of ``base:`` in their order, the file itself, overrides. A stage's own sections win
over the top level, whichever layer either comes from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from growth_megatron.config.document import Node, dump, merge, read
from growth_megatron.config.messages import STAGE_SECTIONS, Problem, from_validation, render
from growth_megatron.config.overrides import PLACE, apply_overrides
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.section import GrowthRules
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
    root, changes = apply_overrides(_with_bases(Path(path)), overrides)
    effective = _expand(root)
    problems = _without_effect(effective, changes)
    try:
        config = RunConfig.model_validate(effective.plain(), context=growth)
    except ValidationError as error:
        problems += from_validation(error.errors(), effective)
    if problems:
        raise ConfigError(render(problems))
    return LoadedConfig(config, config_hash(config))


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the effective configuration, defaults included; the same however it was written down."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _with_bases(path: Path, includers: tuple[Path, ...] = (), mentioned: str = "") -> Node:
    """The tree of ``path`` over the files of its ``base:``, recursively; ``mentioned`` is the place of that line."""
    if any(path.resolve() == includer.resolve() for includer in includers):
        circle = " -> ".join(map(str, (*includers, path)))
        raise ConfigError(f"{mentioned}files include each other: {circle}; remove one of these includes")
    node = read(path, mentioned)
    base = node.value.pop("base", None)
    merged = Node({}, node.place)
    for entry in [] if base is None or base.value is None else base.value if isinstance(base.value, list) else [base]:
        if not isinstance(entry.value, str):
            raise ConfigError(f"{entry.place}: base: must be a file or a list of files, relative to this file")
        target = Path(os.path.normpath(path.parent / entry.value))
        merged = merge(merged, _with_bases(target, (*includers, path), f"{entry.place}: base: "))
    return merge(merged, node)


def _expand(root: Node) -> Node:
    """A tree in the shape of RunConfig: the top level's stage sections merged into each stage."""
    shared = {key: node for key, node in root.value.items() if key in STAGE_SECTIONS}
    content = {key: node for key, node in root.value.items() if key not in STAGE_SECTIONS}
    only = Node({"name": Node(DEFAULT_STAGE, root.place, "name")}, root.place)
    stages = content.get("stages", Node([only], root.place))
    if isinstance(stages.value, list) and stages.value and (source := stages.value[0].child("from")):
        first, branch = stages.value[0], Node("branch", source.place, "checkpoint.mode")
        origin = Node({"resume": source, "mode": branch}, source.place, "checkpoint")
        content["checkpoint"] = merge(origin, content.get("checkpoint", Node({}, source.place, "checkpoint")))
        others = {key: node for key, node in first.value.items() if key != "from"}
        stages = replace(stages, value=[replace(first, value=others), *stages.value[1:]])
    if isinstance(stages.value, list):
        expanded = [_expand_stage(stage, index, shared) for index, stage in enumerate(stages.value)]
        stages = replace(stages, value=expanded)
    return replace(root, value={**content, "stages": stages})


def _expand_stage(stage: Node, index: int, shared: dict[str, Node]) -> Node:
    if not isinstance(stage.value, dict):
        return stage
    lower = dict(shared) if index == 0 else {**shared, "growth": Node({}, stage.place, f"{stage.path}.growth")}
    return merge(Node(lower, stage.place), stage)


def _without_effect(effective: Node, changes: Sequence[Node]) -> list[Problem]:
    """Overrides of the top level that every stage overrules."""
    stages = effective.value["stages"]
    taken = {node.path for node in stages.walk() if node.place == PLACE}
    problems = []
    for change in changes if isinstance(stages.value, list) and stages.value else ():
        section, _, key = change.path.partition(".")
        if section in STAGE_SECTIONS and key and not isinstance(change.value, dict) and change.path not in taken:
            example = f"{stages.value[0].path}.{change.path}=..."
            text = f"has no effect, every stage sets it or its alternative; write {example}"
            problems.append(Problem(PLACE, change.path, text))
    return problems
