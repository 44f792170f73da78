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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.conditions import zero_width_norm_epsilon
from growth_megatron.growth.operators import Choice
from growth_megatron.growth.operators.base import Width
from growth_megatron.growth.rules import RANDOM, ZERO, AxisRule
from growth_megatron.model.architecture import FINAL_NORM, K_NORM, Q_NORM, Axis, Kind, Row
from growth_megatron.parallel.counter_rng import normal_rows

_UNCHANGED = Width("unchanged", "")  # of a growth in depth alone: every map is the axis itself
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

    def __init__(self, source: ModelConfig, target: ModelConfig, choice: Choice, seed: int) -> None:
        self.source, self.target, self.width = source, target, choice.width or _UNCHANGED
        self._choice, self._seed = choice, seed
        self.residual = self._axis("hidden", source.hidden_size, target.hidden_size, ZERO)
        self.ffn = self._axis("ffn", source.ffn_hidden_size, target.ffn_hidden_size, RANDOM)
        self.channels = self._axis("channel", source.head_dim, target.head_dim, ZERO)
        self.heads = self._copied_heads() if self.width.copies else self._added_heads()
        grown = target.hidden_size / source.hidden_size
        if self.width.copies:
            self.stream = tuple(math.sqrt(grown * share) for share in self.residual.share)
            self.gain = tuple(1 / s for s in self.stream)
            self.tied_gain = tuple(share / s**2 for share, s in zip(self.residual.share, self.stream, strict=True))
        else:
            self._added_width_factors(math.sqrt(grown) if self.width.closes_with_zeros else 1.0)

    def axes(self, row: Row) -> tuple[AxisRule, ...]:
        """The rule of each axis of a tensor, by its kind and use."""
        if row is FINAL_NORM and self.target.tie_embeddings:
            return (self.tied_gains(),)
        if row in (Q_NORM, K_NORM):
            return (self._head_gains(row),)
        return tuple(self._rule(axis) for axis in row.axes)

    def _rule(self, axis: Axis) -> AxisRule:
        rules: dict[tuple[Kind, str], Callable[[], AxisRule]] = {
            (Kind.RESIDUAL, "out"): self.write,
            (Kind.RESIDUAL, "in"): self.read,
            (Kind.RESIDUAL, "gain"): self.gains,
            (Kind.QKV, "out"): self.attention_in,
            (Kind.HEADS, "in"): self.attention_out,
            (Kind.GATE_UP, "out"): self.ffn_in,
            (Kind.FFN, "in"): self.ffn_out,
            (Kind.VOCABULARY, "out"): lambda: AxisRule(self.target.padded_vocab_size),
        }
        return rules[axis.kind, axis.use]()

    def _head_gains(self, row: Row) -> AxisRule:
        """Gains of the norm over each head of q or k, which all heads share.

        A head r times as wide holds q and k times sqrt(r), whose mean square over the wider head is what it was; so
        the norms' outputs are sqrt(r) times as large, their product r times, where the softmax divides by sqrt(r)
        more: the gains of q make up for it.
        """
        channels, repeats = self.source.head_dim, self.target.head_dim // self.source.head_dim
        index = rotary_channels(channels, repeats)
        factor = 1 / math.sqrt(repeats) if row is Q_NORM else 1.0
        marked = tuple(RANDOM if channel < 0 else channel for channel in index)
        scale = tuple(1.0 if channel < 0 else factor for channel in index)
        gradient = tuple(1 / s for s in scale)
        new = tuple(channel < 0 for channel in index)
        return axis_rule(Spread(channels, marked, (1.0,) * len(index), new), scale, gradient)

    def write(self) -> AxisRule:
        """Axis of a tensor along which it writes to the residual stream."""
        gradient = tuple(a / s for a, s in zip(self.residual.share, self.stream, strict=True))
        return axis_rule(self.residual, self.stream, gradient)

    def read(self) -> AxisRule:
        """Axis of a tensor along which it reads the normed residual stream."""
        mark = ZERO if self.width.copies else RANDOM
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
        up = self._marked(self.ffn, self.width.closing)
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
        heads_per_group = len(self.heads.heads) // len(self.heads.groups)
        for group, gain in enumerate(self.heads.group_gain):
            for head in range(group * heads_per_group, (group + 1) * heads_per_group):
                self._query_rows(rows, head)
            self._key_rows(rows, group, gain)
            self._value_rows(rows, group, gain)
        source = self.source
        size = (source.num_attention_heads + 2 * source.num_query_groups) * source.head_dim
        fused = Spread(size, tuple(rows.index), (1.0,) * len(rows.index), tuple(rows.new))
        return axis_rule(fused, tuple(rows.scale), tuple(rows.gradient))

    def _query_rows(self, rows: _FusedRows, head: int) -> None:
        source, repeats = self.source, self.target.head_dim // self.source.head_dim
        heads_per_group = source.num_attention_heads // source.num_query_groups
        number, share, new = self.heads.heads.index[head], self.heads.heads.share[head], self.heads.heads.new[head]
        start = number // heads_per_group * (heads_per_group + 2) + number % heads_per_group
        # The softmax divides by the root of the channels, so q makes up for it; under a norm it keeps its mean square.
        factor = math.sqrt(repeats)
        filled = ZERO if self.width.copies else RANDOM
        for channel in rotary_channels(source.head_dim, repeats):
            missing = number < 0 or channel < 0
            index = filled if missing else start * source.head_dim + channel
            rows.add(index, factor, share / factor, new or channel < 0)

    def _key_rows(self, rows: _FusedRows, group: int, gain: float) -> None:
        h, start = self.source.head_dim, self._group_row(group)
        filled, repeats = self.width.closing, self.target.head_dim // h
        factor = math.sqrt(repeats) if self.source.qk_norm else 1.0
        for channel in rotary_channels(h, repeats):
            missing = start is None or channel < 0
            index = filled if start is None or channel < 0 else start + channel
            rows.add(index, factor, gain / factor, self.heads.groups.new[group] or missing)

    def _value_rows(self, rows: _FusedRows, group: int, gain: float) -> None:
        start = self._group_row(group)
        filled = self.width.closing
        for channel, share, new in zip(self.channels.index, self.channels.share, self.channels.new, strict=True):
            index = filled if start is None or channel < 0 else start + self.source.head_dim + channel
            rows.add(index, 1.0, gain * share, self.heads.groups.new[group] or new)

    def _group_row(self, group: int) -> int | None:
        """First k row of the source group that a target group copies."""
        number = self.heads.groups.index[group]
        if number < 0:
            return None
        heads_per_group = self.source.num_attention_heads // self.source.num_query_groups
        return (number * (heads_per_group + 2) + heads_per_group) * self.source.head_dim

    def _axis(self, kind: str, source_size: int, target_size: int, mark: int) -> Spread:
        if not self.width.copies:
            return extend(source_size, target_size, RANDOM if self.width.closing == RANDOM else mark)
        return spread(source_size, target_size, self._choice.copy_order, self._weights(kind, target_size))

    def _weights(self, kind: str, size: int) -> list[float] | None:
        if self._choice.growth.shares == "even":
            return None
        return [math.exp(_UNEVENNESS * float(n)) for n in normal_rows(self._seed, f"shares:{kind}", range(1), size)[0]]

    def _marked(self, axis: Spread, mark: int) -> Spread:
        return Spread(axis.source_size, tuple(i if i >= 0 else mark for i in axis.index), axis.share, axis.new)

    def _added_width_factors(self, root: float) -> None:
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
        of a group share its heads out among them (GQA to MHA).
        """
        source, target, order = self.source, self.target, self._choice.copy_order
        before, after = source.num_query_groups, target.num_query_groups
        heads_before, heads_after = source.num_attention_heads // before, target.num_attention_heads // after
        groups = spread(before, after, order, self._weights("group", after))
        if heads_after >= heads_before:
            inside = spread(heads_before, heads_after, order, self._weights("head", heads_after))
            pairs = [(g, i) for g in range(after) for i in range(heads_after)]
            heads = Spread(
                source.num_attention_heads,
                tuple(groups.index[g] * heads_before + inside.index[i] for g, i in pairs),
                tuple(groups.share[g] * inside.share[i] for g, i in pairs),
                tuple(groups.new[g] or inside.new[i] for g, i in pairs),
            )
            return Heads(heads, groups, (ZERO,) * len(pairs), groups.share, True)
        members = [[g for g in range(after) if groups.index[g] == number] for number in range(before)]
        in_all = after * heads_after
        index, share, new = [0] * in_all, [0.0] * in_all, [False] * in_all
        for number, copies in enumerate(members):
            slots = len(copies) * heads_after
            shared_out = spread(heads_before, slots, order, self._weights(f"head {number}", slots))
            for slot in range(len(shared_out)):
                head = copies[slot // heads_after] * heads_after + slot % heads_after
                index[head] = number * heads_before + shared_out.index[slot]
                share[head], new[head] = shared_out.share[slot], shared_out.new[slot]
        gain = tuple(sum(share[g * heads_after : (g + 1) * heads_after]) / heads_before for g in range(after))
        heads = Spread(source.num_attention_heads, tuple(index), tuple(share), tuple(new))
        return Heads(heads, groups, (ZERO,) * len(index), gain, False)

    def _added_heads(self) -> Heads:
        """New heads behind the old of each group, new groups behind the old. A new head in an old group attends to
        values that are not zero, so under zero its columns in o are; in a new group the values are.
        """
        source, target = self.source, self.target
        before, after = source.num_query_groups, target.num_query_groups
        heads_before, heads_after = source.num_attention_heads // before, target.num_attention_heads // after
        groups = extend(before, after, RANDOM)
        in_old_group = self.width.closing
        pairs = [(g, i) for g in range(after) for i in range(heads_after)]
        index = tuple(g * heads_before + i if g < before and i < heads_before else RANDOM for g, i in pairs)
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
