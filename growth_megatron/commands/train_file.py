"""``TARGET/train.yaml``: how to go on from a checkpoint that was grown or imported by hand.

Owns: what the file says, and the command that is printed. Does not own: what it may say (``config.schema``).

It is there to be changed, so no manifest answers for it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from growth_megatron.checkpoint.folder.manifest import TRAIN_FILE_NAME, read_manifest
from growth_megatron.checkpoint.origin import Origin
from growth_megatron.config.document import dump
from growth_megatron.config.load import read_config
from growth_megatron.config.messages import STAGE_SECTIONS
from growth_megatron.config.schema import ModelConfig, ParallelConfig, StageConfig
from growth_megatron.data.tokenizer import FILE_NAMES
from growth_megatron.errors import ConfigError
from growth_megatron.growth.masks import masked_plan
from growth_megatron.growth.ramps import last_step

_USUAL_LENGTH = 4096


def write_train_file(target: Path, geometry: ModelConfig, origin: Origin | None = None) -> list[str]:
    """Write ``target/train.yaml``, a whole configuration of one stage, and return lines that say how to go on.

    All but the geometry and the run's directory is that of the run which ``origin`` is of, where it is of one.
    """
    former = former_run(origin) if origin is not None else None
    content = former or _fresh_run(target)
    content["model"] = geometry.model_dump(mode="json", exclude_none=True)
    if former is None:  # a model for long contexts is seldom trained on them
        content["model"]["sequence_length"] = min(geometry.sequence_length, _USUAL_LENGTH)
    content["run"]["directory"] = next(name for name in _run_names(target) if not Path(name).exists())
    content.setdefault("checkpoint", {})["resume"] = str(target)
    if any((target / name).is_file() for name in FILE_NAMES):
        content["data"]["tokenizer"] = str(target)
    content["parallel"].pop("data_parallel_size", None)  # what remains of the world
    if (plan := masked_plan(read_manifest(target))) is not None and "steps" in content["training"]:
        content["training"]["steps"] = max(content["training"]["steps"], last_step(plan.ramps))
    if not _fits(content):
        content["parallel"] = {}
    path = target / TRAIN_FILE_NAME
    head = f"# Goes on from {target}, as a run of its own. Change what you like.\n"
    path.write_text(head + dump(content), encoding="utf-8")
    ranks = ParallelConfig.model_validate(content["parallel"]).model_parallel_size
    start = "growth-megatron" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m growth_megatron"
    data = f"name its data ({content['data']['train'][0]['path']} is a guess) in {path}, then "
    return [f"{'' if former else data}go on with: {start} train {shlex.quote(str(path))}"]


def _run_names(target: Path) -> Iterator[str]:
    return (f"{target}_run{number if number > 1 else ''}" for number in count(1))


def former_run(origin: Origin) -> dict[str, Any] | None:
    """The sections of the stage that the checkpoint is of."""
    for name, stage in ((TRAIN_FILE_NAME, 0), ("config.yaml", origin.manifest.stage)):
        with suppress(ConfigError):  # not there, or of another version
            config = read_config(origin.path / name).config
            content = config.model_dump(mode="json", exclude_none=True, exclude={"stages"})
            chosen = config.stages[min(stage, len(config.stages) - 1)]
            return content | chosen.model_dump(mode="json", exclude_none=True, include=set(STAGE_SECTIONS))
    return None


def _fresh_run(target: Path) -> dict[str, Any]:
    return {
        "run": {},
        "data": {"train": [{"path": f"{target}_data"}], "validation_fraction": 0.01},
        "parallel": {},
        "schedule": {"learning_rate": 1e-4, "min_learning_rate": 1e-5, "warmup_steps": 100},
        "training": {"steps": 1000, "global_batch_size": 32},
        "checkpoint": {"interval_steps": 100},
        "evaluation": {"interval_steps": 100},
    }


def _fits(content: dict[str, Any]) -> bool:
    """Whether the layout goes with the geometry; all else did before."""
    try:
        StageConfig.model_validate({"name": "main", **{key: content[key] for key in STAGE_SECTIONS if key in content}})
    except ValidationError:
        return False
    return True
