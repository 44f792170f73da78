"""What a checkpoint holds, and whether it is whole, in words for people and data for scripts.

Owns: what ``inspect`` and ``verify`` say, and which checkpoint a path given on a command line means.
Does not own: the manifest and its validation (``checkpoint.manifest``), reading tensors (``checkpoint.source``).

A path may be a checkpoint, a link to one (``RUN/latest``), a run directory or its ``checkpoints`` folder; of a run the
newest valid checkpoint is meant. Nothing here reads tensor data, except ``verify --full``, which reads all files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from growth_megatron.checkpoint.commit import TEMPORARY_PREFIX
from growth_megatron.checkpoint.manifest import GrowthRecord, Manifest, read_manifest, validate_checkpoint
from growth_megatron.checkpoint.run_directory import CheckpointName, RunDirectory, Skipped
from growth_megatron.checkpoint.source import DistCheckpoint, is_stacked
from growth_megatron.config.cost import parameter_count
from growth_megatron.config.layers import connection_rate
from growth_megatron.config.render import format_bytes, format_count
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.errors import CheckpointError, NothingValidError
from growth_megatron.model.geometry import LAYER_PREFIX, tensor_shapes

_LAYER_NUMBER = re.compile(rf"{re.escape(LAYER_PREFIX)}\d+\.")
_ANY_LAYER = f"{LAYER_PREFIX}*."


@dataclass(frozen=True)
class Located:
    """The checkpoint a path stands for, and the newer ones of its run that were passed over."""

    path: Path
    skipped: tuple[Skipped, ...] = ()


def locate_checkpoint(path: Path) -> Located:
    """The checkpoint that ``path`` means; a link is followed, so that the answer stays true when the link moves on.

    Raises:
        CheckpointError: there is nothing, or nothing that could be a checkpoint; the message lists what is near.
        NothingValidError: a run whose checkpoints are all damaged.
    """
    path = _existing(path)
    run = _run_of(path)
    if run is None:
        return Located(path)
    newest, skipped = run.newest_valid()
    if newest is None:
        raise _none_valid(run, skipped)
    return Located(newest, skipped)


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """All that is known of a checkpoint without reading its tensors, as JSON-able data; sizes in bytes.

    Raises:
        CheckpointError: no checkpoint, or one whose manifest or ``.metadata`` cannot be read.
    """
    located = locate_checkpoint(path)
    manifest = _manifest_of(located.path)
    stored = DistCheckpoint(located.path)
    problem = validate_checkpoint(located.path)
    counters = ("step", "stage", "stage_step", "consumed_samples", "consumed_tokens", "flops")
    parameters = parameter_count(manifest.geometry)
    return {
        "path": str(located.path),
        "problem": problem,
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in located.skipped],
        **{name: getattr(manifest, name) for name in counters},
        "geometry": {
            **manifest.geometry.model_dump(mode="json"),
            "num_query_groups": manifest.geometry.query_groups,
            "head_dim": manifest.geometry.kv_channels,
            "padded_vocab_size": manifest.geometry.padded_vocab_size,
        },
        "parameters": parameters.total,
        "parameters_without_embeddings": parameters.without_embeddings,
        "layout": manifest.layout.model_dump(mode="json"),
        "world_size": manifest.world_size,
        "has_optimizer_state": manifest.has_optimizer_state,
        "library_version": manifest.library_version,
        "format_version": manifest.format_version,
        "config_hash": manifest.config_hash,
        "data_fingerprint": manifest.data_fingerprint,
        "bytes": manifest.total_bytes,
        "shared_bytes": _shared_bytes(located.path, manifest),
        "files": {name: entry.size_bytes for name, entry in manifest.files.items()},
        "lineage": [record.model_dump(mode="json") for record in manifest.lineage],
        "tensors": _tensor_table(stored, manifest.geometry),
        "objects": len(stored.object_keys()),
    }


def render_description(description: dict[str, Any]) -> str:
    """``describe_checkpoint``'s answer as text."""
    d = description
    model, layout = ModelConfig.model_validate(_model_fields(d["geometry"])), ParallelConfig(**d["layout"])
    rows = [
        ("checkpoint", d["path"]),
        ("state", "whole (files and sizes)" if d["problem"] is None else f"DAMAGED: {d['problem']}"),
        *(("passed over", f"{item['path']}: {item['reason']}") for item in d["skipped"]),
        ("progress", f"step {d['step']:,}; step {d['stage_step']:,} of stage {d['stage'] + 1}"),
        (
            "consumed",
            f"{d['consumed_samples']:,} samples, {d['consumed_tokens']:,} tokens, {d['flops']:.3e} FLOPs",
        ),
        ("model", model_line(model)),
        (
            "parameters",
            f"{format_count(d['parameters'])} ({format_count(d['parameters_without_embeddings'])} without embeddings)",
        ),
        ("saved at", layout_line(layout, d["world_size"])),
        ("optimizer", "state included" if d["has_optimizer_state"] else "no state"),
        ("files", _files_line(d)),
        ("written by", f"growth_megatron {d['library_version']}, format {d['format_version']}"),
    ]
    for number, record in enumerate(d["lineage"]):
        rows.append(
            ("lineage" if number == 0 else "", growth_line(GrowthRecord.model_validate_json(json.dumps(record))))
        )
    width = max(len(name) for name, _ in rows)
    head = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([*head, "", *_rendered_tensors(d["tensors"], d["objects"])])


def verify_path(path: Path, full: bool = False) -> Iterator[str]:
    """One line for each checkpoint at ``path``, newest first: OK or DAMAGED, and why. ``full`` also sums the contents.

    Raises, after the last line:
        CheckpointError: the checkpoint, or some of the run's, are damaged; or there is none.
        NothingValidError: the run has checkpoints and none of them is whole.
    """
    path = _existing(path)
    run = _run_of(path)
    checkpoints = [path] if run is None else run.checkpoints()
    damaged: list[Skipped] = []
    for checkpoint in checkpoints:
        reason = validate_checkpoint(checkpoint, full)
        if reason is None:
            yield f"OK       {checkpoint}  {_contents_line(read_manifest(checkpoint), full)}"
        else:
            damaged.append(Skipped(checkpoint, reason))
            yield f"DAMAGED  {checkpoint}  {reason}"
    if run is not None:
        yield from _left_behind(run)
        if len(damaged) == len(checkpoints):
            raise _none_valid(run, damaged)
    if damaged:
        remedy = "the others are whole, and a run goes on from the newest of those" if run else "use another one"
        names = ", ".join(item.path.name for item in damaged)
        raise CheckpointError(f"{len(damaged)} of {len(checkpoints)} checkpoints damaged ({names}); {remedy}")


def model_line(model: ModelConfig) -> str:
    """A geometry in one line."""
    tied = ", tied embeddings" if model.tie_embeddings else ""
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads in "
        f"{model.query_groups} groups of {model.kv_channels} channels, ffn {model.ffn_hidden_size}, vocabulary "
        f"{model.vocab_size} (padded to {model.padded_vocab_size}), sequence {model.sequence_length}{tied}"
    )


def layout_line(layout: ParallelConfig, world_size: int) -> str:
    """The layout a checkpoint was saved at, in one line."""
    data = world_size // layout.model_parallel_size
    sequence = " +SP" if layout.sequence_parallel else ""
    virtual = f" VPP {layout.chunks}" if layout.chunks > 1 else ""
    return (
        f"TP {layout.tensor_parallel_size}{sequence} PP {layout.pipeline_parallel_size}{virtual} DP {data} "
        f"({world_size} rank{'s' if world_size != 1 else ''}); any other layout can load it"
    )


def growth_line(record: GrowthRecord) -> str:
    """One growth of a lineage, in one line."""
    text = (
        f"step {record.step:,}: {record.operator} {record.source_geometry.num_layers} -> "
        f"{record.target_geometry.num_layers} layers, optimizer state {record.optimizer_state}, from {record.source}"
    )
    if record.layers is not None:
        text += f"; layers {compact_layers(record.layers)}, {100 * connection_rate(record.layers):.1f} % connected"
    if record.validation_loss_after is not None:
        before = "unknown" if record.validation_loss_before is None else f"{record.validation_loss_before:.4f}"
        text += f"; validation loss {before} -> {record.validation_loss_after:.4f}"
    return text


def compact_layers(layers: Sequence[int]) -> str:
    """A layer list in few words, from 0: stretches in order, and how often each comes: ``0-3 x6``, ``0-3, 1-3 x5``."""
    stretches: list[list[int]] = []
    for layer in layers:
        if stretches and layer == stretches[-1][-1] + 1:
            stretches[-1].append(layer)
        else:
            stretches.append([layer])
    counted: list[tuple[str, int]] = []
    for stretch in stretches:
        name = f"{stretch[0]}-{stretch[-1]}" if len(stretch) > 1 else f"{stretch[0]}"
        if counted and counted[-1][0] == name:
            counted[-1] = (name, counted[-1][1] + 1)
        else:
            counted.append((name, 1))
    return ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counted)


def _existing(path: Path) -> Path:
    """``path`` with a link followed, if there is a folder."""
    followed = path
    if path.is_symlink():
        followed = path.parent / path.readlink()
        if not followed.exists():
            raise CheckpointError(f"{path} points at {followed}, which does not exist; name a checkpoint or a run")
    if not followed.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint or a run directory{_near(path)}")
    if not followed.is_dir():
        raise CheckpointError(f"{path} is a file; give the folder of a checkpoint, or a run directory")
    return followed


def _near(path: Path) -> str:
    run = _run_of(path.parent) if path.parent.is_dir() else None
    names = [entry.name for entry in run.checkpoints()[:3]] if run else []
    return f"; the newest there: {', '.join(names)}" if names else ""


def _run_of(path: Path) -> RunDirectory | None:
    """The run whose directory, or whose ``checkpoints`` folder, ``path`` is."""
    if (path / "checkpoints").is_dir():
        return RunDirectory(path)
    if path.is_dir() and any(CheckpointName.parse(entry.name) for entry in path.iterdir()):
        parent = path.parent if path.name else path.absolute().parent  # "." has no name
        return RunDirectory(parent) if path.absolute().name == "checkpoints" else None
    return None


def _manifest_of(path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except OSError as error:
        raise CheckpointError(f"{path}: the manifest cannot be read: {error.strerror}") from None


def _none_valid(run: RunDirectory, skipped: Sequence[Skipped]) -> CheckpointError:
    if not skipped:
        return CheckpointError(f"{run.checkpoints_path} holds no checkpoint yet; let the run reach its first save")
    found = "; ".join(f"{item.path.name}: {item.reason}" for item in skipped)
    return NothingValidError(f"none of the checkpoints in {run.checkpoints_path} is valid ({found})")


def _left_behind(run: RunDirectory) -> Iterator[str]:
    for entry in sorted(run.checkpoints_path.iterdir()):
        if entry.name.startswith(TEMPORARY_PREFIX):
            yield f"UNFINISHED  {entry}  a save under way, or one that was killed: the next train tidies it up"


def _contents_line(manifest: Manifest, full: bool) -> str:
    checked = "contents match their checksums" if full else "all there with their sizes"
    return f"step {manifest.step}, {len(manifest.files)} files, {format_bytes(manifest.total_bytes)}, {checked}"


def _shared_bytes(path: Path, manifest: Manifest) -> int:
    """Bytes of files that other checkpoints hold by hard links too."""
    present = (path / name for name in manifest.files)
    return sum(file.stat().st_size for file in present if file.exists() and file.stat().st_nlink > 1)


def _files_line(d: dict[str, Any]) -> str:
    shared = f", {format_bytes(d['shared_bytes'])} of them shared with other checkpoints" if d["shared_bytes"] else ""
    return f"{len(d['files'])} files, {format_bytes(d['bytes'])}{shared}"


def _tensor_table(stored: DistCheckpoint, geometry: ModelConfig) -> list[dict[str, Any]]:
    """Tensors alike in name, up to the layer, and in shape and type: how many, in how many stored chunks."""
    groups: dict[tuple[str, tuple[int, ...], str], dict[str, Any]] = {}
    for key, entry in stored.metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        count, shape = 1, tuple(entry.size)
        pattern = _LAYER_NUMBER.sub(_ANY_LAYER, key)
        if is_stacked(key):
            count, shape = shape[0], shape[1:]
            pattern = key.replace(LAYER_PREFIX, _ANY_LAYER, 1)
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        group = groups.setdefault(
            (pattern, shape, dtype),
            {"key": pattern, "count": 0, "shape": list(shape), "dtype": dtype, "chunks": 0},
        )
        group["count"] += count
        group["chunks"] += len(entry.chunks)
    order = list(dict.fromkeys(_LAYER_NUMBER.sub(_ANY_LAYER, key) for key in tensor_shapes(geometry)))
    return sorted(groups.values(), key=lambda group: _place(group["key"], order))


def _place(pattern: str, order: Sequence[str]) -> tuple[int, str, int, str]:
    """Weights first, in the model's order; then each part of the optimizer's state, in the same order."""
    for number, name in enumerate(order):
        if pattern == name or pattern.endswith(f".{name}"):
            return 0, pattern.removesuffix(name), number, pattern
    return 1, "", 0, pattern


def _rendered_tensors(tensors: Sequence[dict[str, Any]], objects: int) -> list[str]:
    rows = [("tensors", "count", "shape", "type", "chunks")]
    for t in tensors:
        shape = " x ".join(map(str, t["shape"])) or "scalar"
        rows.append((t["key"], str(t["count"]), shape, t["dtype"], str(t["chunks"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in (0, 2, 3) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if objects:
        lines.append(f"and {objects} byte object{'s' if objects != 1 else ''}")
    return lines


def _model_fields(geometry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in geometry.items() if name in ModelConfig.model_fields}
