"""config.json of a Hugging Face LLaMA and a geometry, each from the other.

Owns: which configurations describe exactly this model, and what is said of those that do not.
Does not own: the tensors (``checkpoint.huggingface.reader``), tokenizer files (``checkpoint.huggingface.tokenizer``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import CheckpointError

CONFIG_NAME = "config.json"
MAX_VOCAB_MULTIPLE = 128

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
# What transformers assumes where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
_REQUIRED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class TokenIds:
    """Special ids of a model, as config.json has them; eos may be several."""

    bos: int | None = None
    eos: int | list[int] | None = None
    pad: int | None = None

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> TokenIds:
        return cls(config.get("bos_token_id"), config.get("eos_token_id"), config.get("pad_token_id"))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing; {folder} is not a Hugging Face model folder") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not an object; fetch it again")
    return config


def geometry_of_config(config: Mapping[str, Any], path: Path) -> ModelConfig:
    """The geometry that ``config`` describes; the vocabulary is not padded.

    Raises:
        CheckpointError: naming everything in ``config`` by which it is another model than this library's.
    """
    kind = config.get("model_type")
    if kind not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; allowed: {', '.join(_ARCHITECTURES)} (a LLaMA without biases)"
        )
    filled = {**_DEFAULTS[kind], **config}
    if problems := _problems(filled, kind):
        raise CheckpointError(f"{path} is not a model this library has: {'; '.join(problems)}")
    vocabulary = filled["vocab_size"]
    fields: dict[str, Any] = {ours: filled[theirs] for theirs, ours in _REQUIRED.items()}
    fields |= {
        "num_query_groups": filled.get("num_key_value_heads"),
        "head_dim": filled.get("head_dim"),
        "vocab_multiple": min(vocabulary & -vocabulary, MAX_VOCAB_MULTIPLE),
        "sequence_length": filled["max_position_embeddings"],
        "rope_base": _rope(filled).get("rope_theta", filled.get("rope_theta", 10000.0)),
        "norm_epsilon": filled.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(filled.get("tie_word_embeddings", False)),
        "init_std": filled.get("initializer_range") or 0.02,
    }
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise CheckpointError(f"{path} is not a possible model: {wrong}") from None


def config_of_geometry(model: ModelConfig, dtype: torch.dtype, ids: TokenIds) -> dict[str, Any]:
    """config.json of a LlamaForCausalLM of this geometry, understood by transformers 4 and 5.

    Raises:
        CheckpointError: a geometry that transformers refuses.
    """
    if model.hidden_size % model.num_attention_heads:
        raise CheckpointError(
            f"hidden_size {model.hidden_size} is not a multiple of num_attention_heads {model.num_attention_heads}; "
            "transformers builds no such LLaMA, so it cannot be exported"
        )
    return {
        "architectures": [_ARCHITECTURES["llama"]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.sequence_length,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "pad_token_id": ids.pad,
        "rms_norm_eps": model.norm_epsilon,
        # transformers 5 reads the first, 4 the second
        "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
        "rope_theta": model.rope_base,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings, which lie in ``rope_scaling`` or, since transformers 5, in ``rope_parameters``."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return found if isinstance(found, dict) else {"rope_type": repr(found)}


def _problems(config: Mapping[str, Any], kind: str) -> list[str]:
    problems = []
    for name in (*_REQUIRED, "max_position_embeddings"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{name} is {value!r}, not a positive number" if name in config else f"{name} is missing")
    architectures = config.get("architectures") or [_ARCHITECTURES[kind]]
    if _ARCHITECTURES[kind] not in architectures:
        problems.append(f"architectures is {architectures}, allowed: {_ARCHITECTURES[kind]}")
    if config.get("quantization_config"):
        problems.append("its weights are quantised (quantization_config); take the model in bfloat16 or float32")
    problems += [
        f"{name} is true, there are no biases here" for name in ("attention_bias", "mlp_bias") if config.get(name)
    ]
    if (activation := config.get("hidden_act", "silu")) != "silu":
        problems.append(f"hidden_act is {activation!r}, allowed: silu")
    if kind == "mistral" and config["sliding_window"] is not None:
        problems.append(f"sliding_window is {config['sliding_window']}, allowed: null (attention over all tokens)")
    rope = _rope(config)
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default" or any(isinstance(value, dict) for value in rope.values()):
        problems.append(
            f"RoPE is scaled ({scaling}), allowed: plain RoPE; take the model before its context was extended"
        )
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        problems.append(f"partial_rotary_factor is {rotated}, allowed: 1")
    return problems
