"""config.json of a Hugging Face model and a geometry, each from the other.

Owns: which configurations describe exactly this model, and what is said of those that do not.
Does not own: the tensors (``checkpoint.huggingface.reader``), tokenizer files (``checkpoint.huggingface.tokenizer``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import CheckpointError

CONFIG_NAME = "config.json"
MAX_VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class _Family:
    """A model_type: its class in transformers, what that assumes where config.json is silent, what our table has."""

    architecture: str
    defaults: Mapping[str, Any]
    attention_bias: bool = False
    qk_norm: bool = False


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", {"max_position_embeddings": 2048}),
    "mistral": _Family(
        "MistralForCausalLM", {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM", {"max_position_embeddings": 32768, "num_key_value_heads": 32}, attention_bias=True
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        qk_norm=True,
    ),
}
_EXPORTED_AS = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
"""Family of a geometry with (attention_bias, qk_norm)."""

_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"use_sliding_window": False, "sliding_window": None},
    "qwen3": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
}
"""What is written for a family besides its geometry."""

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
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
        """The special ids that config.json names."""
        return cls(config.get("bos_token_id"), config.get("eos_token_id"), config.get("pad_token_id"))


def read_config(folder: Path, name: str = CONFIG_NAME) -> dict[str, Any]:
    """config.json of a Hugging Face folder, or another JSON object in it.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    path = folder / name
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
    if kind not in _FAMILIES:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; allowed: {', '.join(_FAMILIES)}. Models with experts, a sliding window "
            "or other parts than a LLaMA's are others"
        )
    family = _FAMILIES[kind]
    filled = {**family.defaults, **config}
    if problems := [*_value_problems(filled, family), *_part_problems(filled), *_rope_problems(filled)]:
        raise CheckpointError(f"{path} is not a model this library has: {'; '.join(problems)}")
    vocabulary = filled["vocab_size"]
    fields: dict[str, Any] = {ours: filled[theirs] for theirs, ours in _REQUIRED.items()}
    fields |= {
        "num_query_groups": filled.get("num_key_value_heads"),
        "head_dim": filled.get("head_dim"),
        "vocab_multiple": min(vocabulary & -vocabulary, MAX_VOCAB_MULTIPLE),
        "sequence_length": filled["max_position_embeddings"],
        "rope_base": _rope(filled).get("rope_theta", filled.get("rope_theta", 10000.0)),
        "rope_scaling": _rope_scaling(filled),
        "norm_epsilon": filled.get("rms_norm_eps", 1e-6),
        "attention_bias": family.attention_bias,
        "qk_norm": family.qk_norm,
        "tie_embeddings": bool(filled.get("tie_word_embeddings", False)),
        "init_std": filled.get("initializer_range") or 0.02,
    }
    try:
        return ModelConfig(**fields)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['msg']}".strip() for e in error.errors())
        raise CheckpointError(f"{path} is not a possible model: {wrong}") from None


def config_of_geometry(model: ModelConfig, dtype: torch.dtype, ids: TokenIds) -> dict[str, Any]:
    """config.json of this geometry, understood by transformers 4 and 5.

    Raises:
        CheckpointError: a geometry that transformers has no model for.
    """
    if model.hidden_size % model.num_attention_heads:
        raise CheckpointError(
            f"hidden_size {model.hidden_size} is not a multiple of num_attention_heads {model.num_attention_heads}; "
            "transformers builds no such LLaMA, so it cannot be exported"
        )
    kind = _EXPORTED_AS.get((model.attention_bias, model.qk_norm))
    if kind is None:
        raise CheckpointError(
            "the model has attention_bias and qk_norm; transformers has no model with biases of q, k and v alone and "
            "norms of q and k, so it cannot be exported"
        )
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling is not None:
        rope = {"rope_type": model.rope_scaling.type, **{name: getattr(model.rope_scaling, name) for name in _LLAMA3}}
    return {
        "architectures": [_FAMILIES[kind].architecture],
        "attention_dropout": 0.0,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": kind,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "pad_token_id": ids.pad,
        "rms_norm_eps": model.norm_epsilon,
        # transformers 5 reads the first, 4 the other two
        "rope_parameters": {"rope_theta": model.rope_base, **rope},
        "rope_theta": model.rope_base,
        **({"rope_scaling": rope} if model.rope_scaling is not None else {}),
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **_FIXED[kind],
    }


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings, which lie in ``rope_scaling`` or, since transformers 5, in ``rope_parameters``."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return found if isinstance(found, dict) else {"rope_type": repr(found)}


def _rope_scaling(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The ``model.rope_scaling`` of a configuration without problems."""
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        return None
    fallback = {"original_max_position_embeddings": config["max_position_embeddings"]}
    return {"type": "llama3", **{name: rope.get(name, fallback.get(name)) for name in _LLAMA3}}


def _value_problems(config: Mapping[str, Any], family: _Family) -> Iterator[str]:
    for name in (*_REQUIRED, "max_position_embeddings"):
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < (name != "num_hidden_layers"):
            yield f"{name} is {value!r}, not a positive number" if name in config else f"{name} is missing"
    architectures = config.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        yield f"architectures is {architectures}, allowed: {family.architecture}"
    if (activation := config.get("hidden_act", "silu")) != "silu":
        yield f"hidden_act is {activation!r}, allowed: silu"


def _part_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Parts that are not in our table of the architecture."""
    if config.get("quantization_config"):
        yield "its weights are quantised (quantization_config); take the model in bfloat16 or float32"
    if config.get("attention_bias"):
        yield "attention_bias is true, which gives the attention's output a bias, and there is none here"
    if config.get("mlp_bias"):
        yield "mlp_bias is true, there are no biases in the MLP here"
    slides = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if slides or "sliding_attention" in (config.get("layer_types") or ()):
        yield f"sliding_window is {config.get('sliding_window')}, allowed: null (attention over all tokens)"


def _rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or any(isinstance(value, dict) for value in rope.values()):
        yield (
            f"RoPE is scaled ({kind}), allowed: plain RoPE or llama3; take the model before its context was extended"
        )
    if kind == "llama3" and (missing := [name for name in _LLAMA3[:3] if name not in rope]):
        yield f"RoPE's scaling llama3 lacks {', '.join(missing)}"
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        yield f"partial_rotary_factor is {rotated}, allowed: 1"
