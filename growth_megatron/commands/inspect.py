"""``growth-megatron inspect``: what a checkpoint holds, as data and in words.

Owns: what is said of a checkpoint. Does not own: its reading (``checkpoint.origin``), the table of its tensors
(``commands.tensor_table``), the statistics of one (``commands.tensor_statistics``).

Tensor data are read with ``--tensor`` alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.manifest import GrowthRecord, Manifest
from growth_megatron.checkpoint.folder.sums import summed_beside
from growth_megatron.checkpoint.origin import Origin, find_origin
from growth_megatron.checkpoint.torch_dist.reader import METADATA_NAME
from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.commands.tensor_statistics import render_tensor, tensor_statistics
from growth_megatron.commands.tensor_table import render_table, tensor_table
from growth_megatron.config.lines import compact_layers, describe_options, geometry_changes, layout_line, model_line
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.config.tables import columns
from growth_megatron.config.units import format_bytes, format_count
from growth_megatron.errors import EXIT_OK
from growth_megatron.growth.layers import connection_rate
from growth_megatron.growth.masks import Masks, masked_plan
from growth_megatron.model.architecture import EMBEDDING
from growth_megatron.model.cost import parameter_count


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "inspect",
        "growth-megatron inspect runs/quickstart/latest",
        f"growth-megatron inspect runs/quickstart/latest --tensor {EMBEDDING.name}",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, RUN/latest or a run directory")
    parser.add_argument("--tensor", metavar="KEY", help="statistics of one tensor: its values, chunks and files")
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> int:
    if options.tensor is None:
        description, render = describe_checkpoint(options.checkpoint), render_description
    else:
        description, render = describe_tensor(options.checkpoint, options.tensor), render_tensor
    print(json.dumps(description, indent=1) if options.json else render(description))
    return EXIT_OK


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """All that is known of a checkpoint without reading its tensors, as JSON-able data; sizes in bytes.

    Of a Hugging Face folder that is its geometry, files and tensors.

    Raises:
        CheckpointError: no checkpoint, or one whose manifest or ``.metadata`` cannot be read.
    """
    origin = find_origin(path, metadata_alone=True)
    parameters = parameter_count(origin.geometry)
    files = origin.files()
    return {
        "path": str(origin.path),
        "kind": "checkpoint" if origin.is_of_a_run else "huggingface",
        "geometry": {
            **origin.geometry.model_dump(mode="json"),
            "padded_vocab_size": origin.geometry.padded_vocab_size,
        },
        "parameters": parameters.total,
        "parameters_without_embeddings": parameters.without_embeddings,
        "bytes": sum(files.values()),
        "files": files,
        "tensors": tensor_table(origin.tensors, origin.geometry),
        **(_run_description(origin) if origin.is_of_a_run else {}),
    }


def _run_description(origin: Origin) -> dict[str, Any]:
    manifest = origin.manifest
    counters = ("step", "stage", "stage_step", "consumed_samples", "consumed_tokens", "flops")
    others = ("world_size", "has_optimizer_state", "library_version", "format_version", "config_hash")
    return {
        "problem": origin.problem(),
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in origin.skipped],
        **{name: getattr(manifest, name) for name in (*counters, *others, "data_fingerprint", "validation_loss")},
        "layout": manifest.layout.model_dump(mode="json"),
        "shared_bytes": _shared_bytes(origin.path, manifest),
        "lineage": [record.model_dump(mode="json") for record in manifest.lineage],
        "masks": _masks(manifest),
        "objects": len(origin.linkable.object_keys()) if origin.linkable else 0,
    }


def _masks(manifest: Manifest) -> dict[str, Any] | None:
    """How far the masks of a growth that goes on are open, and the epsilon that they make; None without any."""
    plan = masked_plan(manifest)
    if plan is None:
        return None
    masks = Masks(plan, manifest.stage_step)
    return {"open": masks.gates, "norm_epsilon": masks.norm_epsilon}


def describe_tensor(path: str | Path, key: str) -> dict[str, Any]:
    """Statistics of one tensor of the checkpoint that ``path`` means (``tensor_statistics``), as JSON-able data.

    Raises:
        CheckpointError: no such checkpoint or tensor, or damaged data: its files are summed.
    """
    origin = find_origin(path, metadata_alone=True)
    stored, sums = origin.linkable, origin.manifest.files
    names = [METADATA_NAME, *stored.data_files([key])] if stored and key in stored.keys() else []
    with summed_beside(origin.path, {name: sums[name] for name in names}) as check:
        statistics = tensor_statistics(origin.tensors, key)
        check()
    return {"path": str(origin.path), **statistics}


def render_description(description: dict[str, Any]) -> str:
    """``describe_checkpoint``'s answer as text."""
    d = description
    rows = _huggingface_lines(d) if d["kind"] == "huggingface" else _checkpoint_lines(d)
    return "\n".join([*columns(rows), "", *render_table(d["tensors"], d.get("objects", 0))])


def _huggingface_lines(d: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("folder", f"{d['path']} (Hugging Face)"),
        *_model_lines(d),
        (
            "files",
            f"{len(d['files'])} files, {format_bytes(d['bytes'])}; tensors are shown as megatron-core fuses them",
        ),
    ]


def _model_lines(d: dict[str, Any]) -> list[tuple[str, str]]:
    count, inner = format_count(d["parameters"]), format_count(d["parameters_without_embeddings"])
    return [
        ("model", model_line(ModelConfig.model_validate(_model_fields(d["geometry"])))),
        ("parameters", f"{count} ({inner} without embeddings)"),
    ]


def _checkpoint_lines(d: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("checkpoint", d["path"]),
        ("state", "whole (files and sizes)" if d["problem"] is None else f"DAMAGED: {d['problem']}"),
        *(("passed over", f"{item['path']}: {item['reason']}") for item in d["skipped"]),
        ("progress", f"step {d['step']:,}; step {d['stage_step']:,} of stage {d['stage'] + 1}"),
        (
            "consumed",
            f"{d['consumed_samples']:,} samples, {d['consumed_tokens']:,} tokens, {d['flops']:.3e} FLOPs",
        ),
        *_model_lines(d),
        *_mask_lines(d["masks"]),
        ("saved at", layout_line(ParallelConfig(**d["layout"]), d["world_size"])),
        ("optimizer", "state included" if d["has_optimizer_state"] else "no state"),
        ("files", _files_line(d)),
        ("written by", f"growth_megatron {d['library_version']}, format {d['format_version']}"),
    ]
    for number, record in enumerate(d["lineage"]):
        rows.append(
            ("lineage" if number == 0 else "", growth_line(GrowthRecord.model_validate_json(json.dumps(record))))
        )
    return rows


def _mask_lines(masks: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if masks is not None:
        opened = ", ".join(f"{kind} {gate:.3g}" for kind, gate in masks["open"].items())
        text = f"open so far: {opened}; with them norm epsilon {masks['norm_epsilon']:.4g}; tensors are without them, "
        yield "masks", text + "export-hf folds them in"


def growth_line(record: GrowthRecord) -> str:
    """One growth of a lineage, in one line."""
    changes = ", ".join(geometry_changes(record.source_geometry, record.target_geometry)) or "same geometry"
    how = record.operator + describe_options(record.options, record.seed)
    text = f"step {record.step:,}: {how}: {changes}; optimizer state {record.optimizer_state}, from {record.source}"
    if record.layers and record.layers != tuple(range(record.source_geometry.num_layers)):
        text += f"; layers {compact_layers(record.layers)}, {100 * connection_rate(record.layers):.1f} % connected"
    if record.validation_loss_after is not None:
        before = "unknown" if record.validation_loss_before is None else f"{record.validation_loss_before:.4f}"
        text += f"; validation loss {before} -> {record.validation_loss_after:.4f}"
    return text


def _shared_bytes(path: Path, manifest: Manifest) -> int:
    """Bytes of files that other checkpoints hold by hard links too."""
    present = (path / name for name in manifest.files)
    return sum(file.stat().st_size for file in present if file.exists() and file.stat().st_nlink > 1)


def _files_line(d: dict[str, Any]) -> str:
    shared = f", {format_bytes(d['shared_bytes'])} of them shared with other checkpoints" if d["shared_bytes"] else ""
    return f"{len(d['files'])} files, {format_bytes(d['bytes'])}{shared}"


def _model_fields(geometry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in geometry.items() if name in ModelConfig.model_fields}
