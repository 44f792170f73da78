"""Writes the configuration that trains a growing run's last model from scratch, on as many FLOPs and the same data.

    python launch/from_scratch.py CONFIG.yaml [a.b=c ...]

Writes RUN_scratch.yaml beside the growing run's directory RUN and prints its path; its run goes to RUN_scratch.
Rate and schedule are the last stage's, over all steps, but for a longer warm-up: a model that nothing has trained yet
wants one (docs/results.md). Does not own: training (``launch/torchrun.sh``).
"""

from __future__ import annotations

import sys
from pathlib import Path

from growth_megatron.config.document import dump
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.errors import GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.model.cost import flops_per_token
from growth_megatron.train.plan import total_flops

WARM_UP = 0.2
"""Of the steps, at least."""


def from_scratch(config: RunConfig) -> RunConfig:
    """One stage, of the last one's model; its FLOPs are ``config``'s, to half a step."""
    last = config.stages[-1]
    steps = round(total_flops(config) / (flops_per_token(last.model) * last.tokens_per_step))
    training = last.training.model_copy(update={"steps": steps, "tokens": None})
    warm_up = max(last.schedule.warmup_steps, round(WARM_UP * steps))
    schedule = last.schedule.model_copy(update={"warmup_steps": warm_up})
    update = {"name": "scratch", "growth": None, "training": training, "schedule": schedule}
    stage = last.model_copy(update=update)
    run = config.run.model_copy(update={"directory": f"{config.run.directory.rstrip('/')}_scratch"})
    return config.model_copy(update={"run": run, "stages": (stage,)})


def main(arguments: list[str]) -> None:
    try:
        config = from_scratch(load_config(arguments[0], arguments[1:]).config)
    except GrowthMegatronError as error:
        sys.exit(f"growth-megatron train: {error}")
    path = Path(f"{config.run.directory}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(dump(config.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    partial.rename(path)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
