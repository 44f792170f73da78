"""LLaMA's function in plain PyTorch, straight from a source of global tensors.

Owns: the forward pass that others are measured against: float32 or float64, no megatron-core, no process group, one
layer's tensors in memory at a time.
Does not own: training, and the model that trains (``model.llama``).
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.architecture import LAYER_PREFIX, layer_tensor_shapes, tensor_shapes

_EMBEDDING = "embedding.word_embeddings.weight"
_MASTER_PREFIX = (
    "optimizer.state.param."  # of megatron-core; a weight in bfloat16 is only the rounded form of its master
)


class ReadableTensors(Protocol):
    """As much of a tensor source as a forward pass needs."""

    def keys(self) -> list[str]: ...

    def read(self, key: str, region: tuple[slice, ...]) -> torch.Tensor: ...


def reference_logits(
    source: ReadableTensors, geometry: ModelConfig, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits ``[b, s, padded vocabulary]`` of ``tokens [b, s]``, computed in ``dtype`` throughout.

    Weights are read from their float32 masters where the source has them. Memory beside the weights of a layer:
    the scores ``[b, heads, s, s]`` and the logits.
    """
    weights = _Weights(source, geometry, dtype)
    rotation = _rotation(geometry, tokens.shape[1], dtype)
    x = weights[_EMBEDDING][tokens]  # [b, s, h]
    for number in range(geometry.num_layers):
        x = _layer(x, weights.layer(number), geometry, rotation)
    x = _norm(x, weights["decoder.final_layernorm.weight"], geometry.norm_epsilon)
    return x @ weights[_EMBEDDING if geometry.tie_embeddings else "output_layer.weight"].T


class _Weights:
    """Whole weights by model key, in one type."""

    def __init__(self, source: ReadableTensors, geometry: ModelConfig, dtype: torch.dtype) -> None:
        self._source, self._geometry, self._dtype = source, geometry, dtype
        self._shapes = tensor_shapes(geometry)
        self._stored = frozenset(source.keys())

    def __getitem__(self, key: str) -> torch.Tensor:
        master = _MASTER_PREFIX + key
        region = tuple(slice(0, size) for size in self._shapes[key])
        return self._source.read(master if master in self._stored else key, region).to(self._dtype)

    def layer(self, number: int) -> dict[str, torch.Tensor]:
        """One layer's weights by their name within it."""
        return {name: self[f"{LAYER_PREFIX}{number}.{name}"] for name in layer_tensor_shapes(self._geometry)}


def _layer(
    x: torch.Tensor, weights: dict[str, torch.Tensor], geometry: ModelConfig, rotation: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """One transformer layer: x ``[b, s, h]`` -> ``[b, s, h]``."""
    normed = _norm(x, weights["self_attention.linear_qkv.layer_norm_weight"], geometry.norm_epsilon)
    attended = _attention(normed, weights["self_attention.linear_qkv.weight"], geometry, rotation)
    x = x + attended @ weights["self_attention.linear_proj.weight"].T
    normed = _norm(x, weights["mlp.linear_fc1.layer_norm_weight"], geometry.norm_epsilon)
    gate, up = (normed @ weights["mlp.linear_fc1.weight"].T).chunk(2, -1)  # [b, s, f] each
    return x + (F.silu(gate) * up) @ weights["mlp.linear_fc2.weight"].T


def _attention(
    x: torch.Tensor, qkv: torch.Tensor, geometry: ModelConfig, rotation: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Causal attention of grouped queries: x ``[b, s, h]`` -> ``[b, s, heads * d]``."""
    batch, sequence = x.shape[:2]
    groups, d = geometry.num_query_groups, geometry.head_dim
    fused = (x @ qkv.T).view(batch, sequence, groups, -1, d)  # [b, s, g, q.. k v, d]
    fused = fused.permute(0, 2, 3, 1, 4)  # [b, g, q.. k v, s, d]
    q, k, v = fused[:, :, :-2], fused[:, :, -2:-1], fused[:, :, -1:]
    scores = _rotate(q, rotation) @ _rotate(k, rotation).transpose(-1, -2) / d**0.5  # [b, g, q, s, s]
    future = torch.ones(sequence, sequence, dtype=torch.bool, device=x.device).triu(1)
    attended = scores.masked_fill(future, float("-inf")).softmax(-1) @ v  # [b, g, q, s, d]
    return attended.permute(0, 3, 1, 2, 4).reshape(batch, sequence, -1)


def _rotation(geometry: ModelConfig, sequence: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[s, d]`` of RoPE, the angles of the first half repeated in the second."""
    half = geometry.head_dim // 2
    frequencies = geometry.rope_base ** (-torch.arange(half, dtype=dtype) / half)
    angles = torch.arange(sequence, dtype=dtype)[:, None] * frequencies
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """RoPE, rotate-half: x ``[..., s, d]``."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain
