"""Tiny corpora, a tokenizer trained on them, and prepared datasets."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from growth_megatron.config.schema import DataConfig
from growth_megatron.data.prepare import prepare_data
from growth_megatron.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ["the", "of", "and", "union", "states", "congress", "people", "year", "law", "peace", "tax", "road", "1", "345"]
VOCABULARY = 320


def make_documents(count: int, seed: int, words: int = 60) -> list[str]:
    """Reproducible text of ``count`` documents of a few lines."""
    source = random.Random(seed)
    return [
        f"document {seed}-{number}\n" + "\n".join(" ".join(source.choices(WORDS, k=words // 3)) for _ in range(3))
        for number in range(count)
    ]


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_documents(120, seed=1))


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer([corpus], corpus.parent / "tokenizer.model", VOCABULARY)


@pytest.fixture(scope="session")
def prepare(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], str]:
    """prepare(documents, seed) -> prefix of a prepared dataset."""
    folder = tmp_path_factory.mktemp("prepared")

    def run(documents: int, seed: int) -> str:
        prefix = folder / f"d{documents}s{seed}"
        if not prefix.with_name(prefix.name + ".bin").exists():
            source = write_jsonl(folder / f"{prefix.name}.jsonl", make_documents(documents, seed))
            prepare_data([source], tokenizer.path, prefix, workers=1, progress_stream=io.StringIO())
        return str(prefix)

    return run


@pytest.fixture
def blended(prepare: Callable[[int, int], str], tokenizer: Tokenizer) -> DataConfig:
    """Three datasets of different sizes and weights, a fourth for validation."""
    return DataConfig.model_validate(
        {
            "tokenizer": str(tokenizer.path),
            "train": [
                {"path": prepare(40, 2), "weight": 3},
                {"path": prepare(15, 3), "weight": 1.5},
                {"path": prepare(25, 4), "weight": 0.7},
            ],
            "validation": [{"path": prepare(12, 5)}],
        }
    )
