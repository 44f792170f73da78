"""``growth-megatron import-megatron``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.commit import exclusive
from growth_megatron.checkpoint.folder.files import FileOperations, expected_in
from growth_megatron.checkpoint.folder.manifest import MANIFEST_NAME, checksum_files
from growth_megatron.checkpoint.folder.target import check_new
from growth_megatron.checkpoint.origin import fresh_objects
from growth_megatron.checkpoint.torch_dist.megatron import SETTINGS, MegatronCheckpoint
from growth_megatron.checkpoint.torch_dist.reader import METADATA_NAME
from growth_megatron.checkpoint.torch_dist.writer import write_checkpoint
from growth_megatron.commands.parsing import Subparsers, add_command, add_overwrite
from growth_megatron.commands.train_file import write_train_file
from growth_megatron.config.document import our_name, parse
from growth_megatron.config.lines import model_line
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.units import format_bytes
from growth_megatron.config.words import did_you_mean
from growth_megatron.errors import EXIT_OK, CheckpointError, ConfigError
from growth_megatron.growth.link import LinkPlan, link_checkpoint
from growth_megatron.model.tensors import WithFreshOptimizer

_OBJECTS_FILE = "objects.distcp"


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "import-megatron",
        "growth-megatron import-megatron checkpoints/iter_0010000 runs/imported/start",
        "growth-megatron import-megatron checkpoints/iter_0010000 runs/imported/start --set num_attention_heads=16 "
        "rope_base=500000 norm_epsilon=1e-5 sequence_length=4096",
        "growth-megatron import-megatron checkpoints/iter_0010000 runs/imported/start --weights-only",
    )
    parser.add_argument("source", metavar="DIR", help="a torch_dist checkpoint of megatron-core or Megatron-LM")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder to be made")
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="a=b",
        help=f"what the checkpoint does not say: {', '.join(SETTINGS)}",
    )
    add_overwrite(parser)
    parser.add_argument("--weights-only", action="store_true", help="leave the optimizer's state and begin a new one")


def run(options: argparse.Namespace) -> int:
    settings = _settings(options.settings)
    how = {"weights_only": options.weights_only, "overwrite": options.overwrite}
    import_megatron(Path(options.source), Path(options.checkpoint), settings, **how)
    return EXIT_OK


def import_megatron(
    source: Path, target: Path, settings: dict[str, Any], *, weights_only: bool = False, overwrite: bool = False
) -> None:
    """Make the checkpoint ``source`` of megatron-core one of this library, in the new folder ``target``.

    With its optimizer state its data files are linked; otherwise masters are made of the weights, and all is written.

    Raises:
        CheckpointError: it is no model of this library, does not say all of it, its optimizer state fits one layout
            alone, or the target exists or cannot be written.
    """
    _check_source(source)
    with expected_in(source):
        found = MegatronCheckpoint(source, settings, weights_only=weights_only)
    check_new(target, source, overwrite)
    print(f"source  {source}\n        {model_line(found.geometry)}\ntarget  {target}", flush=True)
    with exclusive(target), bytes_progress(f"importing {target.name}") as progress:
        if found.has_optimizer:
            linked = link_checkpoint(
                source, (), _links(found), target, found.manifest, found.common, FileOperations(), overwrite
            )
            written, how = linked.bytes_written, f"{format_bytes(linked.bytes_linked)} linked, optimizer state kept"
        else:
            result = write_checkpoint(
                WithFreshOptimizer(found.weights()),
                target,
                found.manifest,
                found.common,
                objects=fresh_objects(found.geometry),
                fingerprint=f"import-megatron {source.resolve()} {settings}",
                progress=progress,
                overwrite=overwrite,
            )
            written, how = result.bytes_written, "optimizer state made anew"
        lines = write_train_file(target, found.geometry)
    print(f"imported {target}: {format_bytes(written)} written, {how}; step {found.manifest.step:,}")
    print("\n".join(lines))


def _check_source(source: Path) -> None:
    if (source / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{source} is a checkpoint of this library already: checkpoint.resume={source} takes it")
    if not (source / METADATA_NAME).is_file() and (iterations := sorted(source.glob("iter_*"))):
        raise CheckpointError(
            f"{source} holds {len(iterations)} checkpoints; name one of them, such as {iterations[-1]}"
        )


def _links(found: MegatronCheckpoint) -> LinkPlan:
    empty = next(iter(fresh_objects(found.geometry).values()))
    names = found.tensors.data_files()
    objects = next(name for name in (_OBJECTS_FILE, f"imported_{_OBJECTS_FILE}") if name not in names)
    return LinkPlan(found.metadata(objects, empty), checksum_files(found.path, names), objects, empty)


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = our_name("model", key)
        if not equals or key not in SETTINGS:
            hint = did_you_mean(key, SETTINGS) or ";"
            raise ConfigError(f"--set {text}: write key=value{hint} keys: {', '.join(SETTINGS)}")
        number = parse(value, "--set", numbered=False, path=key).plain()
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ConfigError(f"--set {key}: {value!r} is not a number")
        settings[key] = number
    return settings
