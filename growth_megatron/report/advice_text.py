"""Advice and a run's own law as text.

Owns: the wording. Does not own: what is said (``report.advice``, ``report.power_law``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growth_megatron.config.tables import columns
from growth_megatron.config.units import count
from growth_megatron.report.advice import Advice
from growth_megatron.report.curves import RunSummary
from growth_megatron.report.power_law import Law, Part, fit_law, law_part
from growth_megatron.train.record_text import geometry

_PLACES = {True: "inside", False: "OUTSIDE", None: "not known for so small a model"}
_LATE_SHARE = 10  # one of so many validations of a grown stage is its end


def render_advice(advice: Advice, summary: RunSummary, records: Sequence[Mapping[str, Any]]) -> str:
    """The verdict, what it rests on, and the run's own curve.

    Raises: ConfigError: scipy is not installed.
    """
    a_parameter = advice.tokens / advice.parameters
    lines = [
        f"{summary.directory}, step {advice.step:,}: {geometry(summary.stages[-1].geometry)}, {count(advice.tokens)} "
        f"tokens, {a_parameter:.3g} for each of {count(advice.parameters)} parameters"
    ]
    if advice.grow is False:
        return "\n".join([*lines, f"advice: {advice.verdict}", "", *own_curve(summary, records)])
    lines += [
        f"asked for: {geometry(advice.target.model_dump())} (x{advice.factor} in depth), "
        f"{count(advice.target_parameters)} parameters, {count(advice.tokens_of_target)} tokens, the base's counted",
        "",
        f"advice: {advice.verdict}",
        *(f"        {reason}" for reason in advice.reasons),
        advice.saving,
    ]
    rows = [("source", "says", "fitted in", "this run", "")]
    rows += [
        (each.source, each.says, each.fitted_in, each.this_run, _PLACES[each.inside]) for each in advice.statements
    ]
    return "\n".join([*lines, "", *columns(rows), "", *own_curve(summary, records)])


def own_curve(summary: RunSummary, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The laws fitted to the run's newest stage, and where it grew, how it stands against the law of its base."""
    names = [stage.name for stage in summary.stages]
    part = law_part(records, names[-1])
    if isinstance(part, str):
        lines = [f"own curve: nothing is fitted: {part}"]
    else:
        lines = [
            f"own curve: {part.kind} loss of stage {part.stage}, steps {part.steps[0]:,} to {part.steps[1]:,} at the "
            f"constant rate {part.rate:.3g}, {part.flops[0]:.3g} to {part.flops[-1]:.3g} FLOPs"
            + (f" ({part.annealed} records of falling rates left out)" if part.annealed else ""),
            *_laws(part),
        ]
    if summary.growths and len(names) > 1:
        lines.append(_against_base(summary, records))
    return lines


def _laws(part: Part) -> list[str]:
    lines = []
    for irreducible, form in ((False, "L = a C^b"), (True, "L = E + a C^b")):
        law = fit_law(part, irreducible=irreducible)
        if law is None:
            lines.append(f"  {form}: not settled by this curve")
            continue
        e = ""
        if law.irreducible_interval is not None:
            low, high = law.irreducible_interval
            e = f"E = {law.irreducible:.3f} ({low:.3f} to {high:.3f}), "
        low, high = law.b_interval
        now, twice = law.at(part.flops[-1])[0], law.at(2 * part.flops[-1])
        lines.append(
            f"  {form}: {e}a = {law.a:.4g}, b = {law.b:.4f} ({low:.4f} to {high:.4f}), {law.residual:.4f} around it; "
            f"twice the FLOPs on this model: {now:.4f} -> {_interval(twice)}"
        )
    return [*lines, "  intervals of 95 %, for the law alone; beyond the curve they hold only if the law does"]


def _interval(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.4f} ({found[1]:.4f} to {found[2]:.4f})"


def _against_base(summary: RunSummary, records: Sequence[Mapping[str, Any]]) -> str:
    """The run now against its first model, had that gone on to the same FLOPs."""
    base, growth = summary.stages[0], summary.growths[0]
    part = law_part([r for r in records if r.get("step") is not None and r["step"] <= growth.step], base.name)
    if isinstance(part, str):
        return f"has the growth paid? not to be said: {part}"
    laws = [law for irreducible in (False, True) if (law := fit_law(part, irreducible=irreducible)) is not None]
    now = _loss_now(records, summary.stages[-1].name, part.kind)
    if not laws or now is None:
        return "has the growth paid? not to be said: the base's curve settles no law, or no loss of its kind follows"
    return f"has the growth paid? {_paid(laws, now, summary.flops, growth.flops)}"


def _loss_now(records: Sequence[Mapping[str, Any]], stage: str, kind: str) -> float | None:
    """The end of a stage: its last validation, or the mean of its last training losses."""
    name = "validation_loss" if kind == "validation" else "loss"
    kinds = {"validation": "validation", "training": "train"}
    found = [
        r[name] for r in records if r["kind"] == kinds[kind] and r.get("stage") == stage and r.get(name) is not None
    ]
    last = found[-1:] if kind == "validation" else found[-max(1, len(found) // _LATE_SHARE) :]
    return sum(last) / len(last) if last else None


def _paid(laws: Sequence[Law], now: float, flops: float, then: float) -> str:
    expected = [law.at(flops) for law in laws]
    low, high = min(each[1] for each in expected), max(each[2] for each in expected)
    found = "below" if now < low else "above" if now > high else "within"
    answer = {"below": "yes", "above": "not yet", "within": "not to be told"}[found]
    return (
        f"{answer}: {now:.4f} at {flops:.3g} FLOPs is {found} the {low:.4f} to {high:.4f} that the base's own law "
        f"gives there, {flops / then:.2g} times beyond its curve (a learning rate that has come down since would "
        "flatter the grown model)"
    )
