"""``growth-megatron publish``: needs no torch for wandb."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.config.load import read_config
from growth_megatron.config.run_schema import WandbConfig
from growth_megatron.errors import EXIT_OK, ConfigError, GrowthMegatronError
from growth_megatron.train.metrics import read_metrics
from growth_megatron.train.trackers import TensorBoardTracker, Tracker, WandbTracker, require


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "publish",
        "growth-megatron publish runs/quickstart --wandb growth --group stack --tags small,fp32",
        "growth-megatron publish runs/quickstart --tensorboard tensorboard",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--wandb", metavar="PROJECT", help="as a wandb run, which a later publish of RUN replaces")
    parser.add_argument("--tensorboard", metavar="DIR", help="as event files in DIR/NAME")
    parser.add_argument("--name", help="of the run; default: the run directory's")
    parser.add_argument("--entity", help="wandb's team or user")
    parser.add_argument("--group", help="wandb's group")
    parser.add_argument("--tags", default="", metavar="A,B", help="wandb's tags")


def run(options: argparse.Namespace) -> int:
    directory = Path(options.run)
    name = options.name or directory.resolve().name
    if options.wandb is None and options.tensorboard is None:
        raise ConfigError("nothing to publish to; give --wandb PROJECT, --tensorboard DIR or both")
    records = read_metrics(directory)
    if options.tensorboard is not None:
        require("tensorboard", "--tensorboard", "give --wandb alone")
        folder = _tensorboard_folder(Path(options.tensorboard) / name)
        _replay(TensorBoardTracker(folder), records)
        print(f"TensorBoard: {len(records):,} records in {folder}; tensorboard --logdir {options.tensorboard}")
    if options.wandb is not None:
        require("wandb", "--wandb", "give --tensorboard alone")
        tags = tuple(tag for tag in options.tags.split(",") if tag)
        given = WandbConfig(project=options.wandb, entity=options.entity, group=options.group, tags=tags)
        key = f"{directory.resolve()} {options.wandb} {options.entity}"
        run_id = hashlib.sha256(key.encode()).hexdigest()[:12]
        # resume=None: what wandb has under this id is overwritten
        tracker = WandbTracker(directory, run_id, given, name, _config(directory), None)
        _replay(tracker, records)
        print(f"wandb: {len(records):,} records in project {options.wandb}: {tracker.where}")
    return EXIT_OK


def _replay(tracker: Tracker, records: list[dict[str, Any]]) -> None:
    tracker.rewind(records)
    try:
        tracker.show()
        tracker.close()
    except GrowthMegatronError:
        raise
    except Exception as error:  # of a library or its service
        raise ConfigError(f"{type(error).__name__}: {error}; nothing of the run was changed, try again") from error


def _tensorboard_folder(folder: Path) -> Path:
    others = [path for path in folder.glob("events.out.tfevents.*") if not TensorBoardTracker.wrote(path)]
    if others:
        raise ConfigError(f"{others[0]} is of another program; give another --name, or another --tensorboard folder")
    return folder


def _config(directory: Path) -> Mapping[str, Any]:
    """What the run was trained with, as far as this version can read it."""
    try:
        return read_config(directory / "config.yaml").config.model_dump(mode="json")
    except GrowthMegatronError as error:
        print(f"wandb: no configuration is published, {directory / 'config.yaml'} cannot be read ({error})")
        return {}
