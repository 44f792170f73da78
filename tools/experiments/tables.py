"""The tables of docs/results.md, out of results.json.

    python tools/experiments/tables.py DIR/results.json

Owns: their columns, order and words. Pure. Does not own: figures (``results.py``), which runs there are.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]

NINE_WAY = {
    "scratch": "scratch",
    "depth_direct": "direct, depth (`stack`)",
    "depth_learn": "learn, depth",
    "depth_zero": "zero, depth",
    "depth_random": "random, depth (`masked`)",
    "width_direct": "direct, width (`split`)",
    "width_learn": "learn, width",
    "width_zero": "zero, width",
    "width_random": "random, width (`masked`)",
    "scratch_0.6x": "scratch, 0.6 of the budget",
    "scratch_1.4x": "scratch, 1.4 of the budget",
}
PAPER = {"scratch": "0", "depth_direct": "+49.1 %", "depth_learn": "+48.6 %", "depth_zero": "+46.6 %",
         "depth_random": "-25.7 %", "width_direct": "-0.7 %", "width_learn": "-15.4 %", "width_zero": "-17.9 %",
         "width_random": "-13.8 %"}  # fmt: skip
"""Speed-ups at equal training loss (arXiv 2405.15319)."""
ABLATIONS = {
    "scratch_warmup_0.2": ("scratch, warm-up of 20 %", "nine_way/scratch"),
    "scratch_warmup_0.4": ("scratch, warm-up of 40 %", "nine_way/scratch"),
    "scratch_warmup_0.6": ("scratch, warm-up of 60 %", "nine_way/scratch"),
    "g_2": ("g = 2: 6 layers, twice", "nine_way/depth_direct"),
    "g_3": ("g = 3: 4 layers, three times", "nine_way/depth_direct"),
    "g_6": ("g = 6: 2 layers, six times", "nine_way/depth_direct"),
    "d_0": ("d = 0: initial layers stacked", "nine_way/depth_direct"),
    "d_150": ("d = 150 steps", "nine_way/depth_direct"),
    "d_600": ("d = 600 steps", "nine_way/depth_direct"),
    "d_1200": ("d = 1200 steps", "nine_way/depth_direct"),
    "width_released": ("the released mapping, width", "nine_way/width_direct"),
    "width_even": ("even shares, width: exact copies", "nine_way/width_direct"),
    "width_carry": ("moments carried, width", "nine_way/width_direct"),
    "depth_carry": ("moments carried, depth", "nine_way/depth_direct"),
    "schedule_continue": ("one cosine over base and grown stage", "nine_way/depth_direct"),
    "wsd_scratch": ("warm-up, constant, decay: scratch", "nine_way/scratch"),
    "wsd_late": ("warm-up, constant, decay: grown at 1200", "ablations/wsd_scratch"),
    "interleaved": ("112233 for 123123", "nine_way/depth_direct"),
    "noise_0.2": ("noise 0.2", "nine_way/depth_direct"),
    "partial_front": ("front of 6 layers repeated", "ablations/g_2"),
    "partial_middle": ("middle repeated", "ablations/g_2"),
    "partial_back": ("back repeated", "ablations/g_2"),
}
"""Of each column what it is, and the column that it differs from in one thing."""


BEST_SCRATCH = "ablations/scratch_warmup_0.4"
"""Scratch whose warm-up did best at the whole budget; tuning, at half of it, chose a longer one."""


LATE = "ablations/d_1200"
"""What is set against it too, beside the nine-way."""


LONGER_SCRATCH = "longer/scratch"
LONGER = {
    "scratch": "scratch",
    "depth_direct": "direct, depth (`stack`)",
    "depth_direct_0.004": "direct, depth, peak 4e-3",
    "depth_late": "direct, depth, grown late",
    "width_zero": "zero, width",
    "width_direct": "direct, width (`split`)",
}
"""Columns at five times the budget."""


def nine_way_table(found: Mapping[str, Any]) -> str:
    """Four operators in two directions and scratch, as far as there are runs of them."""
    rows = []
    control = found["columns"].get(BEST_SCRATCH, {}).get("same_sources", {})
    for name, label in NINE_WAY.items():
        if column := found["columns"].get(f"nine_way/{name}"):
            gain = list(column.get("gain", {}).values())  # none of scratch itself
            figures = (
                spread(column["same_sources"].values()),
                spread(gain, "+.3f"),
                spread((-each for each in differences(column["same_sources"], control)), "+.3f") if gain else "",
                spread(column["other_source"].values()),
                percents(column.get("speed_up", {}).values()),
                percents(speed_ups(found["along_the_curves"].get(f"nine_way/{name}"))),
                PAPER.get(name, ""),
            )
            rows.append((label, f"`{name}`", str(len(column["same_sources"])), *figures))
    return table(
        ("what", "column", "seeds", "held-out loss", "gain over scratch", "over scratch, warm-up 40 %",
         "loss, other source", "speed-up, annealed", "along the curves", "the paper, along the curves"), rows,
    )  # fmt: skip


def best_scratch_table(found: Mapping[str, Any]) -> str:
    """What each column saves against the best scratch, where the curves pass the lowest loss that both reach."""
    labels = {f"nine_way/{name}": label for name, label in NINE_WAY.items()}
    labels[LATE] = f"direct, depth, {ABLATIONS[LATE.partition('/')[2]][0]}"
    rows = []
    for name, label in labels.items():
        if saved := saving(found, name):
            rows.append((label, f"`{name.partition('/')[2]}`", *saved))
    return table(("what", "column", "seeds", *SAVING), rows)


SAVING = ("FLOPs to the same loss", "speed-up along the curves", "by 6 N D")


def saving(found: Mapping[str, Any], name: str) -> tuple[str, str, str, str] | None:
    """Seeds and ``SAVING`` of a column against the best scratch at its budget; None if it was not set against it."""
    column = found.get("against_best_scratch", {}).get(name)
    if not column:
        return None
    own, usual = speed_ups(column), speed_ups(column, "flops_6nd")
    flops = 1 / (1 + statistics.fmean(own)) - 1
    need = f"{abs(flops):.1%} {'fewer' if flops < 0 else 'more'}".replace("%", " %")
    return str(len(own)), need, percents(own), percents(usual)


def speed_ups(column: Mapping[str, Any] | None, cost: str = "flops") -> list[float]:
    """Of a column along its curves, by seed; none where it was not set against scratch."""
    pairs = column["speed_ups"]["validation"][cost]["of"] if column else ()
    return [each["baseline_cost"] / each["run_cost"] - 1 for each in pairs]


def longer_table(found: Mapping[str, Any]) -> str:
    """Losses and savings at the longer budget, against scratch as tuned there."""
    rows = []
    scratch = found["columns"].get(LONGER_SCRATCH, {}).get("same_sources", {})
    for name, label in LONGER.items():
        if column := found["columns"].get(f"longer/{name}"):
            seeds, *saved = saving(found, f"longer/{name}") or (str(len(column["same_sources"])), "", "", "")
            gain = [-each for each in differences(column["same_sources"], scratch)] if name != "scratch" else []
            losses = (spread(column[key].values()) for key in ("same_sources", "other_source"))
            rows.append((label, f"`{name}`", seeds, *losses, spread(gain, "+.3f"), *saved))
    return table(("what", "column", "seeds", "held-out loss", "loss, other source", "gain over scratch", *SAVING), rows)


def ablation_table(found: Mapping[str, Any]) -> str:
    """One thing changed at a time; the difference is to the column named, over the seeds that both have."""
    rows = []
    for name, (label, other) in ABLATIONS.items():
        column, against = (found["columns"].get(key) for key in (f"ablations/{name}", other))
        if column:
            difference = differences(column["same_sources"], against["same_sources"] if against else {})
            figures = (
                spread(column["same_sources"].values()),
                f"{spread(difference, '+.3f')} against `{other.partition('/')[2]}`" if difference else "",
                spread(column["other_source"].values()),
                percents(column.get("speed_up", {}).values()),
            )
            rows.append((label, f"`{name}`", str(len(column["same_sources"])), *figures))
    return table(
        ("what", "column", "seeds", "held-out loss", "difference", "loss, other source", "speed-up, annealed"), rows
    )


def tuning_table(runs: Iterable[Record], group: str) -> str:
    """Validation losses of all settings that were tried, the lowest of each kind in bold."""
    losses = {run["column"]: run["validation_loss"] for run in runs if run["group"] == group}
    settings: dict[str, dict[str, float]] = {}
    for column, loss in losses.items():
        kind, _, setting = column.partition("_")
        settings.setdefault(setting, {})[kind] = loss
    heads = {"scratch": "scratch", "depth": "direct, depth", "width": "direct, width"}
    tried = {kind: [each[kind] for each in settings.values() if kind in each] for kind in heads}
    lowest = {kind: min(found) for kind, found in tried.items() if found}
    rows = []
    for setting in sorted(settings, key=lambda text: tuple(map(float, text.split("_warmup_")))):
        rate, warm_up = setting.split("_warmup_")
        found = [settings[setting].get(kind) for kind in lowest]
        marked = [
            "" if loss is None else f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"
            for loss, best in zip(found, lowest.values(), strict=True)
        ]
        rows.append((rate, f"{float(warm_up):.0%}".replace("%", " %"), *marked))
    return table(("peak", "warm-up", *(heads[kind] for kind in lowest)), rows)


def differences(losses: Mapping[str, float], others: Mapping[str, float]) -> list[float]:
    """Of the seeds that both have."""
    return [loss - others[seed] for seed, loss in losses.items() if seed in others]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: Iterable[float], form: str = ".3f") -> str:
    """Mean and standard deviation over seeds."""
    found = list(values)
    if not found:
        return ""
    deviation = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):{form}}{deviation}"


def percents(values: Iterable[float | str]) -> str:
    """The mean and the range; each by itself where one is only a bound."""
    found = list(values)
    known = [value for value in found if not isinstance(value, str)]
    each = [value if isinstance(value, str) else f"{value:+.1%}" for value in found]
    if len(known) == len(found) > 1:
        text = f"{statistics.fmean(known):+.1%} ({min(known):+.1%} to {max(known):+.1%})"
    else:
        text = ", ".join(each)
    return text.replace("%", " %")


def markdown(found: Mapping[str, Any]) -> str:
    """All tables that there are runs for."""
    return "\n".join(tables(found))


def tables(found: Mapping[str, Any]) -> list[str]:
    """Each table of the page that has a row."""
    tuning = [tuning_table(found["runs"], group) for group in ("tuning", "tuning_longer")]
    made = [nine_way_table(found), best_scratch_table(found), longer_table(found), ablation_table(found), *tuning]
    return [each for each in made if each.count("\n") > 2]


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
