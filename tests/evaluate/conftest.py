"""A small Hugging Face folder with a tokenizer, untrained."""

from __future__ import annotations

from pathlib import Path

import pytest

from growth_megatron.checkpoint.huggingface.writer import export_huggingface
from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.init import InitSource
from tests.conftest import VOCABULARY


@pytest.fixture(scope="session")
def small_folder(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two layers and a length of 64 tokens, with weights large enough to prefer some tokens."""
    geometry = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        vocab_size=VOCABULARY,
        sequence_length=64,
        init_std=0.3,
    )
    folder = tmp_path_factory.mktemp("small") / "folder"
    export_huggingface(InitSource(geometry, 5), geometry, folder, tokenizer=prepared_corpus / "tokenizer.model")
    return folder
