"""``evaluation.tasks`` of a run: the harness over the model as it trains.

Owns: what is loaded before the first step, and one evaluation. Does not own: when (``train.loop``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from growth_megatron.config.run_schema import EvaluationConfig
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.errors import ConfigError
from growth_megatron.evaluate.live_model import LiveModel
from growth_megatron.evaluate.results import figures
from growth_megatron.evaluate.tasks import load_tasks
from growth_megatron.parallel import collectives
from growth_megatron.train.engine import Engine
from growth_megatron.train.loop import TaskEvaluation


def prepare_tasks(settings: EvaluationConfig, tokenizer: Path | None) -> TaskEvaluation:
    """What evaluates the tasks of ``settings``, with their documents at hand.

    Raises: ConfigError without a tokenizer, or for a task that cannot be had.
    """
    if tokenizer is None:
        raise ConfigError("evaluation.tasks need a tokenizer; name it as data.tokenizer, or leave the tasks out")
    text = collectives.on_all_ranks(lambda: open_tokenizer(tokenizer))
    loaded = load_tasks(settings.tasks, Path(settings.include_path) if settings.include_path else None)

    def evaluate(engine: Engine, alive: Callable[[], None]) -> Mapping[str, Any]:
        from growth_megatron.evaluate.harness import DistributedLM, run_harness  # loads lm-eval

        stage = engine.stage
        tokens = stage.training.micro_batch_size * stage.model.sequence_length  # what is known to fit
        model = LiveModel(engine.models, stage.model, stage.parallel, tokens)
        lm = DistributedLM(model, text, bar=False, alive=alive)
        return figures(run_harness(lm, loaded, limit=settings.tasks_limit, errors=False))

    return evaluate
