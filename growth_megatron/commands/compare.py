"""``growth-megatron compare``: needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

from growth_megatron.commands.parsing import Subparsers, add_command, output_folder
from growth_megatron.errors import EXIT_OK, ConfigError
from growth_megatron.report.compare import COSTS, LOSSES, Run, compare, read_run, render_comparison
from growth_megatron.report.plots import plot_comparison

PICTURES = {"flops": "comparison.png", "flops_6nd": "comparison_6nd.png", "consumed_tokens": "comparison_tokens.png"}


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "compare",
        "growth-megatron compare runs/grown --baseline scratch=runs/scratch",
        "growth-megatron compare stack=runs/stack_1,runs/stack_2 width=runs/width_1,runs/width_2 "
        "--baseline runs/scratch_1,runs/scratch_2 --output runs/comparison",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN[,RUN]", help="run directories of one thing with several seeds by commas"
    )
    parser.add_argument(
        "--baseline", required=True, metavar="[NAME=]RUN[,RUN]", help="that are compared with; seeds alike"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="also writes DIR/comparison.json and pictures against FLOPs (comparison.png), FLOPs by 6 N D and tokens",
    )


def run(options: argparse.Namespace) -> int:
    groups: dict[str, list[Run]] = {}
    name_of_baseline, baseline = _group(options.baseline, "baseline")
    for text in options.runs:
        name, runs = _group(text)
        if name in groups:
            raise ConfigError(f"{name} names two groups; write NAME=RUN for one of them")
        groups[name] = runs
    if name_of_baseline in groups:
        raise ConfigError(f"{name_of_baseline} names a group and the baseline; write NAME=RUN for one of them")
    folder = output_folder(options.output, "--output") if options.output else None
    figures = compare(groups, baseline)
    print(render_comparison(figures))
    if folder is not None:
        (folder / "comparison.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        print(f"figures: {folder / 'comparison.json'}")
        everything = {name_of_baseline: baseline, **groups}
        held_out = all("validation" in run.curves for group in everything.values() for run in group)
        kind = "validation" if held_out else "train"
        for cost, name in PICTURES.items():
            if (shown := _shown(everything, kind, cost)) is None:
                print(f"no plot against {COSTS[cost]}: not all of the runs have them")
            else:
                print(f"plot: {plot_comparison(shown, LOSSES[kind], COSTS[cost], folder / name)}")
    return EXIT_OK


def _shown(
    groups: Mapping[str, Sequence[Run]], kind: str, cost: str
) -> dict[str, list[tuple[Sequence[float], Sequence[float]]]] | None:
    """Costs and losses of all runs; None where one does not have them."""
    if not all(kind in run.curves and cost in run.curves[kind].costs for runs in groups.values() for run in runs):
        return None
    return {
        name: [(run.curves[kind].costs[cost], run.curves[kind].losses) for run in runs] for name, runs in groups.items()
    }


def _group(text: str, default: str = "") -> tuple[str, list[Run]]:
    name, equals, paths = text.rpartition("=")
    runs = [read_run(path) for path in paths.split(",") if path]
    if not runs:
        raise ConfigError(f"{text!r} names no run directory")
    return (name if equals and name else default or runs[0].directory.resolve().name), runs
