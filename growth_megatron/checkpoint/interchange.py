"""Checkpoints and Hugging Face folders turned into each other: what ``import-hf``, ``export-hf`` and ``grow`` share.

Owns: which source a text on a command line means, what is checked and said on the way.
Does not own: reading and writing either format.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import torch

from growth_megatron.checkpoint.describe import locate_checkpoint, model_line
from growth_megatron.checkpoint.folder.commit import exclusive
from growth_megatron.checkpoint.folder.manifest import (
    MANIFEST_NAME,
    Manifest,
    library_version,
    read_manifest,
    validate_checkpoint,
)
from growth_megatron.checkpoint.folder.run_directory import Skipped
from growth_megatron.checkpoint.huggingface.config import CONFIG_NAME
from growth_megatron.checkpoint.huggingface.reader import HuggingFaceCheckpoint
from growth_megatron.checkpoint.huggingface.tokenizer import tokenizer_files
from growth_megatron.checkpoint.huggingface.writer import ExportedWeights, export_huggingface
from growth_megatron.checkpoint.torch_dist.optimizer_groups import fresh_common
from growth_megatron.checkpoint.torch_dist.reader import METADATA_NAME, DistCheckpoint
from growth_megatron.checkpoint.torch_dist.writer import WriteResult, write_checkpoint
from growth_megatron.config.load import read_config
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.config.units import format_bytes
from growth_megatron.data.tokenizer import tokenizer_sha256
from growth_megatron.errors import CheckpointError, GrowthMegatronError
from growth_megatron.model.architecture import stateless_objects
from growth_megatron.model.tensors import TensorSource, WithFreshOptimizer

HUGGINGFACE_PREFIX = "hf:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What ``export-hf --dtype`` takes."""


@dataclass(frozen=True)
class LocatedSource:
    """A model to read: its tensors, its geometry, and for a checkpoint of this library its manifest."""

    path: Path
    source: TensorSource
    geometry: ModelConfig
    manifest: Manifest | None = None
    skipped: tuple[Skipped, ...] = ()


def locate_source(text: str, *, metadata_alone: bool = False) -> LocatedSource:
    """What ``text`` means: a checkpoint, ``RUN/latest``, a run or a Hugging Face folder; ``hf:DIR`` is always the last.

    Args:
        metadata_alone: whether the data files may be absent, since nothing will be read from them.

    Raises:
        CheckpointError: it could be both or is neither, or what it means is not whole.
    """
    if text.startswith(HUGGINGFACE_PREFIX):
        return _huggingface(Path(text.removeprefix(HUGGINGFACE_PREFIX)))
    path = Path(text)
    ours, theirs = _could_be_ours(path), (path / CONFIG_NAME).is_file()
    if ours and theirs:
        raise CheckpointError(
            f"{path} could be a checkpoint ({ours}) and a Hugging Face folder ({CONFIG_NAME}); write "
            f"{HUGGINGFACE_PREFIX}{path} for the latter, or name the checkpoint's own folder"
        )
    if theirs:
        return _huggingface(path)
    if path.is_dir() and not ours:
        raise CheckpointError(
            f"{path} is neither a checkpoint or a run ({METADATA_NAME}, checkpoints/) nor a Hugging Face folder "
            f"({CONFIG_NAME}); correct the path"
        )
    located = locate_checkpoint(path)
    if not metadata_alone and (reason := validate_checkpoint(located.path)) is not None:
        raise CheckpointError(f"cannot read {located.path}: {reason}; growth-megatron verify shows what else is there")
    manifest = read_manifest(located.path)
    return LocatedSource(located.path, DistCheckpoint(located.path), manifest.geometry, manifest, located.skipped)


def _huggingface(path: Path) -> LocatedSource:
    checkpoint = HuggingFaceCheckpoint(path)
    return LocatedSource(path, checkpoint, checkpoint.geometry)


def _could_be_ours(path: Path) -> str | None:
    """What in ``path`` is of a checkpoint or a run."""
    if path.absolute().name == "checkpoints" and path.is_dir():
        return "its name"
    return next((name for name in (METADATA_NAME, MANIFEST_NAME, "checkpoints") if (path / name).exists()), None)


def fresh_objects(geometry: ModelConfig) -> dict[str, bytes]:
    """The byte objects without which megatron-core's strict load refuses a checkpoint: one, empty, for each matrix."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return dict.fromkeys(stateless_objects(geometry), buffer.getvalue())


def import_hf(source: Path, target: Path) -> WriteResult:
    """Write the Hugging Face model in ``source`` as the new training checkpoint ``target``, and say what is done.

    Weights keep their type, float32 masters are made of them, moments are zero, and progress is that of a run before
    its first step.

    Raises:
        CheckpointError: the folder is no model of this library, or the target exists or cannot be written.
        GrowthError: a weight is not finite.
    """
    checkpoint = HuggingFaceCheckpoint(source)
    geometry = checkpoint.geometry
    print(f"source  {source}\n        {model_line(geometry)}\ntarget  {target}", flush=True)
    manifest = Manifest(
        library_version=library_version(),
        step=0,
        stage=0,
        stage_step=0,
        consumed_samples=0,
        consumed_tokens=0,
        flops=0.0,
        geometry=geometry,
        layout=ParallelConfig(),
        world_size=1,
        has_optimizer_state=True,
    )
    with exclusive(target), bytes_progress(f"importing {target.name}") as progress:
        result = write_checkpoint(
            WithFreshOptimizer(checkpoint),
            target,
            manifest,
            fresh_common(),
            objects=fresh_objects(geometry),
            fingerprint=checkpoint.identity,
            progress=progress,
        )
    print(
        f"imported {target} in {result.seconds:.1f} s: {format_bytes(result.bytes_written)} written\n"
        f"train it with checkpoint.resume={target}, a new run.directory and\n" + "\n".join(model_section(geometry))
    )
    return result


def export_hf(
    checkpoint: Path, target: Path, *, dtype: str | None = None, tokenizer: Path | None = None, verify: bool = False
) -> None:
    """Write a checkpoint (or the newest valid one of a run) as the new Hugging Face folder ``target``.

    Args:
        dtype: one of ``DTYPES``; default: as stored.
        tokenizer: SentencePiece model or Hugging Face folder; default: the one that the run was configured with.
        verify: load the result with transformers and compare logits and token ids.

    Raises:
        CheckpointError: no such checkpoint, the target exists or cannot be written, or the result is not the same.
    """
    if verify:
        from growth_megatron.checkpoint.huggingface import verify as huggingface_verify

        huggingface_verify.require_transformers()
    located = locate_source(str(checkpoint))
    for skipped in located.skipped:
        print(f"passed over: {skipped.path}: {skipped.reason}")
    print(f"source     {located.path}\n           {model_line(located.geometry)}", flush=True)
    if tokenizer is None:
        tokenizer, note = tokenizer_of(located)
        note += "; give --tokenizer" if tokenizer is None else ""
    elif not tokenizer.exists():
        raise CheckpointError(f"--tokenizer {tokenizer} does not exist; correct the path")
    else:
        note = str(tokenizer)
    print(f"tokenizer  {note}", flush=True)
    wanted = DTYPES[dtype] if dtype else None
    with exclusive(target), bytes_progress(f"exporting {target.name}") as progress:
        result = export_huggingface(
            located.source, located.geometry, target, dtype=wanted, tokenizer=tokenizer, progress=progress
        )
    kind = str(result.dtype).removeprefix("torch.")
    print(
        f"exported {target} in {result.seconds:.1f} s: {format_bytes(result.bytes_written)} in "
        f"{len(result.files)} files, {kind}",
        flush=True,
    )
    if verify:
        weights = ExportedWeights(located.source, located.geometry, wanted)
        difference = huggingface_verify.check_logits(target, weights, located.geometry)
        print(f"logits: transformers and this library differ by {difference:.1e} of the largest (float32)")
        if tokenizer is not None and tokenizer.is_file():
            count = huggingface_verify.check_tokenizer(target, tokenizer)
            print(f"tokenizer: the same ids for {count} of {count} texts")


def tokenizer_of(located: LocatedSource) -> tuple[Path | None, str]:
    """The tokenizer that belongs to a source, if it can go along; and what is said of it."""
    if located.manifest is None:
        return located.path, "as in the source"
    path = located.path / "config.yaml"
    if not path.is_file():
        return None, "none: the checkpoint has no config.yaml that names one"
    try:
        tokenizer = Path(read_config(path).config.data.tokenizer)
        if not tokenizer.is_file():
            return None, f"none: {tokenizer}, named in {path}, is not there"
        trained_with = (located.manifest.data_fingerprint or {}).get("tokenizer_sha256")
        if trained_with not in (None, tokenizer_sha256(tokenizer)):
            return None, f"none: {tokenizer} is another file than the run was trained with"
        tokenizer_files(tokenizer, located.geometry)
    except GrowthMegatronError as error:
        return None, f"none: {error}"
    return tokenizer, str(tokenizer)


def model_section(geometry: ModelConfig) -> list[str]:
    """The ``model:`` section of a configuration for ``geometry``."""
    fields = geometry.model_dump(mode="json", exclude_none=True)
    return ["  model:", *(f"    {name}: {str(value).lower()}" for name, value in fields.items())]
