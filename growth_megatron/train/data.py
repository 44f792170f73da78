"""The data of a run's stages, checked before anything is done and opened when their stage begins.

Owns: which checks and datasets a stage needs. Does not own: what they do (``data``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.huggingface.tokenizer import stored_tokenizer
from growth_megatron.config.run_schema import RunConfig
from growth_megatron.config.schema import (
    StageConfig,
)
from growth_megatron.data.contents import check_contents
from growth_megatron.data.dataset import (
    FiniteSource,
    InVocabulary,
    SampleSource,
    build_train_dataset,
    build_validation_dataset,
)
from growth_megatron.data.fingerprint import fingerprint
from growth_megatron.data.prepared import check_data
from growth_megatron.parallel import collectives


@dataclass(frozen=True)
class StageData:
    """What a stage reads."""

    train: SampleSource
    validation: FiniteSource | None
    fingerprint: Mapping[str, Any]
    tokenizer_files: Mapping[str, bytes]
    """What a checkpoint keeps of the tokenizer; on rank 0."""


class RunData:
    """The data of all stages. Every method is called on all ranks alike."""

    def __init__(self, config: RunConfig, directory: Path, checkpoint: Path | None = None) -> None:
        """``checkpoint``: what the run goes on from, which may hold a tokenizer."""
        self._config, self._directory, self._checkpoint = config, directory, checkpoint
        self._opened: tuple[StageConfig, StageData] | None = None

    def check(self, first: int = 0) -> None:
        """Refuse what no stage from ``first`` on could train on; what needs much reading is shared by the ranks.

        Raises: DataError, on all ranks.
        """
        stages = self._config.stages[first:]
        for number, stage in enumerate(stages):
            if all(stage.data != earlier.data for earlier in stages[:number]):
                vocabulary, entries = stage.model.vocab_size, (*stage.data.train, *stage.data.validation)
                own = entries[collectives.rank() :: collectives.world_size()]
                collectives.on_all_ranks(partial(check_data, stage.data, vocabulary))
                collectives.on_all_ranks(partial(check_contents, own, vocabulary, self._cache(stage)))

    def of(self, stage: StageConfig) -> StageData:
        """What ``stage`` reads; opened anew only where the stage before read something else."""
        if self._opened is not None:
            before, opened = self._opened
            if (before.data, before.model.sequence_length) == (stage.data, stage.model.sequence_length):
                return opened
        self._opened = stage, self._open(stage)
        return self._opened[1]

    def _open(self, stage: StageConfig) -> StageData:
        data, length, seed, cache = stage.data, stage.model.sequence_length, self._config.run.seed, self._cache(stage)
        train = collectives.on_all_ranks(lambda: build_train_dataset(data, length, seed, cache))
        samples = self._config.evaluation.samples
        validation = collectives.on_all_ranks(lambda: build_validation_dataset(data, length, samples, cache))
        tokenizer = data.tokenizer or self._checkpoint
        kept: dict[str, bytes] = {}
        if tokenizer is not None:
            collectives.on_rank_zero(lambda: kept.update(stored_tokenizer(Path(tokenizer))))
        return StageData(
            InVocabulary(train, stage.model.vocab_size),
            None if validation is None else InVocabulary(validation, stage.model.vocab_size),
            collectives.on_rank_zero(lambda: fingerprint(data, length, seed, cache)),
            kept,
        )

    def _cache(self, stage: StageConfig) -> Path:
        return Path(stage.data.cache_directory or os.path.join(self._directory, "data_cache"))
