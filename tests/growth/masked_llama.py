"""A masked LLaMA in plain PyTorch, straight from the definition: gates on activations, a norm over the masked width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.architecture import layer_key, layer_rows
from growth_megatron.model.reference import _attention, _rotation
from tests.growth.in_memory import EMBEDDING, FC1, FC2, FINAL_NORM, GAINS, OUTPUT, PROJ

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class MaskedLlama:
    """``gates``: by kind, 0 to 1; ``old_layers``: those that are not new. New parts come behind the old ones."""

    source: ModelConfig
    target: ModelConfig
    gates: Mapping[str, float]
    old_layers: int

    def logits(self, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[b, s, padded vocabulary]`` of ``tokens [b, s]``."""
        dtype = weights[EMBEDDING].dtype
        rotation, mask = _rotation(self.target, tokens.shape[1], dtype), self._residual(dtype)
        x = weights[EMBEDDING][tokens] * mask  # [b, s, h]
        for number in range(self.target.num_layers):
            layer = {row.name: weights[layer_key(number, row.name)] for row in layer_rows(self.target)}
            depth = 1.0 if number < self.old_layers else self.gates["depth"]
            heads = _attention(self._norm(x, layer[GAINS[0]]), layer, self.target, rotation) * self._heads(dtype)
            x = x + depth * mask * (heads @ layer[PROJ].T)
            gate, up = (self._norm(x, layer[GAINS[1]]) @ layer[FC1].T).chunk(2, -1)
            x = x + depth * mask * ((F.silu(gate) * up * self._ffn(dtype)) @ layer[FC2].T)
        x = self._norm(x, weights[FINAL_NORM])
        return x @ (weights[EMBEDDING] * mask if self.target.tie_embeddings else weights[OUTPUT]).T

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        width = self._residual(x.dtype).sum()
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / width + self.target.norm_epsilon) * gain

    def _residual(self, dtype: torch.dtype) -> torch.Tensor:
        return self._mask(self.source.hidden_size, self.target.hidden_size, self.gates["hidden"], dtype)

    def _ffn(self, dtype: torch.dtype) -> torch.Tensor:
        return self._mask(self.source.ffn_hidden_size, self.target.ffn_hidden_size, self.gates["ffn"], dtype)

    def _heads(self, dtype: torch.dtype) -> torch.Tensor:
        """``[heads * d]``: old are the first heads of the first groups."""
        before, after = self.source.num_query_groups, self.target.num_query_groups
        mask = torch.full((after, self.target.num_attention_heads // after), self.gates["heads"], dtype=dtype)
        mask[:before, : self.source.num_attention_heads // before] = 1.0
        return mask.flatten().repeat_interleave(self.target.head_dim)

    @staticmethod
    def _mask(old: int, size: int, gate: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([torch.ones(old, dtype=dtype), torch.full((size - old,), gate, dtype=dtype)])
