"""The plain forward pass computes what transformers' LLaMA computes, in float32 and float64.

That megatron-core's model computes the same is in ``test_llama``.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.architecture import LAYER_PREFIX, layer_rows, tensor_shapes
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import TensorSpec

TOKENS = torch.arange(40).view(2, 20) * 7 % 60  # [b, s]
CASES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_query_groups": 2},
    "mqa, wide heads, tied": {"num_query_groups": 1, "head_dim": 16, "tie_embeddings": True},
    "another rope and epsilon": {"num_query_groups": 2, "rope_base": 500.0, "norm_epsilon": 1e-2},
}


def _model(**changes: Any) -> ModelConfig:
    fields = {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": 60,
        "vocab_multiple": 64,
        "sequence_length": 32,
    }
    return ModelConfig(**(fields | changes))


class _Tensors(dict[str, torch.Tensor]):
    """A source of random tensors, gains included; counts the elements that its reader holds at a time."""

    def __init__(self, model: ModelConfig, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        for key, shape in tensor_shapes(model).items():
            values = torch.randn(shape, generator=generator)
            self[key] = 1 + values / 4 if len(shape) == 1 else values / 4
        self.asked: list[str] = []
        self.most_held = self._held = 0

    def keys(self) -> list[str]:  # type: ignore[override]
        return list(super().keys())

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(tuple(self[key].shape), self[key].dtype)

    def read(self, key: str, region: tuple[slice, ...]) -> torch.Tensor:
        self.asked.append(key)
        values = self[key][region].clone()
        self._count(values.numel())
        weakref.finalize(values, self._count, -values.numel())
        return values

    def _count(self, elements: int) -> None:
        self._held += elements
        self.most_held = max(self.most_held, self._held)


def _transformers_logits(tensors: _Tensors, model: ModelConfig, dtype: torch.dtype) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="eager",
    )
    llama = transformers.LlamaForCausalLM(config).to(dtype)
    llama.load_state_dict(_transformers_state(tensors, model), strict=not model.tie_embeddings)
    with torch.no_grad():
        logits: torch.Tensor = llama.eval()(TOKENS).logits
    return logits


def _transformers_state(tensors: _Tensors, model: ModelConfig) -> dict[str, torch.Tensor]:
    state = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
    }
    if not model.tie_embeddings:
        state["lm_head.weight"] = tensors["output_layer.weight"]
    d, groups = model.head_dim, model.num_query_groups
    for number in range(model.num_layers):
        here, there = f"{LAYER_PREFIX}{number}.", f"model.layers.{number}."
        state[f"{there}input_layernorm.weight"] = tensors[f"{here}self_attention.linear_qkv.layer_norm_weight"]
        state[f"{there}post_attention_layernorm.weight"] = tensors[f"{here}mlp.linear_fc1.layer_norm_weight"]
        fused = tensors[f"{here}self_attention.linear_qkv.weight"].view(groups, -1, d, model.hidden_size)
        parts = {"q": fused[:, :-2], "k": fused[:, -2], "v": fused[:, -1]}
        for name, part in parts.items():
            state[f"{there}self_attn.{name}_proj.weight"] = part.reshape(-1, model.hidden_size)
        state[f"{there}self_attn.o_proj.weight"] = tensors[f"{here}self_attention.linear_proj.weight"]
        gate, up = tensors[f"{here}mlp.linear_fc1.weight"].chunk(2)
        state[f"{there}mlp.gate_proj.weight"], state[f"{there}mlp.up_proj.weight"] = gate, up
        state[f"{there}mlp.down_proj.weight"] = tensors[f"{here}mlp.linear_fc2.weight"]
    return state


def _difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, dtype: torch.dtype) -> None:
    # One tolerance: transformers rotates and normalises in float32 whatever its type.
    model = _model(**CASES[case])
    tensors = _Tensors(model)
    logits = reference_logits(tensors, model, TOKENS, dtype)
    assert logits.dtype == dtype
    assert logits.shape == (2, 20, 64)
    assert _difference(logits, _transformers_logits(tensors, model, dtype)) < 1e-5


@pytest.mark.parametrize("wrong", ["rope", "epsilon", "gate and up", "query heads", "keys and values"])
def test_negative_control_another_function_is_noticed(wrong: str) -> None:
    model = _model(num_query_groups=2)
    tensors, other = _Tensors(model), _Tensors(model)
    changes: dict[str, Any] = {"rope": {"rope_base": 9000.0}, "epsilon": {"norm_epsilon": 1e-3}}
    qkv = other["decoder.layers.1.self_attention.linear_qkv.weight"].view(2, 4, 8, 32)
    if wrong == "gate and up":
        fc1 = other["decoder.layers.1.mlp.linear_fc1.weight"]
        fc1.copy_(fc1.roll(len(fc1) // 2, 0))
    elif wrong == "query heads":
        qkv.copy_(qkv[:, [1, 0, 2, 3]])
    elif wrong == "keys and values":
        qkv.copy_(qkv[:, [0, 1, 3, 2]])
    logits = reference_logits(other, _model(num_query_groups=2, **changes.get(wrong, {})), TOKENS)
    assert _difference(logits, _transformers_logits(tensors, model, torch.float32)) > 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_the_type_asked_for_is_used_throughout(dtype: torch.dtype, tolerance: float) -> None:
    """Doubled ffn channels with halved contributions are the same function up to rounding alone."""
    model = _model()
    wide = _model(ffn_hidden_size=96)
    tensors, doubled = _Tensors(model), _Tensors(wide)
    for key, tensor in tensors.items():
        doubled[key] = tensor
        if key.endswith("linear_fc1.weight"):
            doubled[key] = torch.cat([half.repeat(2, 1) for half in tensor.chunk(2)])
        elif key.endswith("linear_fc2.weight"):
            doubled[key] = tensor.double().repeat(1, 2) / 2
    expected = reference_logits(tensors, model, TOKENS, dtype)
    assert _difference(reference_logits(doubled, wide, TOKENS, dtype), expected) < tolerance


def test_masters_are_read_where_there_are_any() -> None:
    model = _model()
    masters, stored = _Tensors(model), _Tensors(model)
    for key in masters.keys():
        stored[key] = masters[key].bfloat16()
        stored[f"optimizer.state.param.{key}"] = masters[key]
    expected = reference_logits(masters, model, TOKENS)
    assert torch.equal(reference_logits(stored, model, TOKENS), expected)
    assert set(stored.asked) == {f"optimizer.state.param.{key}" for key in masters.keys()}
    for key in masters.keys():
        del stored[f"optimizer.state.param.{key}"]
    assert _difference(reference_logits(stored, model, TOKENS), expected) > 1e-4


def test_one_layer_is_in_memory_at_a_time() -> None:
    model = _model(num_layers=6, vocab_size=8, vocab_multiple=8)
    shapes = (row.shape(model) for row in layer_rows(model))
    tensors = _Tensors(model)
    reference_logits(tensors, model, TOKENS % 8)
    assert 0 < tensors.most_held <= sum(math.prod(shape) for shape in shapes)
