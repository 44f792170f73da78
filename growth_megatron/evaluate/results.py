"""What a run of the harness found, as figures and as a table.

Owns: names of figures, the table. Does not own: the figures (``evaluate.harness``). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growth_megatron.config.tables import columns

_NO_FIGURES = ("alias", "name", "sample_len", "sample_count")


def figures(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures by task and metric: ``acc``, ``acc_stderr``; with the filter behind it where it is not ``none``."""
    return {
        task: {
            key.removesuffix(",none").replace(",", "/"): value
            for key, value in values.items()
            if key not in _NO_FIGURES and isinstance(value, int | float)
        }
        for task, values in {**found["results"], **found.get("groups", {})}.items()
    }


def table(found: Mapping[str, Any]) -> list[str]:
    """A line for each figure, with the number of documents and of examples before each."""
    rows = [("task", "documents", "few-shot", "metric", "value", "standard error")]
    for task, values in figures(found).items():
        count = found["n-samples"].get(task, {}).get("effective", "")
        shots = found["n-shot"].get(task, "")
        for metric, value in values.items():
            if "_stderr" in metric:
                continue
            name, _, rest = metric.partition("/")
            error = values.get(f"{name}_stderr" + (f"/{rest}" if rest else ""))
            better = {True: " (higher is better)", False: " (lower is better)"}.get(
                found["higher_is_better"].get(task, {}).get(name), ""
            )
            rows.append((task, f"{count:,}" if count else "", str(shots), metric + better, _number(value),
                         "" if error is None else _number(error)))  # fmt: skip
    return columns(rows, right=(1, 2, 4, 5))


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
