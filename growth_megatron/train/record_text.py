"""Records of metrics.jsonl as lines for people.

Owns: the wording of each kind of record. Does not own: numbers and units (``config.units``), where lines are shown
(``train.console``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growth_megatron.config.units import count, duration, fixed, size

Record = Mapping[str, Any]


def geometry(value: Any) -> str:
    """A model in a few words, from the mapping that a growth record carries."""
    if not isinstance(value, Mapping):
        return str(value)
    layers, hidden = value.get("num_layers"), value.get("hidden_size")
    return f"{layers} layers x {hidden}" if hidden is not None else f"{layers} layers"


def train_values(record: Record) -> dict[str, str]:
    """What is shown of a training record, by label, in the order of display."""
    mfu = record.get("mfu")
    rate = record.get("learning_rate")
    tflops = record.get("tflops_per_s")
    return {
        "loss": fixed(record.get("loss")),
        "lr": "n/a" if rate is None else f"{rate:.2e}",
        "grad norm": fixed(record.get("grad_norm"), 3),
        "tokens/s": count(record.get("tokens_per_s")),
        "TFLOP/s per device": "n/a" if tflops is None else f"{tflops:.3g}",
        "MFU": "n/a" if mfu is None else f"{100 * mfu:.1f} %",
        "memory": size(record.get("memory_bytes")),
    }


def event_line(record: Record) -> str:
    """One line for a record of any kind but train."""
    kind = record["kind"]
    text = _EVENT_TEXTS.get(kind, _other_text)(record)
    at = "" if record.get("step") is None else f"step {record['step']}  "
    return f"{kind:<10}  {at}{text}"


def _learn_text(record: Record) -> str:
    values = [f"{label} {value}" for label, value in train_values(record).items() if value != "n/a"]
    return f"{record['stage']}  maps {record['phase_step']}/{record['phase_steps']}  {'  '.join(values)}"


def _validation_text(record: Record) -> str:
    flops = record.get("flops")
    cost = "" if flops is None else f"  after {count(record.get('consumed_tokens'))} tokens, {flops:.3g} FLOPs"
    return f"validation loss {fixed(record.get('validation_loss'))}{cost}"


def _checkpoint_text(record: Record) -> str:
    seconds, written = record.get("seconds"), record.get("bytes")
    text = f"saved {record.get('path', '')}  {size(written)} in {duration(seconds)}"
    if seconds and written:
        text += f" ({size(written / seconds)}/s)"
    blocking = record.get("blocking_seconds")
    return text if blocking is None or seconds is None or blocking > 0.9 * seconds else (
        f"{text}, training waited {duration(blocking)}"
    )  # fmt: skip


def _growth_text(record: Record) -> str:
    source, target = geometry(record.get("source_geometry")), geometry(record.get("target_geometry"))
    text = f"{record.get('operator')}: {source} -> {target}"
    before, after = record.get("validation_loss_before"), record.get("validation_loss_after")
    if before is not None or after is not None:
        text += f", validation loss {fixed(before)} -> {fixed(after)}"
    if record.get("optimizer_state"):
        text += f", optimizer state {record['optimizer_state']}"
    if record.get("seconds") is not None:  # unknown where a restart came between growth and this record
        text += f", {duration(record['seconds'])}, {size(record.get('bytes_written'))} written"
    return text


def _other_text(record: Record) -> str:
    if record.get("message"):
        return str(record["message"])
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()
                     if k not in ("kind", "step", "time"))  # fmt: skip


def _evaluation_text(record: Record) -> str:
    """The first figure of each task."""
    found = [(task, *next(iter(figures.items()))) for task, figures in record["results"].items() if figures]
    text = ", ".join(f"{task} {metric} {fixed(value)}" for task, metric, value in found)
    return f"{text}  in {duration(record.get('seconds'))}"


_EVENT_TEXTS = {
    "learn": _learn_text,
    "validation": _validation_text,
    "checkpoint": _checkpoint_text,
    "growth": _growth_text,
    "evaluation": _evaluation_text,
}
