"""The global tensors of a LLaMA of a given geometry: names and shapes. No torch, no megatron-core.

Owns: megatron-core's names of the tensors, one key a layer, and their unsharded shapes.
Does not own: their values (``model.init``), how they are sharded (megatron-core).

``linear_qkv`` is ``[(heads + 2 groups) d, h]`` with q, k, v side by side in each query group; ``linear_fc1`` is
``[2 f, h]``, gate above up.
"""

from __future__ import annotations

from growth_megatron.config.schema import ModelConfig

LAYER_PREFIX = "decoder.layers."


def layer_tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name within a layer -> global shape."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    return {
        "self_attention.linear_qkv.layer_norm_weight": (h,),
        "self_attention.linear_qkv.weight": ((model.num_attention_heads + 2 * model.num_query_groups) * d, h),
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
