"""A model, a layout, a growth's changes in one line each.

Owns: their wording, wherever they are printed. Does not own: numbers and units (``config.units``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growth_megatron.config.schema import ModelConfig, ParallelConfig

_GEOMETRY_NAMES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_query_groups": "groups",
    "head_dim": "head channels",
    "ffn_hidden_size": "ffn",
    "vocab_size": "vocabulary",
    "padded_vocab_size": "padded vocabulary",
    "sequence_length": "sequence",
    "rope_base": "rope base",
    "norm_epsilon": "norm epsilon",
}


def model_line(model: ModelConfig) -> str:
    """A geometry in one line."""
    tied = ", tied embeddings" if model.tie_embeddings else ""
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads in "
        f"{model.num_query_groups} groups of {model.head_dim} channels, ffn {model.ffn_hidden_size}, vocabulary "
        f"{model.vocab_size} (padded to {model.padded_vocab_size}), sequence {model.sequence_length}{tied}"
    )


def layout_line(layout: ParallelConfig, world_size: int) -> str:
    """The layout a checkpoint was saved at, in one line."""
    data = world_size // layout.model_parallel_size
    sequence = " +SP" if layout.sequence_parallel else ""
    virtual = f" VPP {layout.model_chunks}" if layout.model_chunks > 1 else ""
    return (
        f"TP {layout.tensor_parallel_size}{sequence} PP {layout.pipeline_parallel_size}{virtual} DP {data} "
        f"({world_size} rank{'s' if world_size != 1 else ''}); any other layout can load it"
    )


def geometry_changes(source: ModelConfig, target: ModelConfig) -> list[str]:
    """What differs between two geometries, each as ``hidden 512 -> 1024``."""
    pairs = [(name, getattr(source, key), getattr(target, key)) for key, name in _GEOMETRY_NAMES.items()]
    changes = [f"{name} {before} -> {after}" for name, before, after in pairs if before != after]
    if source.tie_embeddings != target.tie_embeddings:
        changes.append("embeddings tied" if target.tie_embeddings else "embeddings untied")
    return changes


def describe_options(options: Mapping[str, Any], seed: int) -> str:
    """Options of a growth to follow the operator's name, with the seed that goes with them; nothing without any."""
    if not options:
        return ""
    words = [f", {key} {str(value).lower()}" for key, value in options.items()]
    return "".join(words).replace("'", "") + f", seed {seed}"


def compact_layers(layers: Sequence[int]) -> str:
    """A layer list in few words, from 0: ``0-3 x6``, ``0-3, 1-3 x5``; ``growth.layers`` reads it."""
    stretches: list[list[int]] = []
    for layer in layers:
        if stretches and layer == stretches[-1][-1] + 1:
            stretches[-1].append(layer)
        else:
            stretches.append([layer])
    counted: list[tuple[str, int]] = []
    for stretch in stretches:
        name = f"{stretch[0]}-{stretch[-1]}" if len(stretch) > 1 else f"{stretch[0]}"
        if counted and counted[-1][0] == name:
            counted[-1] = (name, counted[-1][1] + 1)
        else:
            counted.append((name, 1))
    text = ", ".join(f"{name} x{count}" if count > 1 else name for name, count in counted)
    return text if "," in text or "x" in text or text.startswith("0") else f"{text} x1"  # not the paper's notation
