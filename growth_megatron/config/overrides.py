"""``a.b=c`` changes of a configuration tree, as given on the command line.

Owns: their syntax and how a dotted path finds its place, stages by name or index.
Does not own: whether a key exists; the schema says so afterwards, with the same words as for a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from growth_megatron.config.document import SECTIONS, Node, merge, our_name, parse
from growth_megatron.config.words import did_you_mean
from growth_megatron.errors import ConfigError

PLACE = "command line"


def parse_override(text: str) -> Node:
    """Value and dotted path of ``a.b.c=VALUE``; VALUE is YAML, as in a file."""
    path, equals, value = text.partition("=")
    parts = path.strip().split(".")
    keys = [our_name(section, key) for section, key in zip(["", *parts], parts, strict=False)]
    if not equals or not all(keys):
        state = "has an empty part before or after a dot" if equals else "is not an override"
        raise ConfigError(f"{PLACE}: {text!r} {state}; write section.key=value, as in training.steps=100")
    if keys[0] == "base":
        raise ConfigError(f"{PLACE}: {path}: files are included by a file only; write base: in it")
    return parse(value, PLACE, numbered=False, path=".".join(keys))


def apply_overrides(root: Node, texts: Sequence[str]) -> tuple[Node, list[Node]]:
    """The tree with all changes made, later ones over earlier ones, and the changes.

    Raises:
        ConfigError: a malformed override, an unknown stage, an index outside a list; all of them at once.
    """
    faults: list[str] = []
    changes: list[Node] = []
    for text in texts:
        try:
            change = parse_override(text)
            keys = change.path.split(".")
            if change.value is not None or keys[-1] not in SECTIONS:
                root = _put(root, keys, change)
                changes.append(change)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return root, changes


def _put(node: Node, keys: Sequence[str], change: Node) -> Node:
    """``node`` with ``change`` merged in at ``keys``."""
    if not keys:
        return merge(node, change)
    head, *rest = keys
    if isinstance(node.value, list):
        index = _index(node, head, change.path)
        return replace(node, value=[_put(i, rest, change) if n == index else i for n, i in enumerate(node.value)])
    if node.value is not None and not isinstance(node.value, dict):
        where = node.path or "the file"
        raise ConfigError(f"{PLACE}: {change.path}: {where} is {node.value!r}, which has no keys; set it as a whole")
    stages = node.child("stages")
    if not node.path and head == "stages" and rest and not (stages and stages.value):
        raise ConfigError(
            f"{PLACE}: {change.path}: the file has no stages; its one stage is the top level, "
            f"so write {'.'.join(rest[1:]) or 'section.key'}=..."
        )
    below = node.child(head) or Node({} if rest else None, PLACE, f"{node.path}.{head}".lstrip("."))
    return merge(replace(node, value=node.value or {}), replace(node, value={head: _put(below, rest, change)}))


def _index(node: Node, key: str, path: str) -> int:
    """Of the entry of a list that ``key`` of the dotted ``path`` means, by its name or its number."""
    labels = [item.path.rsplit(".", 1)[-1] for item in node.value]
    if key in labels:
        return labels.index(key)
    if key.isdigit() and int(key) < len(labels):
        return int(key)
    indices = f"0 to {len(labels) - 1}" if labels else "none, the list is empty"
    named = [label for label in labels if not label.isdigit()]
    allowed = f"names {', '.join(named)}, or indices {indices}" if named else f"indices {indices}"
    raise ConfigError(
        f"{PLACE}: {path}: {node.path} has no entry {key!r}{did_you_mean(key, labels) or ';'} allowed: {allowed}"
    )
