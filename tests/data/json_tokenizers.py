"""A byte-level tokenizer of LLaMA 3's kind, trained on a few sentences."""

from __future__ import annotations

import json
from pathlib import Path

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def write_json_tokenizer(folder: Path, vocab_size: int = 299, end: str = END) -> Path:
    """``folder`` with tokenizer.json and tokenizer_config.json, of ``vocab_size`` entries, the last two special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words = "growth of a small model into one that is larger keeps what it has learned of the union and of the states"
    tokenizer.train_from_iterator([words] * 20, trainer)
    tokenizer.add_special_tokens([BEGIN, end])
    assert tokenizer.get_vocab_size() == vocab_size
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    tokenizer.enable_truncation(8)  # as in some real files
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": BEGIN,
        "eos_token": {"__type": "AddedToken", "content": end},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
