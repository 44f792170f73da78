"""YAML as a tree of nodes that remember where they were written.

Owns: reading a file to nodes, number syntax, merging two trees, writing plain data as YAML.
Does not own: what keys mean (``config.schema``), includes and overrides (``config.load``, ``config.overrides``).

Numbers follow YAML 1.2 with Python's underscores: ``1e-4`` is a float and ``10_000`` an integer; ``yes``, ``on``,
``1:30`` and dates stay text.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import Node as YamlNode

from growth_megatron.config.words import closest
from growth_megatron.errors import ConfigError

LENGTHS = ("steps", "tokens")
"""At most one of them is in force, so the later layer's choice puts out the earlier layer's."""
SECTIONS = frozenset(
    {"run", "model", "parallel", "data", "optimizer", "schedule", "training"}
    | {"checkpoint", "evaluation", "logging", "stages", "growth"}
)
"""An empty one ("optimizer:" with everything under it commented out) is as if it were not there."""

MEGATRON_NAMES = {
    "model": {
        "make_vocab_size_divisible_by": "vocab_multiple", "layernorm_epsilon": "norm_epsilon",
        "rotary_base": "rope_base", "kv_channels": "head_dim", "init_method_std": "init_std",
        "seq_length": "sequence_length",
    },
    "parallel": {
        f"{kind}_model_parallel_size": f"{kind}_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline")
    },
    "training": {"recompute_granularity": "recompute"},
    "optimizer": {"adam_beta1": "beta1", "adam_beta2": "beta2", "adam_eps": "epsilon"},
}  # fmt: skip
"""Names that Megatron-LM has for our keys, by section: either is taken, and ours is written."""

_LARGEST = 20_000  # nodes of a file, aliases written out; a configuration has a few hundred

_TAG = "tag:yaml.org,2002:"
_TEXT = (_TAG + "str", _TAG + "timestamp")
_CONSTRUCTED = tuple(_TAG + kind for kind in ("null", "bool", "int", "float"))


@dataclass(frozen=True)
class Node:
    """A value, the place it was written (``file:line``), and its dotted path as written."""

    value: Any  # dict[str, Node], list[Node], or a scalar
    place: str
    path: str = ""

    def child(self, key: str | int) -> Node | None:
        """The node under ``key`` of a mapping or list, else None."""
        below = dict(enumerate(self.value)) if isinstance(self.value, list) else self.value
        return below.get(key) if isinstance(below, dict) else None

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        below = self.value.values() if isinstance(self.value, dict) else self.value
        for child in below if isinstance(self.value, dict | list) else ():
            yield from child.walk()

    def plain(self) -> Any:
        """The same data as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


class _Builder:
    """Turns ruamel.yaml's nodes into ours, collecting faults instead of stopping at the first."""

    def __init__(self, name: str, numbered: bool):
        self.name = name
        self.numbered = numbered
        self.yaml = YAML(typ="safe", pure=True)
        self.faults: list[str] = []
        self.built = 0

    def place(self, node: YamlNode) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.numbered else self.name

    def fault(self, node: YamlNode, text: str) -> None:
        self.faults.append(f"{self.place(node)}: {text}")

    def build(self, node: YamlNode, path: str) -> Node:
        self.built += 1
        if self.built > _LARGEST:
            raise ConfigError(f"{self.place(node)}: more than {_LARGEST} values, aliases counted; write fewer")
        if isinstance(node, MappingNode):
            return self.mapping(node, path)
        if isinstance(node, SequenceNode):
            items = [self.build(item, f"{path}.{_item_label(item, index)}") for index, item in enumerate(node.value)]
            return Node(items, self.place(node), path)
        value, tag = node.value, str(node.tag)
        try:
            if tag in _CONSTRUCTED:
                value = self.yaml.constructor.construct_object(node)
            elif tag not in _TEXT:
                self.fault(node, f"{path}: tag {tag!r} is not supported here; write a plain value")
        except ValueError:  # thousands of digits, or 0x_
            self.fault(node, f"{path}: {value[:20]!r} cannot be read as a number; write a finite number")
        return Node(value, self.place(node), path)

    def mapping(self, node: MappingNode, path: str) -> Node:
        self.yaml.constructor.flatten_mapping(node)  # now what << refers to stands before the rest
        shared = len(node.merge or ())
        lower, own = self.pairs(node.value[:shared], path, False), self.pairs(node.value[shared:], path, True)
        return merge(Node(lower, self.place(node)), Node(own, self.place(node), path))

    def pairs(self, pairs: list[tuple[YamlNode, YamlNode]], path: str, is_own: bool) -> dict[str, Node]:
        content: dict[str, Node] = {}
        for key_node, value_node in pairs:
            key = our_name(path.rpartition(".")[2], str(key_node.value))
            here = f"{path}.{key}" if path else key
            if not isinstance(key_node, ScalarNode):
                self.fault(key_node, f"{path or 'top level'}: a key must be a plain word; remove the brackets")
            elif key in content and is_own:
                first = content[key].place
                self.fault(key_node, f"{here}: is given twice, first at {first}; keep one of them")
            else:
                content[key] = replace(self.build(value_node, here), place=self.place(key_node))
        return {key: child for key, child in content.items() if child.value is not None or key not in SECTIONS}


def our_name(section: str, key: str) -> str:
    """``key`` of a section, or our key where Megatron-LM calls it that."""
    return MEGATRON_NAMES.get(section, {}).get(key, key)


def _item_label(node: YamlNode, index: int) -> str:
    """How a list item is addressed: a stage by its name, anything else by its index."""
    for key, value in node.value if isinstance(node, MappingNode) else ():
        if key.value == "name" and isinstance(value, ScalarNode) and not value.value.isdigit():
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
    builder = _Builder(name, numbered)
    try:
        root = builder.yaml.compose(text)
        node = builder.build(root, path) if root else Node(None, f"{name}:1" if numbered else name, path)
    except RecursionError:
        raise ConfigError(
            f"{name}: is nested too deeply, or an alias refers to the value it is part of; write values out"
        ) from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"{name}:{mark.line + 1}" if mark and numbered else name
        reason = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise ConfigError(
            f"{place}: not valid YAML: {reason}; check indentation (spaces, no tabs), colons and quotes here"
        ) from None
    if builder.faults:
        raise ConfigError("\n".join(builder.faults))
    return node


def read(path: Path, mentioned: str = "") -> Node:
    """The YAML mapping in ``path``; ConfigError if there is none, ``mentioned`` being the place that names the file."""
    try:
        node = parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{mentioned}{path}: is not UTF-8 text; give a YAML file") from None
    except OSError as error:
        near = closest(path.name, [entry.name for entry in path.parent.glob("*.y*ml")]) if not path.exists() else []
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file"
        raise ConfigError(f"{mentioned}{path}: {(error.strerror or '').lower()}; {hint}") from None
    if node.value is None:
        raise ConfigError(f"{path}:1: the file is empty; it needs sections such as run, model, data and training")
    if not isinstance(node.value, dict):
        raise ConfigError(f"{node.place}: the file must be a mapping of sections (`model:`, `training:`, ...)")
    return node


def merge(lower: Node, upper: Node) -> Node:
    """``upper`` over ``lower``: mappings key by key, anything else replaced."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    content = dict(lower.value)
    if any(key in upper.value and upper.value[key].value is not None for key in LENGTHS):
        content = {key: node for key, node in content.items() if key not in LENGTHS}
    for key, node in upper.value.items():
        content[key] = merge(content[key], node) if key in content else node
    return replace(upper, value=content)


def dump(data: dict[str, Any]) -> str:
    """YAML text of plain data, keys in their order; ``parse`` gives the same data back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 120
    yaml.representer.sort_base_mapping_type_on_output = False
    text = io.StringIO()
    yaml.dump(data, text)
    return text.getvalue()
