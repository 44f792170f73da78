"""Which geometries a growth can lead to, and what else it cannot be asked for.

Owns: the conditions of every operator on source and target geometry, with the nearest possible values.
Does not own: what becomes of the tensors (``growth``), the notation of layer lists (``growth.layers``).

Both a configuration's stages and the command line are checked here, before any file is touched. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig, StageConfig
from growth_megatron.errors import GrowthError
from growth_megatron.growth.operators import Choice, choose, option_problems
from growth_megatron.growth.operators.base import Width
from growth_megatron.growth.ramps import mask_ramps

Problem = tuple[str, str]
"""A dotted key beginning with model or growth, and what is wrong with it."""

WIDTH_FIELDS = ("hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "ffn_hidden_size")
"""Sizes along the width."""

GEOMETRY_FIELDS = ("num_layers", *WIDTH_FIELDS)
"""All sizes that a growth may change."""

_KEPT = {
    "vocab_size": "vocab_size",
    "vocab_multiple": "padded_vocab_size",
    "rope_base": "rope_base",
    "rope_scaling": "rope_scaling",
    "attention_bias": "attention_bias",
    "qk_norm": "qk_norm",
}


def width_changes(source: ModelConfig, target: ModelConfig) -> dict[str, tuple[int, int]]:
    """Sizes along the width that differ: key -> (source, target)."""
    return {
        key: (getattr(source, key), getattr(target, key))
        for key in WIDTH_FIELDS
        if getattr(source, key) != getattr(target, key)
    }


def growth_problems(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> list[Problem]:
    """Everything that keeps ``growth`` from turning a model of geometry ``source`` into one of ``target``."""
    if problems := option_problems(growth):
        return [(f"growth.{key}", text) for key, text in problems]
    choice = choose(growth)
    problems = [*_kept_problems(source, target, choice), *_depth_problems(source, target, choice)]
    changes = width_changes(source, target)
    if not changes:
        same = tuple(range(source.num_layers))
        if choice.is_learned and not problems and choice.layers(source.num_layers, target.num_layers) == same:
            text = f"{growth.operator} learns maps of what grows, and nothing does; raise a size of the model"
            return [("growth.operator", text)]
        return [*problems, *_idle_options(growth)]
    if choice.width is None:
        problems += [
            (f"model.{key}", f"{growth.operator} changes num_layers alone, so keep {before}; or use direct")
            for key, (before, _) in changes.items()
        ]
        return problems
    if impossible := list(_size_problems(changes)):
        return [*problems, *impossible]
    problems += _head_problems(source, target, choice.width)
    if choice.width.whole_multiples:
        problems += _tiling_problems(choice.width.name, changes)
    return problems


def check_growth(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> Choice:
    """The operators of ``growth``, which can lead from ``source`` to ``target``.

    Raises:
        GrowthError: they cannot; it names every problem.
    """
    problems = growth_problems(source, target, growth)
    if problems:
        raise GrowthError("; ".join(f"{key.split('.', 1)[1]}: {text}" for key, text in problems))
    return choose(growth)


def chain_problems(stages: Sequence[StageConfig]) -> list[Problem]:
    """All ``(key below stages, what is wrong)`` of growths that cannot turn one stage's model into the next one's."""
    problems: list[Problem] = []
    for index in range(1, len(stages)):
        source, target = stages[index - 1], stages[index]
        for key, text in growth_problems(source.model, target.model, target.growth or GrowthConfig()):
            text = f"growing from stage {source.name} to {target.name}: {text}"
            problems.append((f"{index}.{key}", text))
        problems += [(f"{index}.{key}", text) for key, text in _ramp_problems(source, target)]
    return problems


def _ramp_problems(source: StageConfig, target: StageConfig) -> Iterator[Problem]:
    """A stage ends with the model that its masks lead to, which the next one grows."""
    growth, steps = target.growth or GrowthConfig(), target.num_steps
    if option_problems(growth):
        return  # said already
    for kind, (first, last) in mask_ramps(source.model, target.model, choose(growth)).items():
        if last > steps:
            text = f"[{first}, {last}] ends after the stage, which has {steps} steps; end it by step {steps}, or make "
            yield f"growth.ramp.{kind}", text + "the stage longer"


def zero_width_norm_epsilon(source: ModelConfig, hidden_size: int) -> float:
    """eps' with which zero growth of the hidden size needs no scaling of the residual stream."""
    return source.norm_epsilon * source.hidden_size / hidden_size


def _kept_problems(source: ModelConfig, target: ModelConfig, choice: Choice) -> Iterator[Problem]:
    for key, attribute in _KEPT.items():
        before, after = getattr(source, attribute), getattr(target, attribute)
        if before != after:
            if key == "vocab_multiple" and source.vocab_size != target.vocab_size:
                continue  # said already
            yield f"model.{key}", f"makes {attribute} {after}, the source has {before}; growth keeps it"
    if target.tie_embeddings and not source.tie_embeddings:
        text = "an untied output cannot be tied by growth, its weights would be lost; set it to false"
        yield "model.tie_embeddings", text
    if target.norm_epsilon == source.norm_epsilon:
        return
    allowed: list[Any] = [source.norm_epsilon]
    # The norms of q and k have the same epsilon, and their width does not change.
    adds_width = choice.width and choice.width.closes_with_zeros and target.hidden_size > source.hidden_size
    if adds_width and not source.qk_norm:
        scaled = zero_width_norm_epsilon(source, target.hidden_size)
        if math.isclose(target.norm_epsilon, scaled, rel_tol=1e-6):
            return
        allowed.append(scaled)
    text = f"{target.norm_epsilon} would change the function; allowed: {' or '.join(f'{value:g}' for value in allowed)}"
    yield "model.norm_epsilon", text


def _depth_problems(source: ModelConfig, target: ModelConfig, choice: Choice) -> Iterator[Problem]:
    before, after, growth, depth = source.num_layers, target.num_layers, choice.growth, choice.depth
    if depth is None:
        if before != after:
            text = f"{growth.operator} changes the width alone, so keep {before}; or use stack+{growth.operator}"
            yield "model.num_layers", text
        elif growth.layers is not None:
            yield "growth.layers", f"{growth.operator} changes the width alone; remove it, or use direct"
        return
    try:
        layers = choice.layers(before, after)
        if before == 0 and (depth.is_learned or depth.is_masked) and width_changes(source, target):
            text = f"{depth.name} grows the width of a model that has layers, and the source has none"
            yield "growth.operator", f"{text}; grow its depth first, by random or masked"
    except GrowthError as error:
        if growth.layers is not None:
            yield "growth.layers", str(error)
        elif after == 0:
            yield "model.num_layers", "0 would drop every layer; keep 1 at least"
        elif after < before:
            listed = ",".join(map(str, range(min(after, 4)))) + (",..." if after > 4 else "")
            kept = listed if after > 1 else "1"  # a list of one has no comma, so it is the paper's notation
            text = f"{after} is less than the source's {before}; to drop layers, list those to keep in growth.layers"
            text += f" (--layers), as {kept}"
            yield "model.num_layers", text
        else:
            yield "model.num_layers", str(error)
        return
    if depth.adds_layers and len(set(layers)) < before:
        missing = sorted(set(range(before)) - set(layers))
        text = (
            f"{depth.name} keeps every source layer and adds new ones, but the list leaves out {missing}; name them too"
        )
        yield "growth.layers", text


def _size_problems(changes: dict[str, tuple[int, int]]) -> Iterator[Problem]:
    for key, (before, after) in changes.items():
        if after < before and key != "num_query_groups":
            yield f"model.{key}", f"{after} is less than the source's {before}; a growth keeps or raises it"


def _idle_options(growth: GrowthConfig) -> Iterator[Problem]:
    """Options that part copies where there will be none: who gave them counts on it."""
    for key, is_given in (("shares", growth.shares != "even"), ("cancelling_noise", growth.cancelling_noise > 0)):
        if is_given:
            yield f"growth.{key}", "parts copies along the width, and no size along it grows; remove it"


def _head_problems(source: ModelConfig, target: ModelConfig, width: Width) -> Iterator[Problem]:
    if target.head_dim % source.head_dim:
        below = target.head_dim // source.head_dim * source.head_dim
        text = (
            f"{target.head_dim} is not a multiple of the source's {source.head_dim}: rotary pairs keep their "
            f"frequency only at whole multiples; nearest possible: {below} or {below + source.head_dim}"
        )
        if target.head_dim * target.num_attention_heads == target.hidden_size:
            text += f". It follows hidden_size / num_attention_heads: set head_dim {source.head_dim} to keep it"
        yield "model.head_dim", text
    elif width.is_learned and target.head_dim > source.head_dim:
        text = f"{width.name} mixes whole heads, so that rotary pairs keep their frequency; keep {source.head_dim}"
        yield "model.head_dim", text + ", or use split"
    elif width.is_masked and target.head_dim > source.head_dim:
        text = f"new channels of an old head change its scores, which no mask hides; keep {source.head_dim}, or use "
        yield "model.head_dim", text + "split"
    elif source.qk_norm and target.head_dim > source.head_dim and width.closes_with_zeros:
        text = f"{width.name} adds channels to q that are not zero, and the norms of q and k would see them; keep "
        yield "model.head_dim", f"{text}{source.head_dim}, or use split"
    before, after = source.num_query_groups, target.num_query_groups
    heads_before, heads_after = source.num_attention_heads // before, target.num_attention_heads // after
    if after < before:
        text = f"{after} is less than the source's {before}: keys and values would be lost; keep or raise it"
        yield "model.num_query_groups", text
        return
    if heads_after >= heads_before:
        return
    wanted = _smallest_heads(source, after, width.copies)
    text = (
        f"{target.num_attention_heads} heads in {after} groups are {heads_after} a group, which cannot hold the "
        f"{heads_before} heads of each of the source's {before} groups"
    )
    if not width.copies:
        text += f"; {width.name} adds new groups beside the old, so at least {wanted} heads, or use split"
        yield "model.num_attention_heads", text
    elif after // before * heads_after < heads_before:
        yield "model.num_attention_heads", f"{text}; nearest possible: {wanted} heads, or {before} groups"


def _smallest_heads(source: ModelConfig, groups: int, copying: bool) -> int:
    heads_per_group = source.num_attention_heads // source.num_query_groups
    return groups * (math.ceil(heads_per_group / (groups // source.num_query_groups)) if copying else heads_per_group)


def _tiling_problems(name: str, changes: dict[str, tuple[int, int]]) -> Iterator[Problem]:
    for key, (before, after) in changes.items():
        if key == "head_dim":
            yield f"model.{key}", f"{name} clones heads whole, so keep {before}; or use split"
        elif after > before and after % before:
            below = after // before * before
            text = f"{name} repeats the whole, so a multiple of {before}; nearest: {below} or {below + before}"
            yield f"model.{key}", text
