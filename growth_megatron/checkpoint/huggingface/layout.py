"""Where the rows of megatron-core's tensors lie in a Hugging Face LLaMA. Index arithmetic only.

Owns: names and shapes on the Hugging Face side, and the correspondence of rows.
Does not own: reading (``checkpoint.huggingface.reader``) and writing (``checkpoint.huggingface.writer``).

Both sides rotate halves of a head in RoPE, so rows within a head keep their order. ``linear_qkv`` takes its rows from
q, k and v one query group at a time; ``linear_fc1`` is gate above up. All other tensors correspond one to one.
"""

from __future__ import annotations

from dataclasses import dataclass

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.architecture import LAYER_PREFIX

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"

_LAYER = "model.layers."
_RENAMED = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a megatron-core tensor: ``rows`` rows of ``name`` from its row ``start``."""

    name: str
    start: int
    rows: int


def huggingface_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the Hugging Face model; the vocabulary is not padded."""
    h, f, d = model.hidden_size, model.ffn_hidden_size, model.head_dim
    layer = {
        "input_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (model.num_attention_heads * d, h),
        "self_attn.k_proj.weight": (model.num_query_groups * d, h),
        "self_attn.v_proj.weight": (model.num_query_groups * d, h),
        "self_attn.o_proj.weight": (h, model.num_attention_heads * d),
        "post_attention_layernorm.weight": (h,),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "mlp.down_proj.weight": (h, f),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, h)}
    for number in range(model.num_layers):
        shapes |= {f"{_LAYER}{number}.{name}": shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = (h,)
    if not model.tie_embeddings:
        shapes[OUTPUT] = (model.vocab_size, h)
    return shapes


def pieces(model: ModelConfig, key: str) -> list[Piece]:
    """What the megatron-core tensor ``key`` is made of, in order, without the rows that pad the vocabulary."""
    h, f = model.hidden_size, model.ffn_hidden_size
    top_level = {
        "embedding.word_embeddings.weight": Piece(EMBEDDING, 0, model.vocab_size),
        "output_layer.weight": Piece(OUTPUT, 0, model.vocab_size),
        "decoder.final_layernorm.weight": Piece(FINAL_NORM, 0, h),
    }
    if key in top_level:
        return [top_level[key]]
    number, _, name = key.removeprefix(LAYER_PREFIX).partition(".")
    prefix = f"{_LAYER}{number}."
    if name == "self_attention.linear_qkv.weight":
        return _query_groups(model, f"{prefix}self_attn.")
    if name == "mlp.linear_fc1.weight":
        return [Piece(f"{prefix}mlp.gate_proj.weight", 0, f), Piece(f"{prefix}mlp.up_proj.weight", 0, f)]
    return [Piece(prefix + _RENAMED[name], 0, h)]


def _query_groups(model: ModelConfig, prefix: str) -> list[Piece]:
    d = model.head_dim
    q_rows = model.num_attention_heads // model.num_query_groups * d
    return [
        piece
        for group in range(model.num_query_groups)
        for piece in (
            Piece(f"{prefix}q_proj.weight", group * q_rows, q_rows),
            Piece(f"{prefix}k_proj.weight", group * d, d),
            Piece(f"{prefix}v_proj.weight", group * d, d),
        )
    ]
