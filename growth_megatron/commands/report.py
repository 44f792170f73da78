"""``growth-megatron report``: needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.errors import EXIT_OK
from growth_megatron.report.curves import plot_loss, render_summary, summarise
from growth_megatron.report.joined import joined_records
from growth_megatron.report.page import write_page


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers, "report", "growth-megatron report runs/quickstart", "growth-megatron report runs/quickstart --png"
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--no-page", action="store_true", help="figures only, nothing is written")
    parser.add_argument("--png", action="store_true", help="also RUN/plots/loss.png, for a paper; needs matplotlib")


def run(options: argparse.Namespace) -> int:
    directory = Path(options.run)
    records = joined_records(directory)
    summary = summarise(directory, records)
    print(render_summary(summary))
    if not options.no_page:
        print(f"page: {write_page(summary, records)}")
    if options.png:
        print(f"plot: {plot_loss(directory, directory / 'plots' / 'loss.png')}")
    return EXIT_OK
