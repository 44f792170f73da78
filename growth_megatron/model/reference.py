"""LLaMA's function in plain PyTorch, straight from a source of global tensors.

Owns: the forward pass that others are measured against: float32 or float64, no megatron-core, no process group, one
layer's tensors in memory at a time.
Does not own: training, and the model that trains (``model.llama``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from growth_megatron.config.schema import ModelConfig, RopeScaling
from growth_megatron.model.architecture import (
    ATTENTION_NORM,
    EMBEDDING,
    FC1,
    FC2,
    FINAL_NORM,
    K_NORM,
    MLP_NORM,
    OUTPUT,
    PROJECTION,
    Q_NORM,
    QKV,
    QKV_BIAS,
    layer_key,
    layer_rows,
    tensor_shapes,
)
from growth_megatron.model.tensors import MASTER_PREFIX, TensorSource


def reference_logits(
    source: TensorSource, geometry: ModelConfig, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Logits ``[b, s, padded vocabulary]`` of ``tokens [b, s]``, computed in ``dtype`` throughout.

    Weights are read from their float32 masters where the source has them. Memory beside the weights of a layer:
    the scores ``[b, heads, s, s]`` and the logits.
    """
    weights = _Weights(source, geometry, dtype)
    rotation = _rotation(geometry, tokens.shape[1], dtype)
    x = weights[EMBEDDING.name][tokens]  # [b, s, h]
    for number in range(geometry.num_layers):
        x = _layer(x, weights.layer(number), geometry, rotation)
    x = _norm(x, weights[FINAL_NORM.name], geometry.norm_epsilon)
    return x @ weights[(EMBEDDING if geometry.tie_embeddings else OUTPUT).name].T


class _Weights:
    """Whole weights by model key, in one type."""

    def __init__(self, source: TensorSource, geometry: ModelConfig, dtype: torch.dtype) -> None:
        self._source, self._geometry, self._dtype = source, geometry, dtype
        self._shapes = tensor_shapes(geometry)
        self._stored = frozenset(source.keys())

    def __getitem__(self, key: str) -> torch.Tensor:
        master = MASTER_PREFIX + key
        region = tuple(slice(0, size) for size in self._shapes[key])
        return self._source.read(master if master in self._stored else key, region).to(self._dtype)

    def layer(self, number: int) -> dict[str, torch.Tensor]:
        """One layer's weights by their name within it."""
        return {row.name: self[layer_key(number, row.name)] for row in layer_rows(self._geometry)}


def _layer(
    x: torch.Tensor, weights: dict[str, torch.Tensor], geometry: ModelConfig, rotation: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """One transformer layer: x ``[b, s, h]`` -> ``[b, s, h]``."""
    epsilon = geometry.norm_epsilon
    attended = _attention(_norm(x, weights[ATTENTION_NORM.name], epsilon), weights, geometry, rotation)
    x = x + attended @ weights[PROJECTION.name].T
    gate, up = (_norm(x, weights[MLP_NORM.name], epsilon) @ weights[FC1.name].T).chunk(2, -1)  # [b, s, f] each
    return x + (F.silu(gate) * up) @ weights[FC2.name].T


def _attention(
    x: torch.Tensor, weights: dict[str, torch.Tensor], geometry: ModelConfig, rotation: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Causal attention of grouped queries: x ``[b, s, h]`` -> ``[b, s, heads * d]``."""
    batch, sequence = x.shape[:2]
    groups, d = geometry.num_query_groups, geometry.head_dim
    fused = x @ weights[QKV.name].T
    if geometry.attention_bias:
        fused = fused + weights[QKV_BIAS.name]
    fused = fused.view(batch, sequence, groups, -1, d).permute(0, 2, 3, 1, 4)  # [b, g, q.. k v, s, d]
    q, k, v = fused[:, :, :-2], fused[:, :, -2:-1], fused[:, :, -1:]
    if geometry.qk_norm:
        q = _norm(q, weights[Q_NORM.name], geometry.norm_epsilon)
        k = _norm(k, weights[K_NORM.name], geometry.norm_epsilon)
    scores = _rotate(q, rotation) @ _rotate(k, rotation).transpose(-1, -2) / d**0.5  # [b, g, q, s, s]
    future = torch.ones(sequence, sequence, dtype=torch.bool, device=x.device).triu(1)
    attended: torch.Tensor = scores.masked_fill(future, float("-inf")).softmax(-1) @ v  # [b, g, q, s, d]
    return attended.permute(0, 3, 1, 2, 4).reshape(batch, sequence, -1)


def _rotation(geometry: ModelConfig, sequence: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines ``[s, d]`` of RoPE, the angles of the first half repeated in the second."""
    half = geometry.head_dim // 2
    frequencies = geometry.rope_base ** (-torch.arange(half, dtype=dtype) / half)
    if geometry.rope_scaling is not None:
        frequencies = _scaled(frequencies, geometry.rope_scaling)
    angles = torch.arange(sequence, dtype=dtype)[:, None] * frequencies
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """LLaMA 3's frequencies ``[d / 2]``: low ones divided by the factor, high ones kept, a ramp between the two."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # over the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """RoPE, rotate-half: x ``[..., s, d]``."""
    cos, sin = rotation
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gain
