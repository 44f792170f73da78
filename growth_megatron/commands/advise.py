"""``growth-megatron advise``: needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.errors import EXIT_OK, ConfigError
from growth_megatron.report.advice import advise
from growth_megatron.report.advice_text import render_advice
from growth_megatron.report.curves import summarise
from growth_megatron.report.joined import joined_records

LARGEST_FACTOR = 16


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "advise",
        "growth-megatron advise runs/base",
        "growth-megatron advise runs/base --tokens 3e11 --factor 2",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--tokens", type=float, metavar="D", help="of the grown model in all; default: 20 a parameter")
    parser.add_argument("--factor", type=int, metavar="G", help="in depth; default: 4 where that was fitted, else 2")


def run(options: argparse.Namespace) -> int:
    if options.tokens is not None and not 0 < options.tokens < 1e18:
        raise ConfigError(f"--tokens is {options.tokens:g}; give a number of tokens, as 3e11")
    if options.factor is not None and not 2 <= options.factor <= LARGEST_FACTOR:
        raise ConfigError(f"--factor is {options.factor}; allowed: whole numbers from 2 to {LARGEST_FACTOR}")
    directory = Path(options.run)
    records = joined_records(directory)
    summary = summarise(directory, records)
    if summary.growths and (options.tokens is not None or options.factor is not None):
        print("--tokens and --factor are not used: the run has grown, and one growth is what is advised")
    print(render_advice(advise(summary, records, options.tokens, options.factor), summary, records))
    return EXIT_OK
