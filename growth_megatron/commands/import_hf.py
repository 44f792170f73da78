"""``growth-megatron import-hf``."""

from __future__ import annotations

import argparse
from pathlib import Path

from growth_megatron.checkpoint.folder.commit import exclusive
from growth_megatron.checkpoint.folder.target import check_new
from growth_megatron.checkpoint.origin import huggingface_origin
from growth_megatron.checkpoint.torch_dist.writer import WriteResult, write_checkpoint
from growth_megatron.commands.parsing import Subparsers, add_command, add_overwrite
from growth_megatron.commands.train_file import write_train_file
from growth_megatron.config.lines import model_line
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.units import format_bytes
from growth_megatron.errors import EXIT_OK


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "import-hf", "growth-megatron import-hf models/tiny-llama runs/imported/start")
    parser.add_argument("source", metavar="DIR", help="Hugging Face folder")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder to be made")
    add_overwrite(parser)


def run(options: argparse.Namespace) -> int:
    import_hf(Path(options.source), Path(options.checkpoint), overwrite=options.overwrite)
    return EXIT_OK


def import_hf(source: Path, target: Path, *, overwrite: bool = False) -> WriteResult:
    """Write the Hugging Face model in ``source`` as the new training checkpoint ``target``, and say what is done.

    Weights keep their type, float32 masters are made of them, moments are zero, and progress is that of a run before
    its first step.

    Raises:
        CheckpointError: the folder is no model of this library, or the target exists or cannot be written.
        GrowthError: a weight is not finite.
    """
    origin = huggingface_origin(source)
    check_new(target, source, overwrite)
    print(f"source  {source}\n        {model_line(origin.geometry)}\ntarget  {target}", flush=True)
    with exclusive(target), bytes_progress(f"importing {target.name}") as progress:
        result = write_checkpoint(
            origin.training_state(),
            target,
            origin.manifest,
            origin.common(),
            objects=origin.objects(),
            fingerprint=origin.identity,
            progress=progress,
            overwrite=overwrite,
        )
        lines = write_train_file(target, origin.geometry, origin)
    print(f"imported {target} in {result.seconds:.1f} s: {format_bytes(result.bytes_written)} written")
    print("\n".join(lines))
    return result
