"""Initial weights, computed per region of a global tensor: bit-equal at every layout.

Owns: the list of a LLaMA's global tensors with their shapes, and their initial distribution.
Does not own: who reads the regions (a live model in ``checkpoint.sharded``, a grown source in ``growth``).

Global tensors and their names are megatron-core's, one key a layer: ``linear_qkv`` is ``[(heads + 2 groups) d, h]`` with
q, k, v side by side in each query group; ``linear_fc1`` is ``[2 f, h]``, gate above up.
"""

from __future__ import annotations

import numpy as np
import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.llama import output_scale
from growth_megatron.parallel.counter_rng import normal_rows

LAYER_PREFIX = "decoder.layers."


def layer_tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within a layer -> global shape."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    return {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": ((model.num_attention_heads + 2 * model.query_groups) * d, h),
        "self_attention.linear_proj.weight": (h, model.num_attention_heads * d),
        "mlp.linear_fc1.layer_norm_weight": (h,),
        "mlp.linear_fc1.weight": (2 * f, h),
        "mlp.linear_fc2.weight": (h, f),
    }


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> global shape of every tensor of the model; a tied output has no tensor of its own."""
    shapes: dict[str, tuple[int, ...]] = {}
    shapes["embedding.word_embeddings.weight"] = (model.padded_vocab_size, model.hidden_size)
    for layer in range(model.num_layers):
        for name, shape in layer_tensor_shapes(model).items():
            shapes[f"{LAYER_PREFIX}{layer}.{name}"] = shape
    shapes["decoder.final_layernorm.weight"] = (model.hidden_size,)
    if not model.tie_embeddings:
        shapes["output_layer.weight"] = (model.padded_vocab_size, model.hidden_size)
    return shapes


class InitSource:
    """A freshly initialised model as a source of global tensors, in float32.

    Gains are 1; matrices are normal with deviation ``init_std``, those that write to the residual stream with
    ``init_std / sqrt(2 num_layers)``. Rows beyond the tokenizer's vocabulary are initialised like the others.
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._model, self._seed = model, seed
        self._shapes = tensor_shapes(model)

    def keys(self) -> list[str]:
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def read(self, key: str, region: tuple[slice, ...]) -> torch.Tensor:
        """The values of one region (a slice with explicit bounds per axis), ``float32``."""
        shape = self._shapes[key]
        if len(shape) == 1:
            return torch.ones(region[0].stop - region[0].start)
        writes_residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = output_scale(self._model) if writes_residual else self._model.init_std
        values = normal_rows(self._seed, key, range(region[0].start, region[0].stop), shape[1])
        values = values[:, region[1]] * np.float32(std)
        return torch.from_numpy(np.ascontiguousarray(values))
