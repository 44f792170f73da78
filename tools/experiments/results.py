"""What came of the experiments: a record of each finished run, and tables and a picture of all that there are.

Owns: DIR/finished/NAME.json (one run), results.json, results.md, pictures. All is written beside, then renamed.
Does not own: which runs there are (``experiments.py``), the tables (``tables.py``), curves and speed-ups along them
(``growth_megatron.report``).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments import TARGET, Experiment, model_of  # type: ignore[import-not-found]
from tables import BEST_SCRATCH, LATE, LONGER_SCRATCH, markdown  # type: ignore[import-not-found]

from growth_megatron.errors import GrowthMegatronError
from growth_megatron.model.cost import flops_per_token
from growth_megatron.report.compare import Curve, Run, compare, cost_of, read_run
from growth_megatron.report.plots import plot_comparison

Record = dict[str, Any]
Setting = TypeVar("Setting", bound=Hashable)
SCRATCH = "nine_way/scratch"
SHORT, LONG = "scratch_0.6x", "scratch_1.4x"
PICTURES = {
    "comparison.png": {
        "scratch": BEST_SCRATCH,
        "stacked at 300": "nine_way/depth_direct",
        "stacked at 1200": LATE,
        "zeros in width": "nine_way/width_zero",
        "split in width": "nine_way/width_direct",
    },
    "comparison_longer.png": {
        "scratch": LONGER_SCRATCH,
        "stacked at 1500": "longer/depth_direct",
        "at 1500, peak 4e-3": "longer/depth_direct_0.004",
        "stacked at 6000": "longer/depth_late",
        "zeros in width": "longer/width_zero",
        "split in width": "longer/width_direct",
    },
}
"""Columns by their labels, beside ``results.png`` with all of the nine-way."""


def steps_of(run: Experiment) -> float:
    """Cost of a run in steps of the target."""
    whole = flops_per_token(model_of(TARGET))
    stages = run.content["stages"]
    steps: float = sum(
        stage["training"]["steps"] * flops_per_token(model_of(stage.get("model", TARGET))) / whole for stage in stages
    )
    return steps


def is_finished(output: Path, run: Experiment) -> bool:
    """Whether ``run`` has its record."""
    return is_recorded(output, run.name)


def is_recorded(output: Path, name: str) -> bool:
    """Whether the run of that name has its record."""
    return _record(output, name).is_file()


def record(output: Path, run: Experiment) -> None:
    """Write down the figures of a run that has just finished."""
    validation = read_run(output / "runs" / run.name).curves["validation"]
    lines = (output / "logs" / f"{run.name}.log").read_text(encoding="utf-8").splitlines()
    held_out = json.loads(lines[-1]) if run.is_compared else {}
    entry = {
        "name": run.name,
        "group": run.group,
        "column": run.column,
        "seed": run.seed,
        "validation_loss": validation.losses[-1],
        "flops": validation.costs["flops"][-1] + run.unseen_flops,
        "tokens": validation.costs["consumed_tokens"][-1],
        **held_out,
    }
    write_text(_record(output, run.name), json.dumps(entry, indent=1) + "\n")


def lowest(output: Path, runs: Mapping[Setting, Experiment]) -> Setting:
    """The setting whose run has the lowest validation loss."""
    return min(runs, key=lambda setting: float(_read(output, runs[setting].name)["validation_loss"]))


def write(output: Path) -> None:
    """results.json, results.md and results.png of all runs that are finished."""
    paths = sorted((output / "finished").glob("*.json"), key=lambda path: path.stat().st_mtime)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    runs = _runs(output, records)
    longer = {column: found for column, found in runs.items() if column.startswith("longer/")}
    plain = {column: found for column, found in runs.items() if column not in longer}
    found = {
        "runs": records,
        "columns": columns_of(records),
        "along_the_curves": _along_the_curves(plain, SCRATCH),
        "against_best_scratch": {
            **_along_the_curves({name: each for name, each in plain.items() if name != SCRATCH}, BEST_SCRATCH),
            **_along_the_curves(longer, LONGER_SCRATCH),
        },
    }
    write_text(output / "results.json", json.dumps(found, indent=1) + "\n")
    write_text(output / "results.md", markdown(found))
    _plot(output, runs)


def columns_of(records: Sequence[Record]) -> dict[str, Record]:
    """Of each column its losses by seed and its speed-ups at equal annealed loss, against scratch of the same seed."""
    nine = {(r["column"], r["seed"]): r for r in records if r["group"] == "nine_way"}
    columns: dict[str, Record] = {}
    for entry in records:
        if entry["group"] not in ("nine_way", "ablations", "longer"):
            continue
        column = columns.setdefault(f"{entry['group']}/{entry['column']}", defaultdict(dict))
        seed = str(entry["seed"])
        column["same_sources"][seed] = entry["same_sources"]
        column["other_source"][seed] = entry["other_source"]
        column["flops"][seed] = entry["flops"]
        scratch = [nine[key] for name in (SHORT, "scratch", LONG) if (key := (name, entry["seed"])) in nine]
        if len(scratch) == 3 and entry not in scratch and entry["group"] != "longer":
            column["speed_up"][seed] = annealed_speed_up(entry, scratch)
            column["gain"][seed] = scratch[1]["same_sources"] - entry["same_sources"]
    return {name: dict(column) for name, column in columns.items()}


def annealed_speed_up(entry: Record, scratch: Sequence[Record]) -> float | str:
    """F_scratch / F_run - 1 at the run's own final loss, on the line through scratch's annealed ends.

    Where the loss is outside of them nothing is extrapolated: the text says on which side.
    """
    losses, costs = ([float(each[key]) for each in scratch] for key in ("same_sources", "flops"))
    loss, cost = float(entry["same_sources"]), float(entry["flops"])
    if loss > losses[0]:
        return f"< {costs[0] / cost - 1:+.1%}"
    if loss < min(losses):
        return f"> {costs[-1] / cost - 1:+.1%}"
    return cost_of(Curve(tuple(losses), {"flops": tuple(costs)}), "flops", loss) / cost - 1


def _along_the_curves(runs: Mapping[str, Mapping[int, Run]], against: str) -> Mapping[str, Any]:
    """As the paper measures it: where the curves of training pass the same loss, none of them annealed there.

    Of each column against that of the name ``against``, as far as that one has the same seeds.
    """
    groups, figures, baseline = {}, dict[str, Any](), runs.get(against, {})
    for column, by_seed in runs.items():
        seeds = sorted(by_seed.keys() & baseline.keys())
        if seeds and column != against:
            groups = {column: [by_seed[seed] for seed in seeds]}
            found = compare(groups, [baseline[seed] for seed in seeds])["groups"][column]
            figures[column] = {"seeds": seeds, "speed_ups": found["speed_ups"]}
    return figures


def _runs(output: Path, records: Sequence[Record]) -> dict[str, dict[int, Run]]:
    """Those of the nine-way, the ablations and the longer ones that are set against scratch, by column and seed."""
    runs: dict[str, dict[int, Run]] = {}
    for entry in records:
        column = f"{entry['group']}/{entry['column']}"
        nine_way = entry["group"] == "nine_way" and entry["column"] not in (SHORT, LONG)
        if nine_way or entry["group"] == "longer" or column in (BEST_SCRATCH, LATE):
            runs.setdefault(column, {})[entry["seed"]] = read_run(output / "runs" / entry["name"])
    return runs


def _plot(output: Path, runs: Mapping[str, Mapping[int, Run]]) -> None:
    nine_way = {name.removeprefix("nine_way/"): name for name in runs if name.startswith("nine_way/")}
    for picture, columns in {"results.png": nine_way, **PICTURES}.items():
        curves = {
            label: [run.curves["validation"] for run in runs[name].values()]
            for label, name in columns.items()
            if name in runs
        }
        shown = {label: [(each.costs["flops"], each.losses) for each in found] for label, found in curves.items()}
        partial = output / f".{picture}"
        if not shown:
            continue
        try:
            plot_comparison(shown, "held-out loss", "FLOPs", partial)
        except GrowthMegatronError as error:  # no matplotlib
            print(f"no picture: {error}")
            return
        partial.rename(output / picture)


def _record(output: Path, name: str) -> Path:
    return output / "finished" / f"{name}.json"


def _read(output: Path, name: str) -> Record:
    found: Record = json.loads(_record(output, name).read_text(encoding="utf-8"))
    assert math.isfinite(found["validation_loss"])
    return found


def write_text(path: Path, text: str) -> None:
    """Beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)
