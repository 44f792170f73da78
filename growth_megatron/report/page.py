"""A run as one HTML file: its figures and curves, configuration and history. It opens from disk and loads nothing.

Owns: the tables and the text, that all of it is escaped, the file. Does not own: figures (``report.curves``), the data
of the curves (``report.series``), their drawing and looks (``report/page.html``, ``report/page.js``).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from growth_megatron import __version__
from growth_megatron.checkpoint.folder.manifest import Manifest, read_manifest
from growth_megatron.config.units import count, duration, fixed, size
from growth_megatron.errors import ConfigError, GrowthMegatronError
from growth_megatron.report.curves import GrowthSummary, RunSummary, StageSummary
from growth_megatron.report.recovery import Recovery
from growth_megatron.report.series import page_series
from growth_megatron.train.record_text import geometry

PAGE_NAME = "report.html"
_OURS = '<meta name="generator" content="growth-megatron report">'
_LARGEST_EVENTS = 500
Record = Mapping[str, Any]


def write_page(summary: RunSummary, records: Sequence[Record]) -> Path:
    """Write ``RUN/report.html`` of a summarised run, whole or not at all; an earlier one is replaced.

    Args: records: of the run after its parents' (``report.joined``), as they were summarised.
    Raises: ConfigError where another file has that name, or it cannot be written.
    """
    target = summary.directory / PAGE_NAME
    beside = target.with_name(f".{PAGE_NAME}.{os.getpid()}")
    try:
        if os.path.lexists(target) and _OURS not in target.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise ConfigError(f"{target} is not a page that report has written; move it away, or give --no-page")
        try:
            beside.write_text(page(summary, records), encoding="utf-8")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); permit it, or give --no-page") from error
    return target


def page(summary: RunSummary, records: Sequence[Record]) -> str:
    """The page's text; whatever came from a file is escaped in it."""
    directory = summary.directory.resolve()
    manifest = _newest_manifest(summary.directory)
    values = {
        "name": escape(directory.name),
        "where": escape(str(directory)),
        "verdict": escape(summary.verdict[:1].upper() + summary.verdict[1:]),
        "facts": _facts(summary),
        "sections": "\n".join(_sections(summary, records, manifest)),
        "version": escape(__version__),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "data": _json(page_series(records)),
        "script": _asset("page.js"),
    }
    # In one pass, so that a name of a run that looks like a placeholder stays a name.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _asset("page.html"))


def _json(value: Any) -> str:
    """JSON that ends no script element and opens no comment, whatever is in it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return (files("growth_megatron.report") / name).read_text(encoding="utf-8")


def _newest_manifest(directory: Path) -> Manifest | None:
    try:
        return read_manifest(directory / "latest")
    except GrowthMegatronError:
        return None  # the metrics say enough for all else


def _facts(summary: RunSummary) -> str:
    last = summary.stages[-1]
    facts = {
        "tokens": count(summary.tokens),
        "FLOPs": f"{summary.flops:.3g}",
        "steps": f"{summary.steps:,}",
        "validation loss": fixed(summary.final_validation_loss),
        "training loss": fixed(last.last_loss),
        "parameters": count(last.parameters),
        "time of steps": duration(summary.seconds),
    }
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{cells}</dl>'


def _sections(summary: RunSummary, records: Sequence[Record], manifest: Manifest | None) -> Iterable[str]:
    if summary.growths:
        yield "<h2>Growth</h2>" + _table(_GROWTH_HEAD, map(_growth_row, summary.growths), right=range(4, 8))
    yield "<h2>Stages</h2>" + _table(_STAGE_HEAD, map(_stage_row, summary.stages), right=range(2, 9))
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    if evaluations:
        yield "<h2>Evaluation</h2>" + _evaluations(evaluations)
    yield from _history(summary, manifest)
    events = [r for r in records if r["kind"] == "event"]
    told = ((str(r.get("step", "")), str(r.get("event", "")), str(r.get("message", ""))) for r in events)
    rows = list(dict.fromkeys(told))  # the command given again for a complete run says the same again
    left_out = (
        f'<p class="soft">The last {_LARGEST_EVENTS:,} of {len(rows):,}.</p>' if len(rows) > _LARGEST_EVENTS else ""
    )
    if rows:
        yield (
            "<h2>Events</h2>"
            + left_out
            + _table(("step", "event", "message"), rows[-_LARGEST_EVENTS:], right=(0,), text=2)
        )
    yield _configuration(summary.directory)


_GROWTH_HEAD = (
    "step",
    "operator",
    "model",
    "moments",
    "tokens",
    "validation loss",
    "it was back after",
    "training loss back after",
)


def _growth_row(growth: GrowthSummary) -> tuple[str, ...]:
    return (
        f"{growth.step:,}",
        growth.operator,
        f"{growth.source} → {growth.target}",
        str(growth.optimizer_state),
        count(growth.tokens),
        f"{fixed(growth.loss_before)} → {fixed(growth.loss_after)}",
        _back(growth.recovered_validation),
        _back(growth.recovered),
    )


def _back(recovery: Recovery | None) -> str:
    return "not yet" if recovery is None else f"{recovery.steps:,} steps, {count(recovery.tokens)} tokens"


_STAGE_HEAD = ("stage", "model", "parameters", "steps", "tokens", "FLOPs", "training loss", "validation", "tokens/s")


def _stage_row(stage: StageSummary) -> tuple[str, ...]:
    return (
        stage.name,
        "n/a" if stage.geometry is None else geometry(stage.geometry),
        count(stage.parameters),
        f"{stage.steps:,}",
        count(stage.tokens),
        f"{stage.flops:.3g}",
        f"{fixed(stage.first_loss, 3)} → {fixed(stage.last_loss, 3)}",
        fixed(stage.last_validation_loss),
        count(stage.tokens_per_s),
    )


def _evaluations(records: Sequence[Record]) -> str:
    """A row for each figure of the newest evaluation of a task with the same settings, with those before it."""
    found: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for record in records:
        settings = _settings(record)
        for task, metrics in (record.get("results") or {}).items():
            for metric, value in metrics.items() if isinstance(metrics, Mapping) else ():
                if isinstance(value, int | float) and "_stderr" not in metric:
                    error = metrics.get(f"{metric}_stderr")
                    spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
                    found.setdefault((task, settings, metric), []).append((record["step"], f"{value:.4f}{spread}"))
    rows = [
        (
            task,
            settings,
            metric,
            figures[-1][1],
            f"{figures[-1][0]:,}",
            ", ".join(f"{v} ({s:,})" for s, v in figures[-6:-1]),
        )
        for (task, settings, metric), figures in found.items()
    ]
    return _table(("task", "settings", "metric", "value", "step", "earlier (step)"), rows, right=(3, 4))


def _settings(record: Record) -> str:
    """What makes two evaluations of a task differ: how many documents, how many examples before each."""
    limit, shots = record.get("limit"), record.get("num_fewshot")
    documents = (
        "all documents" if limit is None else f"limit {limit:g}" if isinstance(limit, int | float) else f"limit {limit}"
    )
    return documents + ("" if shots is None else f", {shots}-shot")


def _history(summary: RunSummary, manifest: Manifest | None) -> Iterable[str]:
    if manifest is None or not (manifest.lineage or manifest.branches):
        return
    steps = [
        (branch.step, 0, f"branched off {branch.source} at step {branch.step:,}, {branch.data} data")
        for branch in manifest.branches
    ]
    steps += [
        (
            grown.step,
            1,
            f"grown by {grown.operator} at step {grown.step:,}: {geometry(grown.source_geometry.model_dump())} → "
            f"{geometry(grown.target_geometry.model_dump())}, optimizer state {grown.optimizer_state}, "
            f"from {grown.source}",
        )
        for grown in manifest.lineage
    ]
    now = f"step {manifest.step:,}: {geometry(manifest.geometry.model_dump())}, {size(manifest.total_bytes)}"
    items = "".join(f"<li>{escape(text)}</li>" for _, _, text in [*sorted(steps), (0, 0, now)])
    yield f'<h2>History of the newest checkpoint</h2><ol class="chain">{items}</ol>'


def _configuration(directory: Path) -> str:
    try:
        text = (directory / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return (
        "<h2>Configuration</h2><details><summary>config.yaml, as it took effect</summary>"
        f"<pre>{escape(text)}</pre></details>"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = (), text: int = -1) -> str:
    flush = dict.fromkeys(right, ' class="right"') | {text: ' class="text"'}
    cells = "".join(f"<th{flush.get(n, '')}>{escape(cell)}</th>" for n, cell in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{flush.get(n, '')}>{escape(cell)}</td>" for n, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
