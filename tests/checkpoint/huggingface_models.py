"""Small LLaMA models of transformers with random weights, written as the real ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
CASES: dict[str, dict[str, Any]] = {
    "GQA, several files": {"shard": "20KB"},
    "MHA, bfloat16": {"num_key_value_heads": 4, "dtype": "bfloat16"},
    "MQA, vocabulary of 128s": {"num_key_value_heads": 1, "vocab_size": 256},
    "tied, bfloat16, several files": {"tie_word_embeddings": True, "dtype": "bfloat16", "shard": "12KB"},
    "heads wider than hidden / heads": {"head_dim": 24, "rope_theta": 500.0, "vocab_size": 100},
}


def write_llama(folder: Path, case: dict[str, Any], kind: str = "Llama") -> Any:
    """Save a model of ``case`` (options of LlamaConfig, and ``dtype`` and ``shard``) in ``folder``; returns it."""
    import transformers

    options = {**SIZES, **case}
    dtype, shard = options.pop("dtype", "float32"), options.pop("shard", "5GB")
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    model = model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes from a folder, in float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    with torch.no_grad():
        return torch.as_tensor(model(tokens).logits)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def prompt(vocab_size: int) -> torch.Tensor:
    return torch.arange(64).reshape(2, 32) * 13 % vocab_size


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
