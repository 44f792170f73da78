"""Where the rows of megatron-core's tensors lie in a Hugging Face model. Index arithmetic only.

Owns: the correspondence of rows, derived from the table of the architecture.
Does not own: names (``model.architecture``), reading (``checkpoint.huggingface.reader``) and writing
(``checkpoint.huggingface.writer``).

Both sides rotate halves of a head in RoPE, so rows within a head keep their order. A fused axis takes its rows from
several tensors: q, k and v one query group at a time, gate above up. All others correspond one to one.
"""

from __future__ import annotations

from dataclasses import dataclass

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model import architecture
from growth_megatron.model.architecture import Kind, Row, axis_size, model_rows, row_of, split_layer_key

(EMBEDDING,), (OUTPUT,) = architecture.EMBEDDING.huggingface, architecture.OUTPUT.huggingface


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a Hugging Face tensor: ``rows`` rows of ``name`` from its row ``start``."""

    name: str
    start: int
    rows: int


def huggingface_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the Hugging Face model, in the model's order; the vocabulary is not padded."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, row in model_rows(model).items():
        rows: dict[str, int] = {}
        for part in row_ranges(model, key):
            rows[part.name] = rows.get(part.name, 0) + part.rows
        inner = row.shape(model)[1:]
        shapes |= {name: (count, *inner) for name, count in rows.items()}
    return shapes


def row_ranges(model: ModelConfig, key: str) -> list[RowRange]:
    """What the megatron-core tensor ``key`` is made of, in order, without the rows that pad the vocabulary."""
    row, layer = row_of(key), split_layer_key(key)
    prefix = "" if layer is None else f"{architecture.HUGGINGFACE_LAYER_PREFIX}{layer[0]}."
    return [RowRange(prefix + part.name, part.start, part.rows) for part in _within(model, row)]


def _within(model: ModelConfig, row: Row) -> list[RowRange]:
    names, kind = row.huggingface, row.axes[0].kind
    if kind is Kind.QKV:
        return _query_groups(model, *names)
    if kind is Kind.GATE_UP:
        return [RowRange(name, 0, model.ffn_hidden_size) for name in names]
    return [RowRange(names[0], 0, model.vocab_size if kind is Kind.VOCABULARY else axis_size(kind, model))]


def _query_groups(model: ModelConfig, q: str, k: str, v: str) -> list[RowRange]:
    channels = model.head_dim
    q_rows = model.num_attention_heads // model.num_query_groups * channels
    return [
        part
        for group in range(model.num_query_groups)
        for part in (
            RowRange(q, group * q_rows, q_rows),
            RowRange(k, group * channels, channels),
            RowRange(v, group * channels, channels),
        )
    ]
