"""Pictures of a run.

Owns: the loss curve against FLOPs, alone and beside others.
Does not own: the figures (``report.curves``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from growth_megatron.errors import ConfigError, DataError
from growth_megatron.report.joined import joined_records
from growth_megatron.train.record_text import geometry

_TRAIN, _VALIDATION, _GROWTH = "#2b6cb0", "#c05621", "#4a5568"
_GROUPS = ("#4a5568", "#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#975a16", "#0987a0", "#c53030", "#718096")


def plot_loss(run_directory: str | Path, output_png: str | Path) -> Path:
    """Training loss (raw faint, smoothed) and validation loss against FLOPs; growths are marked.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: no training step in the metrics yet.
    """
    figure = _figure(8, 4.8)
    directory, output = Path(run_directory), Path(output_png)
    records = [r for r in joined_records(directory) if r["kind"] == "growth" or r.get("flops") is not None]
    train = [r for r in records if r["kind"] == "train" and r.get("loss") is not None]
    if not train:
        raise DataError(f"{directory} has no training loss in its metrics yet; let the run go on first")
    validation = [r for r in records if r["kind"] == "validation" and r.get("validation_loss") is not None]
    _panel(figure.subplots(), train, validation, [r for r in records if r["kind"] == "growth"])
    figure.suptitle(directory.resolve().name, fontsize=11, x=0.01, ha="left", fontweight="bold")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output


def plot_comparison(
    groups: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]], loss: str, cost: str, output_png: Path
) -> Path:
    """Loss against cost, a colour for each group and a line for each of its runs, labelled at their ends.

    Args:
        groups: runs by name, each with costs and losses in nats per token.
        loss, cost: what is shown, for the axes.

    Raises: ConfigError: matplotlib is not installed.
    """
    figure = _figure(8, 4.8)
    axis = figure.subplots()
    late, ends = [], []
    for number, (name, runs) in enumerate(groups.items()):
        color = _GROUPS[number % len(_GROUPS)]
        for costs, losses in runs:
            axis.plot(costs, losses, color=color, linewidth=1.6, alpha=0.9 if len(runs) == 1 else 0.6)
            late += list(losses)[len(losses) // 5 :]
        costs, losses = min(runs, key=lambda run: run[1][-1])
        ends.append((losses[-1], costs[-1], name, color))
    margin = 0.05 * (max(late) - min(late) or 1.0)
    axis.set_ylim(min(late) - margin, max(late) + margin)  # the fall from the random start runs off the top
    _label_ends(axis, ends, margin)
    _finish(axis, cost, loss)
    output_png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output_png)
    return output_png


def _figure(width: float, height: float) -> Any:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib, which is not installed; pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # optional; without pyplot's global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Where to write labels for rising ``values`` so that none is nearer than ``gap`` to the one below it."""
    placed: list[float] = []
    for value in values:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    return placed


def smooth(values: Sequence[float], half_width: int) -> list[float]:
    """Centred moving average, narrower towards both ends, so that it neither lags nor bends them."""
    sums = list(accumulate(values, initial=0.0))
    smoothed = []
    for index in range(len(values)):
        reach = min(half_width, index, len(values) - 1 - index)
        smoothed.append((sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1))
    return smoothed


def _panel(axis: Any, train: Sequence[Any], validation: Sequence[Any], growths: Sequence[Any]) -> None:
    losses = [r["loss"] for r in train]
    axis.plot([r["flops"] for r in train], losses, color=_TRAIN, alpha=0.25, linewidth=0.8)
    for stage in dict.fromkeys(r["stage"] for r in train):  # smoothing across a growth would hide its jump
        part = [r for r in train if r["stage"] == stage]
        smoothed = smooth([r["loss"] for r in part], len(train) // 25)
        axis.plot([r["flops"] for r in part], smoothed, color=_TRAIN, linewidth=1.7)
    ends = [(smoothed[-1], train[-1]["flops"], "training", _TRAIN)]
    points = [(r["flops"], r["validation_loss"]) for r in validation]
    if points:
        axis.plot(*zip(*points, strict=True), color=_VALIDATION, marker="o", markersize=3.5, linewidth=1.2)
        ends.append((points[-1][1], points[-1][0], "validation", _VALIDATION))
    low, high = _limits(losses, [loss for _, loss in points])
    axis.set_ylim(low, high)
    _label_ends(axis, ends, 0.05 * (high - low))
    for growth in growths:
        at = [r["flops"] for r in (*train, *validation) if r["step"] <= growth["step"]]
        if at:
            _mark_growth(axis, max(at), growth)
    _finish(axis, "FLOPs", "loss")


def _label_ends(axis: Any, ends: Sequence[tuple[float, float, str, str]], gap: float) -> None:
    """Names in their colours behind the ends of lines, given as loss, cost, name and colour."""
    ends = sorted(ends)
    heights = apart([loss for loss, *_ in ends], gap)
    for height, (_, at, name, color) in zip(heights, ends, strict=True):
        axis.annotate(name, (at, height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9,
                      color=color, fontweight="bold", annotation_clip=False)  # fmt: skip


def _finish(axis: Any, cost: str, loss: str) -> None:
    axis.set_xlim(left=0)
    axis.set_xlabel(f"{cost} of training, the base's counted")
    axis.set_ylabel(f"{loss} (nats per token)")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _mark_growth(axis: Any, x: float, growth: Any) -> None:
    axis.axvline(x, color=_GROWTH, linewidth=1, linestyle=(0, (4, 3)))
    late = x > 0.7 * axis.get_xlim()[1]
    axis.annotate(f"{growth.get('operator')}\n{growth_change(growth)}", (x, 1), xycoords=("data", "axes fraction"),
                  xytext=(-5 if late else 5, -4), textcoords="offset points", ha="right" if late else "left", va="top",
                  fontsize=8, color=_GROWTH)  # fmt: skip


def growth_change(growth: Any) -> str:
    """What a growth's record says of the two geometries, in a few words."""
    source, target = growth.get("source_geometry"), growth.get("target_geometry")
    if isinstance(source, Mapping) and isinstance(target, Mapping) and source["hidden_size"] == target["hidden_size"]:
        return f"{source['num_layers']} → {target['num_layers']} layers"
    if isinstance(source, Mapping) and isinstance(target, Mapping) and source["num_layers"] == target["num_layers"]:
        return f"hidden {source['hidden_size']} → {target['hidden_size']}"
    return f"{geometry(source)}\n→ {geometry(target)}"


def _limits(train: Sequence[float], validation: Sequence[float]) -> tuple[float, float]:
    """The fall from the random start runs off the top, so that the rest has the height."""
    early = sorted(train[len(train) // 50 : len(train) // 50 + 5])
    high = max([early[len(early) // 2], *validation])
    low = min([*train, *validation])
    margin = 0.05 * max(high - low, 1e-3)
    return low - margin, high + margin
