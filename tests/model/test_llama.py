"""The model computes LLaMA's function: compared with a plain PyTorch forward over the same global tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.init import InitSource
from tests.ranks import run_ranks
from tests.workers import SMALL

CASES: list[dict[str, Any]] = [
    {},
    {"num_query_groups": 8, "tie_embeddings": True},
    {"num_query_groups": 2, "head_dim": 16, "rope_base": 500.0, "norm_epsilon": 1e-2},
]


def _rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """RoPE, rotate-half: x ``[heads, s, d]``."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain


def _attention(x: torch.Tensor, qkv: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    groups, d = model.query_groups, model.kv_channels
    per_group = model.num_attention_heads // groups
    fused = (x @ qkv.T).view(len(x), groups, per_group + 2, d)  # [s, g, q.. k v, d]
    q = _rotate(fused[:, :, :per_group].flatten(1, 2).transpose(0, 1), model.rope_base)
    k = _rotate(fused[:, :, per_group].transpose(0, 1), model.rope_base).repeat_interleave(per_group, 0)
    v = fused[:, :, per_group + 1].transpose(0, 1).repeat_interleave(per_group, 0)
    scores = q @ k.transpose(1, 2) / d**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def _reference(read: Callable[[str], torch.Tensor], model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    x = read("embedding.word_embeddings.weight")[tokens]  # [s, h]
    for layer in range(model.num_layers):
        get = lambda name, layer=layer: read(f"decoder.layers.{layer}.{name}")  # noqa: E731
        normed = _norm(x, get("self_attention.linear_qkv.layer_norm_weight"), model.norm_epsilon)
        attended = _attention(normed, get("self_attention.linear_qkv.weight"), model)
        x = x + attended @ get("self_attention.linear_proj.weight").T
        normed = _norm(x, get("mlp.linear_fc1.layer_norm_weight"), model.norm_epsilon)
        gate, up = (normed @ get("mlp.linear_fc1.weight").T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ get("mlp.linear_fc2.weight").T
    x = _norm(x, read("decoder.final_layernorm.weight"), model.norm_epsilon)
    output = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
    return x @ read(output).T


def _expected(case: dict[str, Any], tokens: list[int]) -> torch.Tensor:
    model = ModelConfig(**{**SMALL, "init_std": 0.2, **case})
    source = InitSource(model, 7)

    def read(key: str) -> torch.Tensor:
        return source.read(key, tuple(slice(0, size) for size in source.shape(key)))

    return _reference(read, model, torch.tensor(tokens))


@pytest.fixture(scope="module")
def computed() -> list[list[list[float]]]:
    cases = [{**case, "init_std": 0.2} for case in CASES]
    return run_ranks("tests.workers:logits", 1, {"models": cases, "tokens": list(range(3, 35))})[0]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_logits_equal_a_plain_llama(number: int, computed: list[list[list[float]]]) -> None:
    expected = _expected(CASES[number], list(range(3, 35)))
    difference = (torch.tensor(computed[number]) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


def test_negative_control_another_rope_base_is_noticed(computed: list[list[list[float]]]) -> None:
    expected = _expected({"rope_base": 9000.0}, list(range(3, 35)))
    assert (torch.tensor(computed[0]) - expected).abs().max() / expected.abs().max() > 1e-4
