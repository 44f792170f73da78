"""``growth-megatron compare``: needs no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from growth_megatron.commands.parsing import Subparsers, add_command
from growth_megatron.errors import EXIT_OK, ConfigError
from growth_megatron.report.compare import LOSSES, Run, compare, read_run, render_comparison
from growth_megatron.report.plots import plot_comparison


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
    parser.add_argument("--output", metavar="DIR", help="also writes DIR/comparison.json and comparison.png")


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
    figures = compare(groups, baseline)
    print(render_comparison(figures))
    if options.output:
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "comparison.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        kind = "validation" if all("validation" in run.curves for run in baseline) else "train"
        plot_comparison(_shown({name_of_baseline: baseline, **groups}, kind), LOSSES[kind], folder / "comparison.png")
        print(f"figures: {folder / 'comparison.json'}\nplot: {folder / 'comparison.png'}")
    return EXIT_OK


def _shown(groups: Mapping[str, Sequence[Run]], kind: str) -> dict[str, list[Mapping[str, Sequence[float]]]]:
    shown: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for name, runs in groups.items():
        curves = [run.curves[kind] for run in runs if kind in run.curves]
        if curves:
            shown[name] = [{"losses": curve.losses, "flops": curve.costs["flops"]} for curve in curves]
    return shown


def _group(text: str, default: str = "") -> tuple[str, list[Run]]:
    name, equals, paths = text.rpartition("=")
    runs = [read_run(path) for path in paths.split(",") if path]
    if not runs:
        raise ConfigError(f"{text!r} names no run directory")
    return (name if equals else default or runs[0].directory.resolve().name), runs
