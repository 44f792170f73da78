"""Bounds of time for no test; a small corpus, prepared once, for every test that trains; a small valid configuration.

Owns: what holds for the whole suite. Does not own: processes (``tests.pool``).
"""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, settings

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")  # a busy machine is no fault of what is tested

# A suite that a script started in the background inherits an ignored SIGINT, and so would the launchers that it starts;
# they leave it ignored, as nohup demands.
signal.signal(signal.SIGINT, signal.default_int_handler)

VOCABULARY = 300


def pytest_collection_finish() -> None:
    """What the imports left lives until the end; no collection need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def prepared_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``tokenizer.model`` and the datasets ``train`` and ``validation``, made of random sentences."""
    from growth_megatron.data.prepare import prepare_data
    from growth_megatron.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    words = "growth of a small model into one that is larger keeps what it has learned".split()  # noqa: SIM905
    generator = random.Random(5)
    for name, documents in (("train", 60), ("validation", 6)):
        (folder / f"text_{name}").mkdir()
        for number in range(documents):
            text = " ".join(generator.choice(words) + generator.choice(["", "s", "ed"]) for _ in range(200))
            (folder / f"text_{name}" / f"{number}.txt").write_text(text)
    train_tokenizer([folder / "text_train"], folder / "tokenizer.model", VOCABULARY)
    for name in ("train", "validation"):
        prepare_data([folder / f"text_{name}"], folder / "tokenizer.model", folder / name, workers=1)
    return folder


@pytest.fixture(scope="session")
def small_folder(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: an untrained model of two layers and a length of 64 tokens, with a tokenizer.

    Its weights are large enough that it prefers some tokens.
    """
    from growth_megatron.checkpoint.huggingface.writer import export_huggingface
    from growth_megatron.config.schema import ModelConfig
    from growth_megatron.model.init import InitSource

    geometry = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        vocab_size=VOCABULARY,
        sequence_length=64,
        init_std=0.1,
    )
    folder = tmp_path_factory.mktemp("small") / "folder"
    export_huggingface(InitSource(geometry, 5), geometry, folder, tokenizer=prepared_corpus / "tokenizer.model")
    return folder


WIDE = {
    "num_layers": 4,
    "hidden_size": 96,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 16,
    "ffn_hidden_size": 128,
}
"""What the model of ``write_growing_config`` may become: deeper, and wider in all of its widths."""


def write_growing_config(folder: Path, prepared_corpus: Path) -> Path:
    """``folder/config.yaml``: 6 steps of a 2-layer model, grown to 4 layers for 4 more, in ``folder/run``."""
    content = {
        "run": {"directory": str(folder / "run"), "seed": 3},
        "model": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 96,
            "vocab_size": VOCABULARY,
            "sequence_length": 32,
        },
        "data": {
            "tokenizer": str(prepared_corpus / "tokenizer.model"),
            "train": [{"path": str(prepared_corpus / "train")}],
            "validation": [{"path": str(prepared_corpus / "validation")}],
            "cache_directory": str(prepared_corpus / "cache"),
        },
        "schedule": {"learning_rate": 0.003, "warmup_steps": 2},
        "training": {"global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "evaluation": {"samples": 8},
        "checkpoint": {"interval_steps": 2, "keep_last": 100},
        "logging": {"interval_steps": 1},
        "stages": [
            {"name": "base", "model": {"num_layers": 2}, "training": {"steps": 6}},
            {
                "name": "grown",
                "model": {"num_layers": 4},
                "training": {"steps": 4},
                "growth": {"operator": "stack", "optimizer_state": "carry"},
            },
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def growing_config(prepared_corpus: Path, tmp_path: Path) -> Path:
    """``write_growing_config`` in a folder of the test's own."""
    return write_growing_config(tmp_path, prepared_corpus)


VALID = """\
run:
  directory: runs/test
  seed: 7
model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  ffn_hidden_size: 160
  vocab_size: 500
  sequence_length: 128
data:
  tokenizer: tokenizer.model
  train:
    - path: corpus
schedule:
  learning_rate: 1e-3
training:
  steps: 20
  global_batch_size: 8
  micro_batch_size: 2
stages:
  - name: base
  - name: grown
    model:
      num_layers: 16
    training:
      tokens: 20_480
"""


@pytest.fixture
def valid() -> str:
    return VALID


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Write a file below a temporary working directory and return its relative name."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return _write
