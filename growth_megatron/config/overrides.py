"""``a.b=c`` changes of a configuration tree, as given on the command line.

Owns: their syntax and how a dotted path finds its place, stages by name or index.
Does not own: whether a key exists; the schema says so afterwards, with the same words as for a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from growth_megatron.config.document import Node, merge, our_name, parse
from growth_megatron.config.words import did_you_mean
from growth_megatron.errors import ConfigError

PLACE = "command line"


@dataclass(frozen=True)
class Override:
    """One change: where, and the value to be put there."""

    text: str
    keys: tuple[str, ...]
    node: Node


def parse_override(text: str) -> Override:
    """Parse ``a.b.c=VALUE``; VALUE is YAML, so ``null``, ``1e-4`` and ``[1, 2]`` mean what they mean in a file."""
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals:
        raise ConfigError(f"{PLACE}: {text!r} is not an override; write section.key=value, as in training.steps=100")
    parts = path.split(".")
    keys = tuple(our_name(section, key) for section, key in zip(["", *parts], parts, strict=False))
    if not all(keys):
        raise ConfigError(f"{PLACE}: {text!r} has an empty part before or after a dot; write section.key=value")
    if keys[0] == "base":
        raise ConfigError(f"{PLACE}: {path}: files are included by a file only; write base: in it")
    return Override(text, keys, parse(value, PLACE, numbered=False, path=".".join(keys)))


def apply_overrides(root: Node, texts: Sequence[str]) -> tuple[Node, list[Override]]:
    """The tree with all changes made, later ones over earlier ones.

    Raises:
        ConfigError: a malformed override, an unknown stage, an index outside a list; all of them at once.
    """
    faults: list[str] = []
    overrides: list[Override] = []
    for text in texts:
        try:
            override = parse_override(text)
            root = _put(root, override.keys, override.node, "")
            overrides.append(override)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return root, overrides


def _put(node: Node, keys: tuple[str, ...], value: Node, name: str) -> Node:
    """``node`` with ``value`` merged in at ``keys``; ``name`` is the key ``node`` stands under."""
    if not keys:
        return merge(node, value, name)
    head, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        index = _index(node, head, value.path)
        items = list(node.value)
        items[index] = _put(items[index], rest, value, "")
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        raise ConfigError(
            f"{PLACE}: {value.path}: {node.path or 'the file'} is {node.value!r}, which has no keys; set it as a whole"
        )
    stages = node.child("stages")
    if name == "" and head == "stages" and rest and not (stages and stages.value):
        raise ConfigError(
            f"{PLACE}: {value.path}: the file has no stages; its one stage is the top level, "
            f"so write {'.'.join(rest[1:]) or 'section.key'}=..."
        )
    path = f"{node.path}.{head}" if node.path else head
    below = node.child(head) or Node({} if rest else value.value, PLACE, path)
    changed = _put(below, rest, value, head)
    lower = node if node.value is not None else replace(node, value={})
    return merge(lower, replace(node, value={head: changed}), name)


def _index(node: Node, key: str, path: str) -> int:
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
