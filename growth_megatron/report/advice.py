"""When a run should grow, and by how much: what is published, set against where the run stands.

Owns: the verdict, what each source says, the range it was fitted in and the run's place relative to that.
Does not own: the guideline's formula (``report.guideline``), the run's own law (``report.power_law``), the text
(``report.advice_text``).

Only what could be established from public text is here. Of arXiv 2510.06548 that is the form of its law and the
direction of its effect, of arXiv 2605.13405 its findings: the constants of their fits are not included.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.run_directory import CheckpointName
from growth_megatron.config.schema import ModelConfig
from growth_megatron.config.units import count
from growth_megatron.errors import DataError
from growth_megatron.model.cost import parameter_count
from growth_megatron.report.curves import RunSummary
from growth_megatron.report.guideline import (
    FITTED_FLOPS,
    FITTED_PARAMETERS,
    GROWTH_FACTOR,
    LARGEST_SHARE,
    Guideline,
    guideline,
)

TOKENS_PER_PARAMETER = 20.0
"""Of the target where no tokens are given (arXiv 2203.15556), and up to where arXiv 2605.13405 saw most of the gain."""
RELIABLE_FACTOR = 2
MEASURED_SAVINGS = {0.374e9: (31.0, 53.1), 1.1e9: (49.1, 49.1), 3e9: (48.6, 54.5), 7e9: (40.8, 55.3)}
"""Speed-up in per cent at equal training loss by target parameters: one seed each, depth x4, arXiv 2405.15319."""
_ANNEALED = 0.9  # of the peak: below that the base is no longer at a constant rate
_NEAR = 2.0  # times the guideline's tokens, either way: the fit is no better than that


@dataclass(frozen=True)
class Statement:
    """What one source says for this run."""

    source: str
    says: str
    fitted_in: str
    this_run: str
    inside: bool | None
    """None: how far down it holds was not to be had."""


@dataclass(frozen=True)
class Advice:
    """The verdict, its reasons and what it rests on. Tokens and parameters are totals; ``factor`` is in depth."""

    step: int
    tokens: int
    parameters: int
    tokens_of_target: float
    """That the grown model is to have seen in the end, the base's counted."""
    factor: int
    target: ModelConfig
    target_parameters: int
    grow: bool | None
    """None: nothing that is published covers the run."""
    verdict: str
    reasons: tuple[str, ...]
    statements: tuple[Statement, ...]
    saving: str


def advise(
    summary: RunSummary, records: Sequence[Mapping[str, Any]], tokens: float | None = None, factor: int | None = None
) -> Advice:
    """Advice for a run as it stands.

    Args:
        records: of the run after its parents' (``report.joined``).
        tokens: that the grown model is to have seen in the end; default: 20 for each of its parameters.
        factor: by which it is to get deeper; default: 4 where the guideline was fitted for what that gives, else 2.

    Raises: DataError where the run's geometry is not known.
    """
    stage = summary.stages[-1]
    if stage.geometry is None:
        raise DataError(f"{summary.directory} has no config.yaml that says its geometry; put back the one it ran with")
    model = ModelConfig(**stage.geometry)
    factor = factor or _factor(model)
    target = ModelConfig(**(model.model_dump() | {"num_layers": factor * model.num_layers}))
    size = parameter_count(target).total
    budget = tokens or TOKENS_PER_PARAMETER * size
    found = guideline(size, budget)
    grow, verdict = _verdict(summary, records, found, factor)
    return Advice(
        step=_last_step(records),
        tokens=summary.tokens,
        parameters=parameter_count(model).total,
        tokens_of_target=budget,
        factor=factor,
        target=target,
        target_parameters=size,
        grow=grow,
        verdict=verdict,
        reasons=tuple(_reasons(summary, records, found)),
        statements=_statements(summary.tokens, parameter_count(model).total, found, factor),
        saving=_saving(size),
    )


def _factor(model: ModelConfig) -> int:
    grown = ModelConfig(**(model.model_dump() | {"num_layers": GROWTH_FACTOR * model.num_layers}))
    low, high = FITTED_PARAMETERS
    return GROWTH_FACTOR if low <= parameter_count(grown).total <= high else RELIABLE_FACTOR


def _verdict(
    summary: RunSummary, records: Sequence[Mapping[str, Any]], found: Guideline, factor: int
) -> tuple[bool | None, str]:
    """Whether to grow at all, and the sentence."""
    seen, when = summary.tokens, found.growth_tokens
    if summary.growths:
        last = summary.growths[-1]
        return False, (
            f"do not grow again: it grew at step {last.step:,} ({last.source} -> {last.target}), and one growth was "
            "better than several (arXiv 2405.15319); nothing that is fitted says when a second one pays"
        )
    if seen >= found.tokens:
        return False, (
            f"do not grow: the {count(found.tokens)} tokens that the target is to have seen "
            f"({found.tokens / found.parameters:.3g} a parameter; --tokens says otherwise) are spent"
        )
    if not found.is_covered:
        return None, (
            "nothing that is published covers so small a run: the guideline rises without bound below what it was "
            f"fitted to (here to {count(found.fitted_growth_tokens)} tokens). Measure it: growth-megatron probe "
            f"{shlex.quote(str(summary.directory))} --candidates growths.yaml --steps N"
        )
    if seen < when / _NEAR:
        more = _steps(when - seen, records)
        return True, f"train on to {count(when)} tokens ({more} more), then grow by {factor} in depth (stack)"
    if seen <= _NEAR * when:
        return True, f"grow now, by {factor} in depth (stack): {count(seen)} tokens are near the fit's {count(when)}"
    earlier = _checkpoint_before(
        summary.directory, when / max(seen, 1) * max(r["step"] for r in records if "step" in r)
    )
    hint = f"; {earlier.name} is nearer to it" if earlier is not None else ""
    return True, (
        f"grow now, by {factor} in depth (stack), and expect less: {count(seen)} tokens are {seen / when:.1f} times "
        f"the fit's {count(when)}{hint}"
    )


def _last_step(records: Sequence[Mapping[str, Any]]) -> int:
    return int(max(r["step"] for r in records if r["kind"] in ("train", "validation")))


def _steps(tokens: float, records: Sequence[Mapping[str, Any]]) -> str:
    last = [r for r in records if r["kind"] == "train"][-2:]
    each = (last[-1]["consumed_tokens"] - last[0]["consumed_tokens"]) / max(1, last[-1]["step"] - last[0]["step"])
    return f"{count(tokens)}, {tokens / each:,.0f} steps" if each > 0 else count(tokens)


def _reasons(summary: RunSummary, records: Sequence[Mapping[str, Any]], found: Guideline) -> list[str]:
    reasons = [f"warning: {text}" for text in found.warnings]
    rates = [r["learning_rate"] for r in records if r["kind"] == "train" and r.get("learning_rate")]
    if rates and not summary.growths and rates[-1] < _ANNEALED * max(rates[len(rates) // 2 :]):
        kept = [r for r in records if r["kind"] == "train" and (r.get("learning_rate") or 0) >= _ANNEALED * max(rates)]
        earlier = _checkpoint_before(summary.directory, kept[-1]["step"])
        where = f"; {earlier} is from before that" if earlier is not None else ""
        reasons.append(
            f"warning: its learning rate is down to {rates[-1] / max(rates):.0%} of the peak, and the published bases "
            f"were not annealed{where}"
        )
    if found.tokens > TOKENS_PER_PARAMETER * found.parameters:
        reasons.append(
            f"{found.tokens / found.parameters:.0f} tokens a parameter of the target: gains were largest below "
            f"{TOKENS_PER_PARAMETER:.0f} and got less above (arXiv 2605.13405)"
        )
    return reasons


def _checkpoint_before(directory: Path, step: float) -> Path | None:
    folder = directory / "checkpoints"
    names = [CheckpointName.parse(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    before = [name for name in names if name is not None and not name.grown and 0 < name.step <= step]
    return folder / str(max(before)) if before else None


def _statements(seen: int, parameters: int, found: Guideline, factor: int) -> tuple[Statement, ...]:
    low, high = FITTED_PARAMETERS
    inside = low <= found.parameters <= high and FITTED_FLOPS[0] <= found.flops <= FITTED_FLOPS[1]
    a_parameter = found.tokens / found.parameters
    cut = f" (the fit's {count(found.fitted_growth_tokens)}, cut to {LARGEST_SHARE:.0%} of all)"
    return (
        Statement(
            "arXiv 2405.15319",
            f"grow at {count(found.growth_tokens)} tokens"
            + (cut if found.growth_tokens < found.fitted_growth_tokens else ""),
            f"targets of {count(low)} to {count(high)}, {FITTED_FLOPS[0]:.2g} to {FITTED_FLOPS[1]:.2g} FLOPs",
            f"{count(found.parameters)} {place(found.parameters, *FITTED_PARAMETERS)}, {found.flops:.2g} FLOPs "
            f"{place(found.flops, *FITTED_FLOPS)}",
            inside,
        ),
        Statement(
            "arXiv 2405.15319",
            "factor 4; 2 to 4 about equally good",
            f"targets of {count(low)} to 7B, in depth",
            f"factor {factor}, {place(found.parameters, low, 7e9)}",
            2 <= factor <= 4 and low <= found.parameters <= 7e9,
        ),
        Statement(
            "arXiv 2605.13405",
            "factor 2 is the most reliable; from some larger one on, training from scratch is better",
            f"most gain below {TOKENS_PER_PARAMETER:.0f} tokens a parameter",
            f"factor {factor}, {a_parameter:.3g} tokens a parameter",
            _fits(factor <= RELIABLE_FACTOR and a_parameter <= TOKENS_PER_PARAMETER, found.parameters),
        ),
        Statement(
            "arXiv 2510.06548",
            "L = A D1^-a1 D2^(-a2 + a3 log D1) + E: the more tokens D1 the base has seen, the slower D2 bring it down",
            "models up to 1.1B; the constants are not included",
            f"D1 = {count(seen)}, {seen / parameters:.3g} a parameter of the base",
            _fits(parameters <= 1.1e9, parameters),
        ),
    )  # fmt: skip


def _fits(within: bool, parameters: float) -> bool | None:
    """Of a source that does not say how small its models were: not known below the smallest of another's."""
    return False if not within else True if parameters >= FITTED_PARAMETERS[0] else None


def place(value: float, low: float, high: float) -> str:
    """Where a value is relative to a range, in words."""
    if value < low:
        return f"({low / value:.3g} times below)"
    return f"({value / high:.3g} times above)" if value > high else "(inside)"


def _saving(parameters: float) -> str:
    sizes = sorted(MEASURED_SAVINGS)
    if not sizes[0] / _NEAR <= parameters <= sizes[-1] * _NEAR:
        return (
            f"expected saving: none is published for a target of {count(parameters)} (measured: {count(sizes[0])} to "
            f"{count(sizes[-1])}); growth-megatron probe and compare measure it"
        )
    nearest = min(sizes, key=lambda size: max(size / parameters, parameters / size))
    low, high = (value / 100 for value in MEASURED_SAVINGS[nearest])
    spread = f"{low:.1%} to {high:.1%}" if high > low else f"{low:.1%}"
    fewer = f"{1 - 1 / (1 + low):.0%} to {1 - 1 / (1 + high):.0%}" if high > low else f"{1 - 1 / (1 + low):.0%}"
    return (
        f"expected saving: a speed-up of {spread} ({fewer} fewer FLOPs), as measured for a target of {count(nearest)} "
        "at equal training loss (arXiv 2405.15319: depth x4, one seed, runs not annealed)"
    )
