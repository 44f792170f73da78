"""Learning rate as a pure function of the step: never stored, so never stale after a resume.

Owns: the curves, and which steps of a growing run they are counted over.
Does not own: setting the rate in an optimizer (``train.engine``).
"""

from __future__ import annotations

import math

from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schedule_schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Rate of the update that follows ``step`` finished ones (0-based), of ``total_steps``.

    Linear warm-up to the peak, then: ``cosine`` to the minimum over ``decay_steps`` (default: all), flat afterwards;
    ``wsd`` constant, then linear to the minimum over the last ``decay_steps`` (default: a tenth); ``constant``.
    """
    peak, low, warmup = schedule.learning_rate, schedule.min_learning_rate, schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, total_steps // 10)
        done = (step - (total_steps - decay)) / decay
        return peak - (peak - low) * min(1.0, max(0.0, done))
    end = schedule.decay_steps or total_steps
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))


def schedule_position(config: RunConfig, stage: int, stage_step: int) -> tuple[int, int]:
    """Step and total to give to ``learning_rate``.

    A stage that restarts its schedule counts from its own start; ``schedule: continue`` counts on from the last stage
    that (re)started, over all the stages that continue it.
    """
    first = stage
    while _continues(config, first):
        first -= 1
    last = stage
    while last + 1 < len(config.stages) and _continues(config, last + 1):
        last += 1
    before = sum(s.num_steps for s in config.stages[first:stage])
    return before + stage_step, sum(s.num_steps for s in config.stages[first : last + 1])


def _continues(config: RunConfig, stage: int) -> bool:
    growth = config.stages[stage].growth
    return growth is not None and growth.schedule == "continue"
