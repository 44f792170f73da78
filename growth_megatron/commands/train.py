"""``growth-megatron train``."""

from __future__ import annotations

import argparse

from growth_megatron.commands.parsing import Subparsers, add_command, add_config, require_lm_eval
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.console import say_phase


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "train",
        "growth-megatron train configs/quickstart.yaml",
        "torchrun --nproc-per-node 8 -m growth_megatron train configs/paper/base_1b.yaml",
        "growth-megatron train configs/quickstart.yaml run.directory=runs/b stages.base.training.steps=50",
    )
    add_config(parser)


def run(options: argparse.Namespace) -> int:
    loaded = load_config(options.config, options.overrides)
    if loaded.config.evaluation.tasks:
        require_lm_eval("evaluation.tasks")
    say_phase("importing torch and megatron-core")
    # seconds of imports, which a wrong configuration need not wait for
    from growth_megatron.evaluate.during_training import prepare_tasks
    from growth_megatron.train.stages import train

    return train(loaded, prepare_tasks)
