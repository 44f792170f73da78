"""Learned growth in plain PyTorch, straight from the definition: every map written out as one matrix along its axis."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.architecture import Kind, Row, layer_key, model_rows, split_layer_key
from tests.growth.in_memory import EMBEDDING, OUTPUT

Weights = Mapping[str, torch.Tensor]


def grown_weights(plan: GrowthPlan, source: Weights, maps: Weights) -> dict[str, torch.Tensor]:
    """W'_i = B_out (sum_j D_ij W_j) B_in^T of every tensor."""
    grown = {}
    for key, row in model_rows(plan.target_geometry).items():
        place = split_layer_key(key)
        if place is None:
            tied = key == OUTPUT and plan.source_geometry.tie_embeddings
            mixed = source[EMBEDDING if tied else key]
        else:
            mixed = _mixed(plan, source, maps, row, place[0])
        out = _matrix(row.axes[0].kind, plan.source_geometry, plan.target_geometry, maps, mixed)
        if row.is_matrix:
            mixed = mixed @ _matrix(row.axes[1].kind, plan.source_geometry, plan.target_geometry, maps, mixed).T
        grown[key] = out @ mixed
    return grown


def _mixed(plan: GrowthPlan, source: Weights, maps: Weights, row: Row, layer: int) -> torch.Tensor:
    """The sum over the source's layers, with weights of its own for each piece of a fused tensor."""
    model, layers = (
        plan.source_geometry,
        [source[layer_key(j, row.name)] for j in range(plan.source_geometry.num_layers)],
    )
    names = [name for name in maps if name.startswith(f"depth.{row.name}")]
    if not names:
        assert plan.layers is not None
        return layers[plan.layers[layer]]
    total = torch.zeros_like(layers[0])
    for j, weights in enumerate(layers):
        factors = [maps[name][layer, j] for name in names]
        if row.axes[0].kind is Kind.QKV:
            heads = model.num_attention_heads // model.num_query_groups
            per_group = torch.stack([*[factors[0]] * heads, factors[1], factors[2]])
            by_row = per_group.repeat_interleave(model.head_dim).repeat(model.num_query_groups)
        else:
            by_row = torch.stack(factors).repeat_interleave(len(weights) // len(factors))
        total = total + by_row.view(-1, *[1] * (weights.dim() - 1)) * weights
    return total


def _matrix(kind: Kind, source: ModelConfig, target: ModelConfig, maps: Weights, like: torch.Tensor) -> torch.Tensor:
    """``[target size, source size]`` of an axis."""

    def of(name: str, size: int) -> torch.Tensor:
        return maps[name] if name in maps else torch.eye(size, dtype=like.dtype)

    groups, channels = source.num_query_groups, source.head_dim
    heads = source.num_attention_heads // groups
    inside, values = of("heads", heads), of("values", groups * channels)
    head = torch.eye(channels, dtype=like.dtype)
    k = torch.kron(of("groups", groups), head)
    if kind is Kind.HEADS:
        apart = values.view(target.num_query_groups, channels, groups, channels)
        fused = torch.einsum("acbd,th->atcbhd", apart, inside)
        return fused.reshape(-1, groups * heads * channels)
    if kind is Kind.QKV:
        q = torch.kron(torch.kron(of("groups", groups), inside), head)
        return _fused_rows(q, k, values, source, target)
    if kind is Kind.GATE_UP:
        return torch.block_diag(*[of("ffn", source.ffn_hidden_size)] * 2)
    sizes = {Kind.RESIDUAL: ("residual", source.hidden_size), Kind.FFN: ("ffn", source.ffn_hidden_size)}
    sizes |= {Kind.VOCABULARY: ("", source.padded_vocab_size), Kind.CHANNELS: ("", channels)}
    return of(*sizes[kind])


def _fused_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, source: ModelConfig, target: ModelConfig
) -> torch.Tensor:
    """The block matrix of q, k and v with rows and columns in the order of the fused tensor."""
    blocks = torch.block_diag(q, k, v)
    return blocks[_fused_order(target)][:, _fused_order(source)]


def _fused_order(model: ModelConfig) -> torch.Tensor:
    """Place among all q, then all k, then all v of each row of the fused tensor."""
    groups, h = model.num_query_groups, model.head_dim
    heads = model.num_attention_heads // groups
    order = []
    for group in range(groups):
        order += [*range(group * heads * h, (group + 1) * heads * h)]
        for number in range(2):
            start = (groups * heads + number * groups + group) * h
            order += [*range(start, start + h)]
    return torch.tensor(order)
