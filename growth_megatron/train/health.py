"""Whether a step's update may be made, and what ``training.on_non_finite`` does where it may not.

Owns: the band above which a loss is a spike, the decision and its words.
Does not own: seeing it alike on all ranks (``train.engine``), leaving a step out (``train.loop``), going back to a
checkpoint (``train.stages``).
"""

from __future__ import annotations

import dataclasses
import math

from growth_megatron.config.schema import TrainingConfig
from growth_megatron.errors import GrowthMegatronError
from growth_megatron.train.counters import BAND_STEPS, Counters


@dataclasses.dataclass(frozen=True)
class RollBack:
    """To go on from the last checkpoint, with other samples than those that led here."""

    reason: str
    next_sample: int
    """Of the stream: the first one not read yet."""


def highest_loss(counters: Counters, training: TrainingConfig) -> float:
    """The largest loss whose step is taken; no bound until a stage's first steep descent has left the averages."""
    if training.spike_deviations is None or counters.stage_step < 4 * BAND_STEPS:
        return math.inf
    return counters.loss_mean + training.spike_deviations * counters.loss_deviation


def fault(loss: float, grad_norm: float, highest: float) -> str:
    """Why a step was not taken, in words."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if loss > highest:
        return f"the loss {loss:.4f} is a spike (training.spike_deviations allows {highest:.4f})"
    return f"the gradient norm is {grad_norm}"


def stopping(what: str, step: int) -> GrowthMegatronError:
    """The error that ends a run whose policy, or the end of whose patience, is to stop."""
    return GrowthMegatronError(
        f"{what} at step {step}: the update was not made, nothing was saved of it, and what was saved is finite. Give "
        "the command again with training.on_non_finite=skip, which leaves out such steps, or =rollback, which goes on "
        "from the last checkpoint past these samples (training.non_finite_limit bounds both), or with a lower "
        "schedule.learning_rate"
    )
