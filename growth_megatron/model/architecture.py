"""What a LLaMA and its relatives are made of: one row for each global tensor. No torch, no megatron-core.

Owns: the table, and what follows from it alone: names, shapes, which tensors a geometry has, how they split over
tensor-parallel ranks, their names in Hugging Face's models, the names of megatron-core's stateless extra objects.
Does not own: values (``model.init``), the modules (``model.llama``), what growth does along each axis (``growth``).

Names are megatron-core's, with one key a layer. A further architecture is a row here, or a field of ``ModelConfig``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from growth_megatron.config.schema import ModelConfig

LAYER_PREFIX = "decoder.layers."
HUGGINGFACE_LAYER_PREFIX = "model.layers."

_LAYER_KEY = re.compile(rf"{re.escape(LAYER_PREFIX)}(?P<layer>\d+|\*)\.(?P<name>.+)")


class Kind(Enum):
    """What the coordinates of an axis are."""

    VOCABULARY = "vocabulary"
    RESIDUAL = "residual"
    QKV = "qkv"  # rows of the fused projection: q..q k v of one query group, then the next group
    HEADS = "heads"  # channels of all heads, heads in the order of their groups
    CHANNELS = "channels"  # of one head, the same for all
    GATE_UP = "gate_up"  # gate above up
    FFN = "ffn"


Use = Literal["out", "in", "gain"]
"""How a tensor uses an axis: it writes along it, reads along it, or scales it entry by entry."""


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor."""

    kind: Kind
    use: Use


@dataclass(frozen=True)
class Row:
    """One global tensor of a model, or of each of its layers.

    ``initial``: ``ones``, ``zeros``, ``normal`` of deviation init_std, or ``normal_deep``, which is divided by
    sqrt(2 num_layers). ``huggingface``: the tensors it is made of there, along its first axis.
    """

    name: str
    axes: tuple[Axis, ...]
    initial: Literal["ones", "zeros", "normal", "normal_deep"]
    huggingface: tuple[str, ...]
    is_present: Callable[[ModelConfig], bool] = lambda model: True

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes, and so multiplies what it reads."""
        return len(self.axes) == 2

    @property
    def decays(self) -> bool:
        """Whether weight decay acts on it: megatron-core leaves out what has one axis."""
        return self.is_matrix

    @property
    def split_axis(self) -> int | None:
        """The axis that is split over tensor-parallel ranks; None for a tensor that all of them hold."""
        split = [number for number, axis in enumerate(self.axes) if axis.kind not in (Kind.RESIDUAL, Kind.CHANNELS)]
        return split[0] if split else None

    def shape(self, model: ModelConfig) -> tuple[int, ...]:
        """Global shape in ``model``."""
        return tuple(axis_size(axis.kind, model) for axis in self.axes)


_OUT, _IN, _GAIN = Axis(Kind.RESIDUAL, "out"), Axis(Kind.RESIDUAL, "in"), Axis(Kind.RESIDUAL, "gain")
_VOCABULARY, _QKV_OUT, _CHANNELS = Axis(Kind.VOCABULARY, "out"), Axis(Kind.QKV, "out"), Axis(Kind.CHANNELS, "gain")

EMBEDDING = Row("embedding.word_embeddings.weight", (_VOCABULARY, _OUT), "normal", ("model.embed_tokens.weight",))
ATTENTION_NORM = Row(
    "self_attention.linear_qkv.layer_norm_weight", (_GAIN,), "ones", ("input_layernorm.weight",)
)  # fmt: skip
QKV = Row(
    "self_attention.linear_qkv.weight",
    (_QKV_OUT, _IN),
    "normal",
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
)
QKV_BIAS = Row(
    "self_attention.linear_qkv.bias",
    (_QKV_OUT,),
    "zeros",
    ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    lambda model: model.attention_bias,
)
Q_NORM = Row(
    "self_attention.q_layernorm.weight", (_CHANNELS,), "ones", ("self_attn.q_norm.weight",), lambda model: model.qk_norm
)
K_NORM = Row(
    "self_attention.k_layernorm.weight", (_CHANNELS,), "ones", ("self_attn.k_norm.weight",), lambda model: model.qk_norm
)
PROJECTION = Row(
    "self_attention.linear_proj.weight",
    (_OUT, Axis(Kind.HEADS, "in")),
    "normal_deep",
    ("self_attn.o_proj.weight",),
)
MLP_NORM = Row("mlp.linear_fc1.layer_norm_weight", (_GAIN,), "ones", ("post_attention_layernorm.weight",))
FC1 = Row(
    "mlp.linear_fc1.weight",
    (Axis(Kind.GATE_UP, "out"), _IN),
    "normal",
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
)
FC2 = Row("mlp.linear_fc2.weight", (_OUT, Axis(Kind.FFN, "in")), "normal_deep", ("mlp.down_proj.weight",))
FINAL_NORM = Row("decoder.final_layernorm.weight", (_GAIN,), "ones", ("model.norm.weight",))
OUTPUT = Row(
    "output_layer.weight", (_VOCABULARY, _IN), "normal", ("lm_head.weight",), lambda model: not model.tie_embeddings
)

BEFORE_LAYERS = (EMBEDDING,)
IN_LAYER = (ATTENTION_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, PROJECTION, MLP_NORM, FC1, FC2)
AFTER_LAYERS = (FINAL_NORM, OUTPUT)
_ROWS = {row.name: row for row in (*BEFORE_LAYERS, *IN_LAYER, *AFTER_LAYERS)}


def axis_size(kind: Kind, model: ModelConfig) -> int:
    """Coordinates of an axis of this kind in ``model``, over all tensor-parallel ranks."""
    heads, groups, channels = model.num_attention_heads, model.num_query_groups, model.head_dim
    return {
        Kind.VOCABULARY: model.padded_vocab_size,
        Kind.RESIDUAL: model.hidden_size,
        Kind.QKV: (heads + 2 * groups) * channels,
        Kind.HEADS: heads * channels,
        Kind.CHANNELS: channels,
        Kind.GATE_UP: 2 * model.ffn_hidden_size,
        Kind.FFN: model.ffn_hidden_size,
    }[kind]


def layer_rows(model: ModelConfig) -> list[Row]:
    """The tensors of one layer of ``model``."""
    return [row for row in IN_LAYER if row.is_present(model)]


def outer_rows(model: ModelConfig) -> list[Row]:
    """The tensors of ``model`` outside its layers; a tied output has none of its own."""
    return [row for row in (*BEFORE_LAYERS, *AFTER_LAYERS) if row.is_present(model)]


def model_rows(model: ModelConfig) -> dict[str, Row]:
    """Key -> row of every tensor of ``model``, in the model's order."""
    rows = {row.name: row for row in BEFORE_LAYERS}
    for layer in range(model.num_layers):
        rows |= {layer_key(layer, row.name): row for row in layer_rows(model)}
    return rows | {row.name: row for row in AFTER_LAYERS if row.is_present(model)}


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of every tensor of ``model``."""
    return {key: row.shape(model) for key, row in model_rows(model).items()}


def numel(row: Row, model: ModelConfig) -> int:
    """Elements of a tensor."""
    return math.prod(row.shape(model))


def layer_key(layer: int | str, name: str) -> str:
    """Key of a layer's tensor; the layer may be ``*``."""
    return f"{LAYER_PREFIX}{layer}.{name}"


def split_layer_key(key: str) -> tuple[int, str] | None:
    """Layer and name within it of a layer's tensor or object; None for any other key."""
    match = _LAYER_KEY.fullmatch(key)
    return (int(match["layer"]), match["name"]) if match and match["layer"] != "*" else None


def without_layer_number(key: str) -> str:
    """The key with ``*`` for the layer's number, which all layers share."""
    parts = split_layer_key(key)
    return key if parts is None else layer_key("*", parts[1])


def row_of(key: str) -> Row:
    """The row of a tensor by its key. Raises KeyError for a key that is no tensor's."""
    match = _LAYER_KEY.fullmatch(key)
    return _ROWS[match["name"] if match else key]


def stateless_objects(model: ModelConfig) -> list[str]:
    """Keys of the empty byte objects without which megatron-core's strict load refuses a checkpoint: one a module of a
    layer with a matrix.
    """
    modules = [row.name.rpartition(".")[0] for row in layer_rows(model) if row.is_matrix]
    return [
        layer_key(layer, f"{module}._extra_state/shard_0_1") for layer in range(model.num_layers) for module in modules
    ]
