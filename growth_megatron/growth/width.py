"""Growth in width: how the coordinates of each kind of axis spread, and the axis rules of every tensor that follow.

Owns: the maps of the residual stream, heads, query groups, head channels and ffn; their factors; the fused axes.
Does not own: layers (``growth.plan``), which geometries are possible (``growth.conditions``).

The factors, for a coordinate in copies with fan-in shares alpha_j (sum 1), each copy j scaled by s_j in the residual
stream: writers (embedding columns, rows of o and down) s_j, gains 1 / s_j, readers alpha_j. With
s_j = sqrt(D alpha_j / d) the mean square of the stream, and so every norm, stays what it was, for any ratio D / d and
any shares; for even multiplicity and shares s_j is 1. The gradient of the stream's copy j is then exactly alpha_j / s_j
times that of its source, of a ffn row alpha_j, of a reader's column 1, which gives the moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.conditions import zero_width_norm_epsilon
from growth_megatron.growth.rules import RANDOM, ZERO, AxisRule
from growth_megatron.parallel.counter_rng import normal_rows

_UNEVENNESS = 0.3  # deviation of the logarithm of an uneven share, before the shares are made to sum to 1


@dataclass(frozen=True)
class Spread:
    """Source coordinate (or ZERO, RANDOM) of each target coordinate, its fan-in share, and whether it is new."""

    source_size: int
    index: tuple[int, ...]
    share: tuple[float, ...]
    new: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.index)


def spread(source_size: int, target_size: int, order: str, weights: Sequence[float] | None = None) -> Spread:
    """Copies of ``source_size`` coordinates: interleaved 0 0 1 1 or tiled 0 1 0 1, with shares after ``weights``."""
    if order == "tiled":
        index = tuple(target % source_size for target in range(target_size))
    else:
        index = tuple(target * source_size // target_size for target in range(target_size))
    weights = weights if weights is not None else [1.0] * target_size
    total = [0.0] * source_size
    for source, weight in zip(index, weights, strict=True):
        total[source] += weight
    share = tuple(weight / total[source] for source, weight in zip(index, weights, strict=True))
    first = {source: target for target, source in reversed(list(enumerate(index)))}
    new = tuple(first[source] != target for target, source in enumerate(index))
    return Spread(source_size, index, share, new)


def extend(source_size: int, target_size: int, mark: int) -> Spread:
    """The old coordinates as they are, then new ones without a source."""
    added = target_size - source_size
    return Spread(
        source_size,
        (*range(source_size), *[mark] * added),
        (1.0,) * target_size,
        (*[False] * source_size, *[True] * added),
    )


@dataclass(frozen=True)
class Heads:
    """Heads (in the order of their groups) and groups, with where zeros and random values go in new ones.

    ``head_mark`` is the mark of a new head's columns in o; ``group_gain`` the gradient factor of each group's k and v.
    """

    heads: Spread
    groups: Spread
    head_marks: tuple[int, ...]
    group_gain: tuple[float, ...]
    exact: bool


class WidthMaps:
    """All maps of one growth in width, and the axis rules built from them.

    Args: both geometries, already checked by ``growth.conditions``, and the options. ``seed`` keys uneven shares.
    """

    def __init__(self, source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int) -> None:
        self.source, self.target, self.operator = source, target, growth.width_operator or "split"
        self._growth, self._seed = growth, seed
        self.copies = self.operator not in ("zero", "random")
        self.residual = self._axis("hidden", source.hidden_size, target.hidden_size, ZERO)
        self.ffn = self._axis("ffn", source.ffn_hidden_size, target.ffn_hidden_size, RANDOM)
        self.channels = self._axis("channel", source.head_dim, target.head_dim, ZERO)
        self.heads = self._copied_heads() if self.copies else self._added_heads()
        grown = target.hidden_size / source.hidden_size
        if self.copies:
            self.stream = tuple(math.sqrt(grown * share) for share in self.residual.share)
            self.gain = tuple(1 / s for s in self.stream)
            self.tied_gain = tuple(share / s**2 for share, s in zip(self.residual.share, self.stream, strict=True))
        else:
            self._zero_width_factors(math.sqrt(grown) if self.operator == "zero" else 1.0)

    def write(self) -> AxisRule:
        """Axis of a tensor along which it writes to the residual stream."""
        gradient = tuple(a / s for a, s in zip(self.residual.share, self.stream, strict=True))
        return axis_rule(self.residual, self.stream, gradient)

    def read(self) -> AxisRule:
        """Axis of a tensor along which it reads the normed residual stream."""
        mark = RANDOM if not self.copies else ZERO
        return axis_rule(self._marked(self.residual, mark), self.residual.share, None)

    def gains(self) -> AxisRule:
        """The gain of a norm that other tensors read."""
        gradient = tuple(a / g for a, g in zip(self.residual.share, self.gain, strict=True))
        return axis_rule(self._marked(self.residual, RANDOM), self.gain, gradient)

    def tied_gains(self) -> AxisRule:
        """The final norm's gain before a tied embedding, which cannot carry the readers' shares itself."""
        gradient = tuple(a / g for a, g in zip(self.residual.share, self.tied_gain, strict=True))
        return axis_rule(self._marked(self.residual, RANDOM), self.tied_gain, gradient)

    def ffn_in(self) -> AxisRule:
        """Rows of the fused gate and up projections, gate above up."""
        # With both factors of silu(gate) * up zero, a new unit would never get a gradient: the gate stays random.
        up = self._marked(self.ffn, RANDOM if self.operator == "random" else ZERO)
        size = self.ffn.source_size
        fused = Spread(
            2 * size,
            (*self.ffn.index, *(i if i < 0 else i + size for i in up.index)),
            self.ffn.share * 2,
            self.ffn.new * 2,
        )
        return axis_rule(fused, None, fused.share)

    def ffn_out(self) -> AxisRule:
        """Columns of the down projection."""
        return axis_rule(self.ffn, self.ffn.share, None)

    def attention_out(self) -> AxisRule:
        """Columns of the attention output projection: heads in order, channels within."""
        h, heads, channels = self.source.head_dim, self.heads, self.channels
        index, share, new = [], [], []
        for head, mark, head_share, head_new in zip(
            heads.heads.index, heads.head_marks, heads.heads.share, heads.heads.new, strict=True
        ):
            for channel, channel_share, channel_new in zip(channels.index, channels.share, channels.new, strict=True):
                index.append(mark if head < 0 else RANDOM if channel < 0 else head * h + channel)
                share.append(head_share * channel_share)
                new.append(head_new or channel_new)
        fused = Spread(self.source.num_attention_heads * h, tuple(index), tuple(share), tuple(new))
        return axis_rule(fused, fused.share, None)

    def attention_in(self) -> AxisRule:
        """Rows of the fused q, k, v projection, per query group q..q k v."""
        rows = _FusedRows()
        a_group = len(self.heads.heads) // len(self.heads.groups)
        for group, gain in enumerate(self.heads.group_gain):
            for head in range(group * a_group, (group + 1) * a_group):
                self._query_rows(rows, head)
            self._key_rows(rows, group, gain)
            self._value_rows(rows, group, gain)
        source = self.source
        size = (source.num_attention_heads + 2 * source.num_query_groups) * source.head_dim
        fused = Spread(size, tuple(rows.index), (1.0,) * len(rows.index), tuple(rows.new))
        return axis_rule(fused, tuple(rows.scale), tuple(rows.gradient))

    def _query_rows(self, rows: _FusedRows, head: int) -> None:
        source, repeats = self.source, self.target.head_dim // self.source.head_dim
        a_group = source.num_attention_heads // source.num_query_groups
        number, share, new = self.heads.heads.index[head], self.heads.heads.share[head], self.heads.heads.new[head]
        start = number // a_group * (a_group + 2) + number % a_group
        # The softmax divides by the root of the channels, so q makes up for it.
        factor = math.sqrt(repeats)
        filled = RANDOM if not self.copies else ZERO
        for channel in rotary_channels(source.head_dim, repeats):
            missing = number < 0 or channel < 0
            index = filled if missing else start * source.head_dim + channel
            rows.add(index, factor, share / factor, new or channel < 0)

    def _key_rows(self, rows: _FusedRows, group: int, gain: float) -> None:
        h, start = self.source.head_dim, self._group_row(group)
        filled = RANDOM if self.operator == "random" else ZERO
        for channel in rotary_channels(h, self.target.head_dim // h):
            missing = start is None or channel < 0
            index = filled if start is None or channel < 0 else start + channel
            rows.add(index, 1.0, gain, self.heads.groups.new[group] or missing)

    def _value_rows(self, rows: _FusedRows, group: int, gain: float) -> None:
        start = self._group_row(group)
        filled = RANDOM if self.operator == "random" else ZERO
        for channel, share, new in zip(self.channels.index, self.channels.share, self.channels.new, strict=True):
            index = filled if start is None or channel < 0 else start + self.source.head_dim + channel
            rows.add(index, 1.0, gain * share, self.heads.groups.new[group] or new)

    def _group_row(self, group: int) -> int | None:
        """First k row of the source group that a target group copies."""
        number = self.heads.groups.index[group]
        if number < 0:
            return None
        a_group = self.source.num_attention_heads // self.source.num_query_groups
        return (number * (a_group + 2) + a_group) * self.source.head_dim

    def _axis(self, kind: str, source_size: int, target_size: int, mark: int) -> Spread:
        if not self.copies:
            return extend(source_size, target_size, RANDOM if self.operator == "random" else mark)
        return spread(source_size, target_size, self._growth.copy_order, self._weights(kind, target_size))

    def _weights(self, kind: str, size: int) -> list[float] | None:
        if self._growth.shares == "even":
            return None
        return [math.exp(_UNEVENNESS * float(n)) for n in normal_rows(self._seed, f"shares:{kind}", range(1), size)[0]]

    def _marked(self, axis: Spread, mark: int) -> Spread:
        return Spread(axis.source_size, tuple(i if i >= 0 else mark for i in axis.index), axis.share, axis.new)

    def _zero_width_factors(self, root: float) -> None:
        """``root`` is sqrt(D / d): without copies the mean square over D coordinates is d / D of what it was."""
        old, size = self.source.hidden_size, self.target.hidden_size
        epsilon = zero_width_norm_epsilon(self.source, size)
        scaled_epsilon = math.isclose(self.target.norm_epsilon, epsilon, rel_tol=1e-6) and size > old
        stream = 1.0 if scaled_epsilon else root
        added = [1.0] * (size - old)
        self.stream = (*[stream] * old, *added)
        self.gain = (*[1 / root] * old, *added)
        self.tied_gain = (*[1 / (root * stream)] * old, *added)

    def _copied_heads(self) -> Heads:
        """Groups first, then heads inside the group; where a target group has fewer heads than its source, the copies
        of a group share its heads out among them (GQA to MHA)."""
        source, target, order = self.source, self.target, self._growth.copy_order
        before, after = source.num_query_groups, target.num_query_groups
        m, wanted = source.num_attention_heads // before, target.num_attention_heads // after
        groups = spread(before, after, order, self._weights("group", after))
        if wanted >= m:
            inside = spread(m, wanted, order, self._weights("head", wanted))
            pairs = [(g, i) for g in range(after) for i in range(wanted)]
            heads = Spread(
                source.num_attention_heads,
                tuple(groups.index[g] * m + inside.index[i] for g, i in pairs),
                tuple(groups.share[g] * inside.share[i] for g, i in pairs),
                tuple(groups.new[g] or inside.new[i] for g, i in pairs),
            )
            return Heads(heads, groups, (ZERO,) * len(pairs), groups.share, True)
        members = [[g for g in range(after) if groups.index[g] == number] for number in range(before)]
        index, share, new = ([0] * (after * wanted), [0.0] * (after * wanted), [False] * (after * wanted))
        for number, copies in enumerate(members):
            shared_out = spread(m, len(copies) * wanted, order, self._weights(f"head {number}", len(copies) * wanted))
            for slot in range(len(shared_out)):
                head = copies[slot // wanted] * wanted + slot % wanted
                index[head] = number * m + shared_out.index[slot]
                share[head], new[head] = shared_out.share[slot], shared_out.new[slot]
        gain = tuple(sum(share[g * wanted : (g + 1) * wanted]) / m for g in range(after))
        heads = Spread(source.num_attention_heads, tuple(index), tuple(share), tuple(new))
        return Heads(heads, groups, (ZERO,) * len(index), gain, False)

    def _added_heads(self) -> Heads:
        """New heads behind the old of each group, new groups behind the old. A new head in an old group attends to
        values that are not zero, so under zero its columns in o are; in a new group the values are."""
        source, target = self.source, self.target
        before, after = source.num_query_groups, target.num_query_groups
        m, wanted = source.num_attention_heads // before, target.num_attention_heads // after
        groups = extend(before, after, RANDOM)
        in_old_group = RANDOM if self.operator == "random" else ZERO
        pairs = [(g, i) for g in range(after) for i in range(wanted)]
        index = tuple(g * m + i if g < before and i < m else RANDOM for g, i in pairs)
        marks = tuple(in_old_group if g < before else RANDOM for g, _ in pairs)
        heads = Spread(source.num_attention_heads, index, (1.0,) * len(pairs), tuple(i < 0 for i in index))
        return Heads(heads, groups, marks, (1.0,) * after, True)


class _FusedRows:
    """Rows of a fused projection as they are put together."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.scale: list[float] = []
        self.gradient: list[float] = []
        self.new: list[bool] = []

    def add(self, index: int, scale: float, gradient: float, new: bool) -> None:
        self.index.append(index)
        self.scale.append(scale if index >= 0 else 1.0)
        self.gradient.append(gradient)
        self.new.append(new)


def rotary_channels(channels: int, repeats: int) -> list[int]:
    """Source channel of each of ``channels * repeats`` channels of a q or k head, or ZERO.

    RoPE (rotate-half) turns channels j and j + h/2 by base^(-2j/h); pair r j of a head r times as wide has that very
    frequency, so pair j goes there.
    """
    half = channels // 2
    pairs = [pair // repeats if pair % repeats == 0 else ZERO for pair in range(half * repeats)]
    return [*pairs, *(ZERO if pair < 0 else pair + half for pair in pairs)]


def axis_rule(axis: Spread, scale: Sequence[float] | None, gradient: Sequence[float] | None) -> AxisRule:
    """The rule of an axis, without what says nothing: an index that is the axis itself, factors that are all 1."""
    identity = axis.index == tuple(range(axis.source_size))
    return AxisRule(
        axis.source_size,
        None if identity else axis.index,
        None if scale is None or set(scale) == {1.0} else tuple(scale),
        None if gradient is None or set(gradient) == {1.0} else tuple(gradient),
        axis.new if any(axis.new) else None,
    )
