"""``growth-megatron plan``: needs no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from rich.console import Console

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.folder.run_directory import at_step
from growth_megatron.commands.parsing import Subparsers, add_command, add_config
from growth_megatron.commands.plan_tables import print_plan
from growth_megatron.config.units import format_count
from growth_megatron.data.description import check_vocabulary
from growth_megatron.data.mixture import describe_draws, draws_of_stages
from growth_megatron.errors import EXIT_OK, DataError, GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.plan import RunPlan, plan_run, plan_to_dict, tokens_of_stages


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "plan",
        "growth-megatron plan configs/paper/stack_7b.yaml --gpus 64",
        "growth-megatron plan configs/quickstart.yaml --json",
    )
    add_config(parser, type=_config)
    parser.add_argument(
        "--gpus", "--world-size", dest="world_size", type=int, metavar="N",
        help="ranks; default: the smallest the layout allows",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="machine-readable, sizes in bytes")


def run(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides).config
    plan = plan_run(config, options.world_size)
    data = None
    try:
        drawn = draws_of_stages(config.stages, tokens_of_stages(config))
        data = [{"stages": names, **dataclasses.asdict(draw)} for names, found in drawn for draw in found]
        text = describe_draws(config.stages, tokens_of_stages(config))
    except DataError as error:
        text = f"data: shares and epochs are not known yet: {error}"
    if options.json:
        print(json.dumps({**plan_to_dict(plan), "data": data}, indent=1))
    else:
        print_plan(plan, Console())
        if config.checkpoint.mode == "branch":
            print(_base(config.checkpoint.resume, plan))
        print(text)
    if data is not None:
        for number, stage in enumerate(config.stages):  # as training does; said after what there is to say
            if all(stage.data != earlier.data for earlier in config.stages[:number]):
                check_vocabulary(stage.data, stage.model.vocab_size)
    return EXIT_OK


def _base(checkpoint: str, plan: RunPlan) -> str:
    """What the run begins from cost, which the plan does not count."""
    try:
        base = read_manifest(at_step(Path(checkpoint)))
    except GrowthMegatronError:
        return f"base: not counted above is what {checkpoint} cost, which is not there"
    return (
        f"base: not counted above is what {checkpoint} cost, {base.flops:.3e} FLOPs and "
        f"{format_count(base.consumed_tokens)} tokens; with it {base.flops + plan.flops:.3e} FLOPs"
    )


def _config(text: str) -> str:
    if text == "grow" and not Path(text).exists():
        raise argparse.ArgumentTypeError(
            "there is no file 'grow'; what a growth would do and cost says: growth-megatron grow SOURCE [TARGET] --plan"
        )
    return text
