"""YAML as a tree of nodes that remember where they were written.

Owns: reading a file to nodes, number syntax, merging two trees, writing plain data as YAML.
Does not own: what keys mean (``config.schema``), includes and overrides (``config.load``, ``config.overrides``).

Numbers follow YAML 1.2 with Python's underscores: ``1e-4`` is a float and ``10_000`` an integer; ``yes``, ``on`` and
``1:30`` stay text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from growth_megatron.errors import ConfigError

# Of each group at most one key is in force, so the later layer's choice puts out the earlier layer's.
EXCLUSIVE_KEYS = {"training": ({"steps", "tokens"},)}
# An empty section ("optimizer:" with everything under it commented out) changes nothing.
SECTIONS = frozenset(
    {"run", "model", "parallel", "data", "optimizer", "schedule", "training"}
    | {"checkpoint", "evaluation", "logging", "stages", "growth"}
)

MEGATRON_NAMES = {
    "model": {
        "make_vocab_size_divisible_by": "vocab_multiple",
        "layernorm_epsilon": "norm_epsilon",
        "rotary_base": "rope_base",
        "kv_channels": "head_dim",
        "init_method_std": "init_std",
        "seq_length": "sequence_length",
    },
    "parallel": {
        "tensor_model_parallel_size": "tensor_parallel_size",
        "pipeline_model_parallel_size": "pipeline_parallel_size",
        "virtual_pipeline_model_parallel_size": "virtual_pipeline_parallel_size",
    },
    "training": {"recompute_granularity": "recompute"},
    "optimizer": {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_eps": "epsilon"},
}
"""Names that Megatron-LM has for our keys, by section: either is taken, and ours is written."""

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]{0,99}")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass(frozen=True)
class Node:
    """A value, the place it was written (``file:line``), and its dotted path as written."""

    value: Any  # dict[str, Node], list[Node], or a scalar
    place: str
    path: str = ""
    raw: str | None = None  # a plain scalar as written

    def child(self, key: str | int) -> Node | None:
        """The node under ``key`` of a mapping or list, else None."""
        if isinstance(self.value, dict):
            found: Node | None = self.value.get(str(key))
            return found
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            item: Node = self.value[key]
            return item
        return None

    def plain(self) -> Any:
        """The same data as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves plain scalars as text; ``_scalar`` gives them their type."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return "tag:yaml.org,2002:str"
        return str(super().resolve(kind, value, implicit))  # type: ignore[no-untyped-call]


def _scalar(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("", "~", "null"):
        return None
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in _SPECIAL:
        return float(_SPECIAL[lowered])
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    if _HEXADECIMAL.fullmatch(text):
        return int(text.replace("_", ""), 16)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


class _Builder:
    """Turns PyYAML's nodes into ours, collecting faults instead of stopping at the first."""

    def __init__(self, name: str, numbered: bool):
        self.name = name
        self.numbered = numbered
        self.faults: list[str] = []
        self.open: set[int] = set()

    def place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.numbered else self.name

    def fault(self, node: yaml.Node, text: str) -> None:
        self.faults.append(f"{self.place(node)}: {text}")

    def build(self, node: yaml.Node, path: str) -> Node:
        if id(node) in self.open:
            self.fault(node, f"{path}: an alias refers to the value it is part of; write the value out")
            return Node(None, self.place(node), path)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return self.sequence(node, path)
            assert isinstance(node, yaml.ScalarNode)
            return self.scalar(node, path)
        finally:
            self.open.discard(id(node))

    def scalar(self, node: yaml.ScalarNode, path: str) -> Node:
        plain = node.style is None and node.tag == "tag:yaml.org,2002:str"
        if not node.tag.startswith("tag:yaml.org,2002:") or (not plain and not node.tag.endswith(":str")):
            self.fault(node, f"{path}: tag {node.tag!r} is not supported; write a plain value")
        return Node(_scalar(node.value) if plain else node.value, self.place(node), path, node.value if plain else None)

    def sequence(self, node: yaml.SequenceNode, path: str) -> Node:
        items = []
        for index, item in enumerate(node.value):
            items.append(self.build(item, f"{path}.{_item_label(item, index)}"))
        return Node(items, self.place(node), path)

    def mapping(self, node: yaml.MappingNode, path: str) -> Node:
        content: dict[str, Node] = {}
        shared: list[Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fault(key_node, f"{path or 'top level'}: a key must be a plain word; remove the brackets")
                continue
            key = our_name(path.rpartition(".")[2], str(key_node.value))
            here = f"{path}.{key}" if path else key
            if key == "<<" and key_node.style is None:
                shared += self.shared(value_node, path)
                continue
            if key in content:
                first = content[key].place
                self.fault(key_node, f"{here}: is given twice, first at {first}; keep one of them")
                continue
            content[key] = replace(self.build(value_node, here), place=self.place(key_node))
        result = Node(content, self.place(node), path)
        for lower in shared:
            result = merge(lower, result)
        return result

    def shared(self, node: yaml.Node, path: str) -> list[Node]:
        """Mappings of a ``<<`` key."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        built = [self.build(item, path) for item in nodes]
        if any(not isinstance(item.value, dict) for item in built):
            self.fault(node, f"{path}.<<: must refer to a mapping (an anchor like *name)")
            return []
        return built


def our_name(section: str, key: str) -> str:
    """``key`` of a section, or our key where Megatron-LM calls it that."""
    return MEGATRON_NAMES.get(section, {}).get(key, key)


def _item_label(node: yaml.Node, index: int) -> str:
    """How a list item is addressed: a stage by its name, anything else by its index."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == "name" and isinstance(value, yaml.ScalarNode) and not value.value.isdigit():
                return str(value.value)
    return str(index)


def parse(text: str, name: str, *, numbered: bool = True, path: str = "") -> Node:
    """Parse one YAML document.

    Args:
        name: the file, as messages shall call it.
        numbered: whether places carry line numbers (not on the command line).
        path: dotted path of the document's root.

    Raises:
        ConfigError: invalid YAML, duplicate keys, tags; all of them but the first kind at once.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark and numbered else name
        reason = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(
            f"{place}: not valid YAML: {reason}; check indentation (spaces, no tabs), colons and quotes here"
        ) from None
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply; a configuration has a few levels only") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}; save it as plain text") from None
    if root is None:
        return Node(None, f"{name}:1" if numbered else name, path)
    builder = _Builder(name, numbered)
    node = builder.build(root, path)
    if builder.faults:
        raise ConfigError("\n".join(builder.faults))
    return node


def read(path: Path) -> Node:
    """The YAML mapping in ``path``; ConfigError if it is not readable or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    node = parse(text, str(path))
    if node.value is None:
        raise ConfigError(f"{path}:1: the file is empty; it needs sections such as run, model, data and training")
    if not isinstance(node.value, dict):
        raise ConfigError(f"{node.place}: the file must be a mapping of sections (`model:`, `training:`, ...)")
    return node


def merge(lower: Node, upper: Node, name: str = "") -> Node:
    """``upper`` over ``lower``: mappings key by key, anything else replaced; ``name`` is the key they are under."""
    if upper.value is None and isinstance(lower.value, dict) and name in SECTIONS:
        return lower
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    content = dict(lower.value)
    for group in EXCLUSIVE_KEYS.get(name, ()):
        given = {key for key in group if key in upper.value and upper.value[key].value is not None}
        if given:
            for key in group - given:
                content.pop(key, None)
    for key, node in upper.value.items():
        content[key] = merge(content[key], node, key) if key in content else node
    return replace(upper, value=content)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which ``parse`` would take for a number, as YAML 1.1 does not."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if _scalar(text) == text else '"')


_Dumper.add_representer(str, _represent_text)


def dump(data: dict[str, Any]) -> str:
    """YAML text of plain data, keys in their order; ``parse`` gives the same data back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
