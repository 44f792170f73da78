"""What a checkpoint holds, and whether it is whole, in words for people and data for scripts.

Owns: what ``inspect`` says and ``verify`` says of files, and which checkpoint a path given on a command line means.
Does not own: the manifest and its validation (``checkpoint.folder.manifest``), reading tensors
(``checkpoint.torch_dist.reader``), what becomes of a growth (``growth.verify``).

A path may be a checkpoint, a link to one (``RUN/latest``), a run directory or its ``checkpoints`` folder; of a run the
newest valid checkpoint is meant. Tensor data are read by ``verify --full`` and ``inspect --tensor`` alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from growth_megatron.checkpoint.folder.commit import TEMPORARY_PREFIX
from growth_megatron.checkpoint.folder.manifest import (
    MANIFEST_NAME,
    GrowthRecord,
    Manifest,
    read_manifest,
    validate_checkpoint,
)
from growth_megatron.checkpoint.folder.run_directory import CheckpointName, RunDirectory, Skipped
from growth_megatron.checkpoint.huggingface.config import CONFIG_NAME
from growth_megatron.checkpoint.huggingface.reader import HuggingFaceCheckpoint
from growth_megatron.checkpoint.torch_dist.reader import METADATA_NAME, DistCheckpoint
from growth_megatron.commands.tensor_statistics import tensor_statistics
from growth_megatron.commands.tensor_table import render_table, tensor_table
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.config.units import format_bytes, format_count
from growth_megatron.errors import CheckpointError, NothingValidError
from growth_megatron.growth.layers import connection_rate
from growth_megatron.model.cost import parameter_count

_GEOMETRY_NAMES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_query_groups": "groups",
    "head_dim": "head channels",
    "ffn_hidden_size": "ffn",
    "vocab_size": "vocabulary",
    "padded_vocab_size": "padded vocabulary",
    "sequence_length": "sequence",
    "rope_base": "rope base",
    "norm_epsilon": "norm epsilon",
}


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

    Of a Hugging Face folder that is its geometry, files and tensors.

    Raises:
        CheckpointError: no checkpoint, or one whose manifest or ``.metadata`` cannot be read.
    """
    if _is_huggingface(path):
        return _describe_huggingface(path)
    located = locate_checkpoint(path)
    manifest = _manifest_of(located.path)
    stored = DistCheckpoint(located.path)
    problem = validate_checkpoint(located.path)
    counters = ("step", "stage", "stage_step", "consumed_samples", "consumed_tokens", "flops")
    return {
        "path": str(located.path),
        "kind": "checkpoint",
        "problem": problem,
        "skipped": [{"path": str(item.path), "reason": item.reason} for item in located.skipped],
        **{name: getattr(manifest, name) for name in counters},
        **_model_description(manifest.geometry),
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
        "tensors": tensor_table(stored, manifest.geometry),
        "objects": len(stored.object_keys()),
    }


def _describe_huggingface(path: Path) -> dict[str, Any]:
    folder = HuggingFaceCheckpoint(path)
    files = {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))}
    return {
        "path": str(path),
        "kind": "huggingface",
        **_model_description(folder.geometry),
        "bytes": sum(files.values()),
        "files": files,
        "tensors": tensor_table(folder, folder.geometry),
    }


def _model_description(model: ModelConfig) -> dict[str, Any]:
    parameters = parameter_count(model)
    return {
        "geometry": {
            **model.model_dump(mode="json"),
            "padded_vocab_size": model.padded_vocab_size,
        },
        "parameters": parameters.total,
        "parameters_without_embeddings": parameters.without_embeddings,
    }


def render_description(description: dict[str, Any]) -> str:
    """``describe_checkpoint``'s answer as text."""
    d = description
    rows = _huggingface_lines(d) if d["kind"] == "huggingface" else _checkpoint_lines(d)
    width = max(len(name) for name, _ in rows)
    head = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join([*head, "", *render_table(d["tensors"], d.get("objects", 0))])


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


def describe_tensor(path: Path, key: str) -> dict[str, Any]:
    """Statistics of one tensor of the checkpoint that ``path`` means (``tensor_statistics``), as JSON-able data.

    Raises:
        CheckpointError: no such checkpoint or tensor, or damaged data.
    """
    if _is_huggingface(path):
        return {"path": str(path), **tensor_statistics(HuggingFaceCheckpoint(path), key)}
    located = locate_checkpoint(path).path
    return {"path": str(located), **tensor_statistics(DistCheckpoint(located), key)}


Outcome = Literal["OK", "FAILED", "SKIPPED"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at in a checkpoint; ``figures`` are the numbers its text names."""

    path: Path
    subject: str
    outcome: Outcome
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def line(self) -> str:
        return f"{self.outcome:<7}  {self.path}  {self.subject}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, the figures beside the rest; null where one is not finite."""
        words = {"path": str(self.path), "subject": self.subject, "outcome": self.outcome, "text": self.text}
        return {**words, **{name: value if math.isfinite(value) else None for name, value in self.figures.items()}}


def verify_files(path: Path, full: bool = False) -> Iterator[Check]:
    """One check for each checkpoint at ``path``, newest first: are its files whole. ``full`` sums the contents too.

    Raises, after the last check:
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
            yield Check(checkpoint, "files", "OK", _contents_line(read_manifest(checkpoint), full))
        else:
            damaged.append(Skipped(checkpoint, reason))
            yield Check(checkpoint, "files", "FAILED", reason)
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
        f"{model.num_query_groups} groups of {model.head_dim} channels, ffn {model.ffn_hidden_size}, vocabulary "
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


def geometry_changes(source: ModelConfig, target: ModelConfig) -> list[str]:
    """What differs between two geometries, each as ``hidden 512 -> 1024``."""
    pairs = [(name, getattr(source, key), getattr(target, key)) for key, name in _GEOMETRY_NAMES.items()]
    changes = [f"{name} {before} -> {after}" for name, before, after in pairs if before != after]
    if source.tie_embeddings != target.tie_embeddings:
        changes.append("embeddings tied" if target.tie_embeddings else "embeddings untied")
    return changes


def growth_line(record: GrowthRecord) -> str:
    """One growth of a lineage, in one line."""
    changes = ", ".join(geometry_changes(record.source_geometry, record.target_geometry)) or "same geometry"
    how = record.operator + describe_options(record.options, record.seed)
    text = f"step {record.step:,}: {how}: {changes}; optimizer state {record.optimizer_state}, from {record.source}"
    if record.layers is not None and record.layers != tuple(range(record.source_geometry.num_layers)):
        text += f"; layers {compact_layers(record.layers)}, {100 * connection_rate(record.layers):.1f} % connected"
    if record.validation_loss_after is not None:
        before = "unknown" if record.validation_loss_before is None else f"{record.validation_loss_before:.4f}"
        text += f"; validation loss {before} -> {record.validation_loss_after:.4f}"
    return text


def describe_options(options: Mapping[str, Any], seed: int) -> str:
    """Options of a growth to follow the operator's name, with the seed that goes with them; nothing without any."""
    if not options:
        return ""
    return "".join(f", {key} {str(value).lower()}" for key, value in options.items()) + f", seed {seed}"


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


def _is_huggingface(path: Path) -> bool:
    ours = (METADATA_NAME, MANIFEST_NAME, "checkpoints")
    return (path / CONFIG_NAME).is_file() and not any((path / name).exists() for name in ours)


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


def _left_behind(run: RunDirectory) -> Iterator[Check]:
    text = "unfinished: a save under way, or one that was killed; the next train tidies it up"
    for entry in sorted(run.checkpoints_path.iterdir()):
        if entry.name.startswith(TEMPORARY_PREFIX):
            yield Check(entry, "files", "SKIPPED", text)


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


def _model_fields(geometry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in geometry.items() if name in ModelConfig.model_fields}
