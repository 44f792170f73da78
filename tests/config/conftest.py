"""A small valid configuration that the tests of this folder change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

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
