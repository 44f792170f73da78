"""Four small tasks of lm-eval on local documents, one for each kind of request; no hub, no code."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

NAMES = ["small_choice", "small_word", "small_pages", "small_text"]
WORDS = "growth of a small model into one that is larger keeps what it has learned".split()  # noqa: SIM905


def write_tasks(folder: Path, documents: int = 9) -> Path:
    """``folder`` with the four tasks: choices of unequal lengths, a last word, pages of several windows, free text."""
    folder.mkdir(parents=True)
    generator = random.Random(11)

    def text(words: int) -> str:
        return " ".join(generator.choice(WORDS) for _ in range(words))

    definitions: dict[str, dict[str, Any]] = {
        "small_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "small_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{' ' + answer}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "small_pages": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "small_text": {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["keeps", "\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    records = [
        {
            "question": text(generator.randint(1, 12)),
            "choices": [text(generator.randint(1, 5)) for _ in range(generator.randint(2, 4))],
            "label": generator.randint(0, 1),
            "answer": generator.choice(WORDS),
            "page": text(generator.randint(3, 60)),
        }
        for _ in range(documents)
    ]
    (folder / "documents.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, definition in definitions.items():
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **definition,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder
