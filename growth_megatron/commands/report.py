"""``growth-megatron report``: needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.errors import EXIT_OK
from growth_megatron.report.curves import plot_loss, render_summary, summarise


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(subparsers, "report", "growth-megatron report runs/quickstart")
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--no-plot", action="store_true", help="figures only; needs no matplotlib")


def run(options: argparse.Namespace) -> int:
    directory = Path(options.run)
    print(render_summary(summarise(directory)))
    if not options.no_plot:
        output = directory / "plots" / "loss.png"
        output.parent.mkdir(parents=True, exist_ok=True)
        plot_loss(directory, output)
        print(f"plot: {output}")
    return EXIT_OK
