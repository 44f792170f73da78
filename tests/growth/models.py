"""Geometries and function-preserving growths in width, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.conditions import width_changes
from tests.growth.in_memory import changed, small

SCALED = {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}
Growth = tuple[ModelConfig, tuple[ModelConfig, GrowthConfig]]


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.integers(1, 3))
    return small(
        num_layers=draw(st.integers(1, 2)),
        hidden_size=draw(st.sampled_from([6, 7, 8])),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        ffn_hidden_size=draw(st.sampled_from([5, 6, 8])),
        tie_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        rope_scaling=draw(st.sampled_from([None, SCALED])),
    )


@st.composite
def copying(draw: st.DrawFn, source: ModelConfig) -> tuple[ModelConfig, GrowthConfig]:
    """A target and options out of all that copies along the width and keeps the function."""
    groups, heads_per_group = source.num_query_groups, source.num_attention_heads // source.num_query_groups
    kind = draw(st.sampled_from(["keep", "heads", "groups", "both"]))
    if kind == "heads":
        heads_per_group = draw(st.integers(heads_per_group, 2 * heads_per_group))
    elif kind == "groups":
        groups, heads_per_group = groups * heads_per_group, 1
    elif kind == "both":
        groups = draw(st.integers(groups, 2 * groups))
        heads_per_group = draw(st.integers(heads_per_group, 2 * heads_per_group))
    depth = draw(st.sampled_from(["", "identity+", "zero+"]))
    target = changed(
        source,
        num_layers=source.num_layers + (draw(st.integers(0, 2)) if depth else 0),
        hidden_size=draw(st.integers(source.hidden_size, 3 * source.hidden_size)),
        ffn_hidden_size=draw(st.integers(source.ffn_hidden_size, 2 * source.ffn_hidden_size)),
        head_dim=source.head_dim * draw(st.integers(1, 2)),
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        tie_embeddings=source.tie_embeddings and draw(st.booleans()),
    )
    reads_copies = bool(width_changes(source, target).keys() - {"num_query_groups"})
    growth = GrowthConfig(
        operator=depth + "split",
        order=draw(st.sampled_from(["interleaved", "tiled"])),
        shares=draw(st.sampled_from(["even", "uneven"])) if width_changes(source, target) else "even",
        cancelling_noise=draw(st.sampled_from([0.0, 1.0])) if reads_copies else 0.0,
    )
    return target, growth


@st.composite
def adding(draw: st.DrawFn, source: ModelConfig) -> tuple[ModelConfig, GrowthConfig]:
    """As ``copying``, for new coordinates that are zero or without a say."""
    groups = source.num_query_groups + draw(st.integers(0, 2))
    heads_per_group = source.num_attention_heads // source.num_query_groups + draw(st.integers(0, 2))
    hidden = draw(st.integers(source.hidden_size, 2 * source.hidden_size))
    scaled = source.norm_epsilon * source.hidden_size / hidden
    target = changed(
        source,
        num_layers=source.num_layers + draw(st.integers(0, 2)),
        hidden_size=hidden,
        ffn_hidden_size=draw(st.integers(source.ffn_hidden_size, 2 * source.ffn_hidden_size)),
        head_dim=source.head_dim * (1 if source.qk_norm else draw(st.integers(1, 2))),
        num_attention_heads=groups * heads_per_group,
        num_query_groups=groups,
        norm_epsilon=source.norm_epsilon if source.qk_norm else draw(st.sampled_from([source.norm_epsilon, scaled])),
    )
    return target, GrowthConfig(operator=draw(st.sampled_from(["zero", "identity+zero"])))


steps = models().flatmap(lambda source: st.tuples(st.just(source), st.one_of(copying(source), adding(source))))
chains = steps.flatmap(
    lambda step: st.tuples(st.just(step), st.one_of(copying(step[1][0]), adding(step[1][0])))
)  # fmt: skip
