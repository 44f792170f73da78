"""A run's own loss law, L = a C^b or L = E + a C^b, fitted to the part of its curve that one law can hold for.

Owns: which part that is, the fit, intervals, what it says beyond the curve.
Does not own: what follows from it (``report.advice``). Needs scipy, which is asked for by name.

A law in compute is one of runs that end there. At a constant learning rate the losses on the way come close to that;
under a falling one they do not, since each of them would be lower had the rate come down by then. So the two are never
in one fit: annealed steps are left out and counted.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from growth_megatron.errors import ConfigError
from growth_megatron.report.recovery import recovered_training

FEWEST_POINTS = 20
LEAST_RANGE = 3.0
"""From the first to the last FLOPs of a fit; less than that, and any curve is a power law."""
_LARGEST_RANGE = 10.0  # what is older says more of the start than of where the run goes
_SAME_RATE = 0.005  # relative
_FEWEST_VALIDATIONS = 12
_CONFIDENCE = 0.95
_STILL = 1e-12
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """The stretch of one stage that a law may be fitted to; losses in nats per token against cumulative FLOPs."""

    stage: str
    kind: str
    """Of loss: training or validation."""
    flops: tuple[float, ...]
    losses: tuple[float, ...]
    steps: tuple[int, int]
    rate: float
    annealed: int
    """Training records of the stage that are left out because the learning rate was falling."""


@dataclass(frozen=True)
class Law:
    """L = E + a C^b with 95 % intervals; E is 0 and has none where it was not fitted."""

    a: float
    b: float
    irreducible: float
    b_interval: tuple[float, float]
    irreducible_interval: tuple[float, float] | None
    residual: float
    """Standard deviation of the losses around the law, in nats per token."""
    reference: float
    """FLOPs in the middle of the curve, where the loss above E is the first of what ``covariance`` is of."""
    covariance: Array
    """Of that loss, b and, where it was fitted, E."""
    quantile: float

    def at(self, flops: float) -> tuple[float, float, float]:
        """Loss at ``flops``, and the ends of its interval (of the law, without the spread of batches around it)."""
        x = math.log(flops / self.reference)
        at_reference, grown = self.a * self.reference**self.b, math.exp(self.b * x)
        loss = self.irreducible + at_reference * grown
        gradient = np.array([grown, at_reference * grown * x, 1.0][: len(self.covariance)])
        error = self.quantile * math.sqrt(float(gradient @ self.covariance @ gradient))
        return loss, loss - error, loss + error


def law_part(records: Sequence[Mapping[str, Any]], stage: str) -> Part | str:
    """What of ``stage`` one law can hold for, or why there is none: a sentence with what would be enough."""
    train = [r for r in records if r["kind"] == "train" and r["stage"] == stage and r.get("loss") is not None]
    train = [r for r in train if r.get("learning_rate") and r.get("flops")]
    if not train:
        return f"stage {stage} has no training records with a learning rate"
    begin = train[0]["step"] - train[0]["stage_step"]
    growth = next((r for r in records if r["kind"] == "growth" and r["step"] == begin), None)
    first = 0
    if growth is not None:
        back = recovered_training(records, growth)
        if back is None:
            return f"stage {stage} has not come back to the loss before its growth yet"
        first = growth["step"] + back.steps
    peak = max(r["learning_rate"] for r in train)
    held = [r for r in train if abs(r["learning_rate"] - peak) <= _SAME_RATE * peak]
    annealed = sum(r["step"] > held[-1]["step"] for r in train)
    kept = [r for r in held if r["step"] >= first and r["flops"] >= held[-1]["flops"] / _LARGEST_RANGE]
    if annealed > 2 * len(held):
        return (
            f"the learning rate of stage {stage} falls from early on ({annealed} of {len(train)} records are of "
            "falling rates), so its losses are not those of runs that end there; schedule.kind constant or wsd gives a "
            "curve that can be fitted"
        )
    return _part(records, stage, kept, peak, annealed)


def _part(
    records: Sequence[Mapping[str, Any]], stage: str, kept: Sequence[Mapping[str, Any]], rate: float, annealed: int
) -> Part | str:
    wide = kept[-1]["flops"] / kept[0]["flops"] if kept else 1.0
    if len(kept) < FEWEST_POINTS or wide < LEAST_RANGE:
        return (
            f"the curve of stage {stage} at a constant learning rate is too short: {len(kept)} records over a factor "
            f"of {wide:.2g} in FLOPs, needed are {FEWEST_POINTS} over a factor of {LEAST_RANGE:g}"
        )
    steps = (kept[0]["step"], kept[-1]["step"])
    points = [(r["flops"], r["loss"]) for r in kept]
    validation = [
        (r["flops"], r["validation_loss"])
        for r in records
        if r["kind"] == "validation" and r.get("stage", stage) == stage and r.get("validation_loss") is not None
        and r.get("flops") and steps[0] <= r["step"] <= steps[1]
    ]  # fmt: skip
    held_out = len(validation) >= _FEWEST_VALIDATIONS and validation[-1][0] / validation[0][0] >= LEAST_RANGE
    flops, losses = zip(*(validation if held_out else points), strict=True)
    return Part(stage, "validation" if held_out else "training", flops, losses, steps, rate, annealed)


def fit_law(part: Part, *, irreducible: bool) -> Law | None:
    """Least squares; None where the curve does not settle a law of this form (b not below 0, or E not above).

    Residuals of neighbouring records go together, which makes them fewer than they seem: intervals are widened by the
    correlation of neighbours.

    Raises: ConfigError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("fitting a run's curve needs scipy: pip install 'growth-megatron[advise]', or scipy")
    from scipy.optimize import curve_fit  # optional
    from scipy.stats import t

    flops, losses = np.array(part.flops), np.array(part.losses)
    reference = math.sqrt(part.flops[0] * part.flops[-1])
    x = np.log(flops / reference)
    lowest = float(losses.min())
    start = [float(losses.mean()) * (0.4 if irreducible else 1.0), -0.1] + ([0.6 * lowest] if irreducible else [])

    def law(x: Array, scale: float, b: float, e: float = 0.0) -> Array:
        return np.asarray(e + scale * np.exp(b * x))

    try:
        found, covariance = curve_fit(law, x, losses, p0=start, maxfev=20_000)
    except RuntimeError:  # it did not converge
        return None
    residuals = losses - law(x, *found)
    widened = _widening(residuals)
    covariance = covariance * widened
    left = max(1.0, len(losses) / widened - len(found))
    quantile = float(t.ppf(0.5 + _CONFIDENCE / 2, left))
    errors = quantile * np.sqrt(np.diag(covariance))
    e = float(found[2]) if irreducible else 0.0
    if found[1] >= 0 or not np.all(np.isfinite(covariance)) or (irreducible and not errors[2] < e < lowest):
        return None
    return Law(
        a=float(found[0]) * reference ** -float(found[1]),
        b=float(found[1]),
        irreducible=e,
        b_interval=(float(found[1] - errors[1]), float(found[1] + errors[1])),
        irreducible_interval=(e - float(errors[2]), e + float(errors[2])) if irreducible else None,
        residual=float(residuals.std(ddof=len(found))),
        reference=reference,
        covariance=covariance,
        quantile=quantile,
    )


def _widening(residuals: Array) -> float:
    """Records for each that is worth one, of residuals whose neighbours correlate by r: (1 + r) / (1 - r)."""
    total = float(residuals @ residuals)
    if total < _STILL:
        return 1.0
    r = min(0.95, max(0.0, float(residuals[1:] @ residuals[:-1]) / total))
    return (1 + r) / (1 - r)
