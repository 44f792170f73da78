"""The curves and marks of a run's page, as data for its script.

Owns: which quantities are drawn, how many points of them, which events are marked and where.
Does not own: the page (``report.page``), how it looks (``report/page.html``).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from growth_megatron.report.plots import growth_change
from growth_megatron.report.recovery import recovered_training

Record = Mapping[str, Any]

AXES = {"tokens": "consumed_tokens", "flops": "flops", "step": "step"}
QUANTITIES = ("loss", "learning_rate", "tokens_per_s", "grad_norm")
LARGEST_POINTS = 2400
"""Of a quantity over the whole run: a page stays small however long the run was."""

_MARKED = {
    "skip": "step skipped",
    "rollback": "rolled back",
    "stop": "stopped",
    "non_finite": "not finite",
    "save_failed": "save failed",
    "branch": "branched off",
}
_STAGE_STEPS = re.compile(r"steps (\d+) to ")


def page_series(records: Sequence[Record]) -> dict[str, Any]:
    """``stages`` (name, points of each axis and quantity), ``validation``, ``growths`` and ``marks``, JSON-able.

    Long curves are means over equal stretches of records; a value that is missing is None. Losses are in nats per
    token, throughput in tokens a second.
    """
    train = [r for r in records if r["kind"] == "train" and _placed(r)]
    places = _Places(records)
    stretch = max(1, math.ceil(len(train) / LARGEST_POINTS))
    names = dict.fromkeys(r["stage"] for r in train)
    validation = [r for r in records if r["kind"] == "validation" and _placed(r)]
    return {
        "stages": [{"name": name, **_thinned([r for r in train if r["stage"] == name], stretch)} for name in names],
        "validation": [
            {**_place(r), "loss": r["validation_loss"]} for r in validation if r.get("validation_loss") is not None
        ],
        "growths": [_growth(r, records, places) for r in records if r["kind"] == "growth"],
        "marks": [mark for r in records if r["kind"] == "event" and (mark := _mark(r, places)) is not None],
    }


def _placed(record: Record) -> bool:
    return all(isinstance(record.get(key), int | float) for key in AXES.values())


def _place(record: Record) -> dict[str, float]:
    return {axis: record[key] for axis, key in AXES.items()}


def _thinned(records: Sequence[Record], stretch: int) -> dict[str, list[float | None]]:
    parts = [records[start : start + stretch] for start in range(0, len(records), stretch)]
    columns: dict[str, list[float | None]] = {axis: [part[-1][key] for part in parts] for axis, key in AXES.items()}
    for quantity in QUANTITIES:
        columns[quantity] = [_mean([r[quantity] for r in part if r.get(quantity) is not None]) for part in parts]
    return columns


def _mean(values: Sequence[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return float(f"{mean:.6g}") if math.isfinite(mean) else None


class _Places:
    """Tokens and FLOPs of the run at a step: of the last record that is not beyond it."""

    def __init__(self, records: Sequence[Record]) -> None:
        placed = [r for r in records if r["kind"] in ("train", "validation") and _placed(r)]
        self._records = sorted(placed, key=lambda r: (r["step"], r["flops"]))
        self._steps = [r["step"] for r in self._records]

    def at(self, step: int) -> dict[str, float]:
        index = bisect_right(self._steps, step)
        return {"tokens": 0, "flops": 0} | (_place(self._records[index - 1]) if index else {}) | {"step": step}


def _growth(record: Record, records: Sequence[Record], places: _Places) -> dict[str, Any]:
    back = recovered_training(records, record)
    return {
        **places.at(record["step"]),
        "operator": str(record.get("operator")),
        "change": growth_change(record),
        "before": record.get("validation_loss_before"),
        "after": record.get("validation_loss_after"),
        "recovered": None if back is None else places.at(record["step"] + back.steps),
    }


def _mark(record: Record, places: _Places) -> dict[str, Any] | None:
    event, step = record.get("event"), record.get("step")
    message = str(record.get("message", ""))
    what = _MARKED.get(str(event))
    if event == "stage" and (found := _STAGE_STEPS.search(message)) and int(found[1]) > 0:
        what = "resumed"
    if what is None or step is None:
        return None
    return {**places.at(step), "what": what, "message": message}
