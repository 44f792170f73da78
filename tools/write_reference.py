"""Writes docs/options.md and docs/schema.json: every option of a configuration, for people and for editors.

    python tools/write_reference.py [FOLDER]

Owns: the page and the JSON schema, which a test compares with what this would write. Does not own: the options, whose
names, types, ranges, defaults and descriptions are those of the pydantic models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from growth_megatron.config.document import MEGATRON_NAMES
from growth_megatron.config.messages import STAGE_SECTIONS
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import StageConfig
from growth_megatron.growth.operators import registry

FOLDER = Path(__file__).resolve().parents[1] / "docs"
SHARED = ("run", "checkpoint", "evaluation", "logging")
SECTIONS = (*SHARED[:1], *STAGE_SECTIONS, "growth", *SHARED[1:])
_UNDERSCORED = r"^[0-9][0-9_]*$"


def file_schema() -> dict[str, Any]:
    """JSON schema of a configuration file: a part of a run, since ``base:`` and the command line may hold the rest."""
    schema = RunConfig.model_json_schema()
    found = schema["$defs"]
    stage = found["StageConfig"]["properties"]
    sections = {name: stage[name] for name in (*STAGE_SECTIONS, "growth")}
    source = {
        "type": "string",
        "description": "of a first stage: RUN@STEP or a path, the checkpoint that it begins from",
    }
    found["StageConfig"]["properties"] = {"from": source, **stage}
    properties = {
        "base": {
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
            "description": "files to include, relative to this one; later ones win, this file wins over all",
        },
        **{name: schema["properties"][name] for name in SHARED},
        **sections,
        "stages": {"type": "array", "items": {"$ref": "#/$defs/StageConfig"}},
    }
    found["GrowthConfig"]["properties"]["operator"]["examples"] = list(registry())
    for section, names in MEGATRON_NAMES.items():
        known = found[stage[section]["$ref"].rsplit("/", 1)[1]]["properties"]
        for theirs, ours in names.items():
            known[theirs] = {**known[ours], "description": f"Megatron-LM's name of {ours}"}
    for name in SECTIONS:  # empty, with everything under it commented out, it is as if it were not there
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    whole = {"type": "object", "additionalProperties": False, "properties": properties, "$defs": found}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "growth_megatron: a run, or a part of one",
        **_relaxed(whole),
    }


def _relaxed(node: Any) -> Any:
    """Nothing is required of a file alone, numbers may have underscores, no default is said where there is none."""
    if isinstance(node, list):
        return [_relaxed(entry) for entry in node]
    if not isinstance(node, dict):
        return node
    kept = {key: _relaxed(value) for key, value in node.items() if key not in ("required", "default")}
    if node.get("type") in ("integer", "number"):
        kept |= {"type": [node["type"], "string"], "pattern": _UNDERSCORED}
    if "default" in node and not isinstance(node["default"], dict | list) and node["default"] is not None:
        kept["default"] = node["default"]
    return kept


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, directly, optionally or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_model_of(part) for part in getattr(annotation, "__args__", ()))
    return next((model for model in inner if model is not None), None)


def _type(schema: Mapping[str, Any]) -> str:
    """A field's type in a word or two, from its JSON schema."""
    if choices := schema.get("enum"):
        return ", ".join(f"`{choice}`" for choice in choices)
    if "const" in schema:
        return f"`{schema['const']}`"
    if options := schema.get("anyOf"):
        return " or ".join(_type(option) for option in options if option.get("type") != "null")
    if "$ref" in schema:
        return "section"
    kind = schema.get("type")
    if kind == "array":
        if items := schema.get("prefixItems"):
            return f"[{', '.join(_type(item) for item in items)}]"
        return f"list of {_type(schema['items'])}"
    return f"{ {'boolean': 'true, false', 'string': 'text'}.get(str(kind), str(kind)) }{_range(schema)}"


def _range(schema: Mapping[str, Any]) -> str:
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {schema[name]}" for name, sign in bounds.items() if name in schema]
    return f" {', '.join(said)}" if said else ""


def _default(field: FieldInfo, values: BaseModel | None, name: str) -> str:
    """What leaving the key out means; ``values`` is the section's own default, where it has one."""
    value = getattr(values, name) if values is not None else field.default
    if values is None and field.is_required():
        return "required"
    follows = value == 0 and "default:" in (field.description or "")
    if value is None or value == () or isinstance(value, BaseModel) or follows:
        return ""
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`".replace('"', "")


def _rows(model: type[BaseModel], prefix: str = "", values: BaseModel | None = None) -> Iterator[str]:
    """Table rows of a section and those within it."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        inner, place = _model_of(field.annotation), f"{prefix}{name}"
        is_list = "tuple" in str(field.annotation)
        kind = "list of" if inner and is_list else "" if inner else _type(schema["properties"][name])
        about = field.description or (inner.__doc__ if inner else "") or ""
        about = " ".join(about.replace("|", "\\|").replace("``", "`").split())
        yield f"| `{place}` | {kind} | {_default(field, values, name)} | {about} |"
        if inner:
            own = field.default if isinstance(field.default, BaseModel) else None
            yield from _rows(inner, f"{place}{'[]' if is_list else ''}.", own)


def options_page() -> str:
    """The Markdown page of all options."""
    parts = [
        "# Options",
        "Every key of a [configuration](configuration.md), made from the code by `python tools/write_reference.py`. "
        "Where nothing\nstands as default, leaving the key out means what the last column says, or none.",
    ]
    fields = {**RunConfig.model_fields, **StageConfig.model_fields}
    for section in SECTIONS:
        model = _model_of(fields[section].annotation)
        assert model is not None
        assert model.__doc__
        rows = "\n".join(_rows(model))
        about = model.__doc__.strip().replace("``", "`")
        parts.append(f"## {section}\n\n{about}\n\n| key | type | default | |\n|---|---|---|---|\n{rows}")
    names = "\n".join(
        f"| `{section}.{theirs}` | `{section}.{ours}` |"
        for section, pairs in MEGATRON_NAMES.items()
        for theirs, ours in pairs.items()
    )
    parts.append(f"## Megatron-LM's names\n\nTaken as ours.\n\n| Megatron-LM | here |\n|---|---|\n{names}")
    return "\n\n".join(parts) + "\n"


def reference() -> dict[str, str]:
    """File name to content."""
    return {"options.md": options_page(), "schema.json": json.dumps(file_schema(), indent=1) + "\n"}


def main(folder: Path) -> None:
    for name, content in reference().items():
        (folder / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
