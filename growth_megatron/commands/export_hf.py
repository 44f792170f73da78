"""``growth-megatron export-hf``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from growth_megatron.checkpoint.folder.commit import exclusive
from growth_megatron.checkpoint.folder.sums import summed_beside
from growth_megatron.checkpoint.huggingface import verify as huggingface_verify
from growth_megatron.checkpoint.huggingface.writer import ExportedWeights, export_huggingface
from growth_megatron.checkpoint.origin import HUGGINGFACE_PREFIX, find_origin
from growth_megatron.commands.parsing import Subparsers, add_command, add_dtype
from growth_megatron.config.lines import model_line
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.units import format_bytes
from growth_megatron.data.tokenizer import FILE_NAMES
from growth_megatron.errors import EXIT_OK, CheckpointError
from growth_megatron.growth.masks import as_it_acts


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "export-hf",
        "growth-megatron export-hf runs/quickstart/latest models/quickstart --verify",
        "growth-megatron export-hf runs/a models/a --dtype bfloat16 --tokenizer data/tokenizer.model",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, RUN/latest or a run directory")
    parser.add_argument("target", metavar="DIR", help="folder to be made")
    add_dtype(parser, "of the weights; default: as stored")
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="SentencePiece model, tokenizer.json or folder; default: the run's own"
    )
    parser.add_argument("--verify", action="store_true", help="compare logits and token ids with transformers")


def run(options: argparse.Namespace) -> int:
    tokenizer = Path(options.tokenizer) if options.tokenizer else None
    target = Path(options.target.removeprefix(HUGGINGFACE_PREFIX))
    export_hf(options.checkpoint, target, dtype=options.dtype, tokenizer=tokenizer, verify=options.verify)
    return EXIT_OK


def export_hf(
    checkpoint: str, target: Path, *, dtype: str | None = None, tokenizer: Path | None = None, verify: bool = False
) -> None:
    """Write a checkpoint (or the newest valid one of a run) as the new Hugging Face folder ``target``.

    Args:
        dtype: name of a torch type; default: as stored.
        tokenizer: SentencePiece model or Hugging Face folder; default: the one that the run was configured with.
        verify: load the result with transformers and compare logits and token ids.

    Raises:
        CheckpointError: no such checkpoint, the target exists or cannot be written, or the result is not the same.
    """
    if verify:
        huggingface_verify.require_transformers()
    origin = find_origin(checkpoint)
    for skipped in origin.skipped:
        print(f"passed over: {skipped.path}: {skipped.reason}")
    print(f"source     {origin.path}\n           {model_line(origin.geometry)}", flush=True)
    tensors, geometry = as_it_acts(origin)
    if tensors is not origin.tensors:
        print(f"masks      folded into the weights, as of step {origin.manifest.stage_step:,} of the stage", flush=True)
    if tokenizer is None:
        tokenizer, note = origin.tokenizer()
        note += "; give --tokenizer" if tokenizer is None else ""
    elif not tokenizer.exists():
        raise CheckpointError(f"--tokenizer {tokenizer} does not exist; correct the path")
    else:
        note = str(tokenizer)
    print(f"tokenizer  {note}", flush=True)
    wanted: torch.dtype | None = getattr(torch, dtype) if dtype else None
    with (
        exclusive(target),
        bytes_progress(f"exporting {target.name}") as progress,
        summed_beside(origin.path, origin.manifest.files) as source_is_sound,
    ):
        result = export_huggingface(
            tensors,
            geometry,
            target,
            dtype=wanted,
            tokenizer=tokenizer,
            progress=progress,
            source_is_sound=source_is_sound,
        )
    kind = str(result.dtype).removeprefix("torch.")
    print(
        f"exported {target} in {result.seconds:.1f} s: {format_bytes(result.bytes_written)} in "
        f"{len(result.files)} files, {kind}",
        flush=True,
    )
    if verify:
        _verify(ExportedWeights(tensors, geometry, wanted), geometry, target, tokenizer)


def _verify(weights: ExportedWeights, geometry: ModelConfig, target: Path, tokenizer: Path | None) -> None:
    difference = huggingface_verify.check_logits(target, weights, geometry)
    print(f"logits: transformers and this library differ by {difference:.1e} of the largest (float32)")
    if tokenizer is None or (tokenizer.is_dir() and not any((tokenizer / name).is_file() for name in FILE_NAMES)):
        print(f"tokenizer: no token ids to compare, without {' or '.join(FILE_NAMES)}")
    else:
        count = huggingface_verify.check_tokenizer(target, tokenizer)
        print(f"tokenizer: the same ids for {count} of {count} texts")
