"""``growth-megatron probe``: several growths of one checkpoint, each trained for a while, and the best."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from growth_megatron.commands.parsing import Subparsers, add_command, announce
from growth_megatron.errors import ConfigError


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "probe",
        "growth-megatron probe runs/base@5000 --candidates growths.yaml --steps 200",
        "growth-megatron probe runs/base --candidates growths.yaml --steps 200 --ranks 8 --set schedule.warmup_steps=9",
    )
    parser.description = (
        f"{parser.description}\n\n"
        "FILE.yaml maps names to sections of a stage; all else is as in the stage that the checkpoint is of:\n"
        "  stack: {model: {num_layers: 24}, growth: {operator: stack}}\n"
        "  identity: {model: {num_layers: 24}, growth: {operator: identity, optimizer_state: carry}}\n"
        "  none: {}"
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="of a run: its path, RUN@STEP, RUN/latest, RUN")
    parser.add_argument("--candidates", required=True, metavar="FILE.yaml", help="the growths by name")
    parser.add_argument("--steps", required=True, type=int, metavar="N", help="that each is trained for")
    parser.add_argument("--output", metavar="DIR", help="default: RUN_probe_STEP beside the run")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes, by torchrun; default: what the layout needs")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="a.b=c", help="for all candidates, as train takes them"
    )


def run(options: argparse.Namespace) -> int:
    for name in ("steps", "ranks"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise ConfigError(f"--{name} is {given}; allowed: whole numbers from 1")
    if "RANK" in os.environ:
        raise ConfigError("probe starts its processes itself; run it without torchrun, with --ranks N")
    announce(f"reading {options.checkpoint}")
    from growth_megatron.commands.probe_runs import probe  # seconds of imports, which a mistake need not wait for

    output = Path(options.output) if options.output else None
    return probe(options.checkpoint, Path(options.candidates), options.steps, output, options.ranks, options.set)
