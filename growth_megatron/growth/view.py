"""A source of tensors seen through a growth plan: any region of the grown model, computed when it is read.

Owns: the values that a plan's rules stand for: gathering, scaling, new weights, noise, moments.
Does not own: the rules (``growth.plan``), where the values go (``checkpoint.torch_dist.writer``, a live model).

Everything is computed in float32 (float64 from a float64 source) and rounded once. Random values are addressed by
(seed, tensor, global position), so a region's bits do not depend on which other regions are read, or by whom.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from growth_megatron.errors import GrowthError
from growth_megatron.growth.learned import MappedWeights
from growth_megatron.growth.plan import check_source_tensors
from growth_megatron.growth.rules import RANDOM, AxisRule, GrowthPlan, Noise, TensorRule, check_optimizer_state
from growth_megatron.model.init import InitSource
from growth_megatron.model.tensors import (
    MASTER_PREFIX,
    MOMENT_PREFIXES,
    SECOND_MOMENT_PREFIX,
    Region,
    TensorSource,
    TensorSpec,
    check_region,
    constant,
    region_shape,
    split_state_key,
)
from growth_megatron.parallel.counter_rng import normal_rows

_NOISE_BLOCK = 1 << 18  # elements drawn at once


class GrownSource:
    """A source seen through a plan: itself a source of tensors, so growths chain.

    Weights, masters and moments that the source has are there. A weight that is computed comes from the source's
    float32 master where there is one, so that it is the grown master, cast.
    """

    def __init__(self, source: TensorSource, plan: GrowthPlan, optimizer_state: str) -> None:
        """Raises GrowthError if the source is not the plan's, or the policy is unknown."""
        self._policy = check_optimizer_state(optimizer_state)
        check_source_tensors(plan, source)
        self._source, self.plan = source, plan
        keys = source.keys()
        self._dtypes = {split_state_key(key)[0]: source.spec(key).dtype for key in keys}
        self._rules = {prefix + rule.target: (prefix, rule) for prefix in self._dtypes for rule in plan.rules}
        self._init: InitSource | MappedWeights = InitSource(plan.target_geometry, plan.seed)
        if plan.is_learned:
            self._init = MappedWeights(source, plan)

    def keys(self) -> list[str]:
        """All tensors of the grown model, under every prefix that the source has."""
        return list(self._rules)

    def spec(self, key: str) -> TensorSpec:
        """Global shape of the target, type of the source. Raises GrowthError for a tensor that is not there."""
        prefix, rule = self._rule(key)
        dtype = self._dtypes[prefix] if rule.source is None else self._source.spec(prefix + rule.source).dtype
        return TensorSpec(rule.shape, dtype)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of ``region``, of its shape; zeros that no value is computed for are a constant."""
        prefix, rule = self._rule(key)
        (values,) = self.read_state(rule.target, region, (prefix,))
        return values

    def read_state(self, name: str, region: Region, prefixes: Sequence[str]) -> Iterator[torch.Tensor]:
        """Tensors of the region's shape; a computed weight and its master are rounded from values computed once."""
        computed: torch.Tensor | None = None
        for prefix in prefixes:
            _, rule = self._rule(prefix + name)
            spec = self.spec(prefix + name)
            check_region(prefix + name, spec.shape, region)
            if rule.fill == "zeros" or (prefix in MOMENT_PREFIXES and not rule.keeps_moments(self._policy)):
                yield constant(torch.zeros((), dtype=spec.dtype), region_shape(region))
            elif rule.is_selection:
                yield self._source.read(f"{prefix}{rule.source}", region)
            elif prefix in MOMENT_PREFIXES:
                computed = None  # weight and master come before the moments
                yield self._moment(rule, prefix, region).to(spec.dtype)
            else:
                computed = self._weight(rule, prefix, region) if computed is None else computed
                yield computed.to(spec.dtype)

    def _weight(self, rule: TensorRule, prefix: str, region: Region) -> torch.Tensor:
        """The float32 (float64) values that both the weight and its master are rounded from."""
        origin = MASTER_PREFIX if MASTER_PREFIX in self._dtypes else prefix
        if rule.source is None:
            value = self._init.read(rule.target, region)
        else:
            value = gather(rule, origin, self._source, region, "scale_tensor")
            self._fill_new(value, rule, region)
            if rule.noise is not None:
                _add_noise(value, rule, rule.noise, self.plan.seed, region)
        return value

    def _moment(self, rule: TensorRule, prefix: str, region: Region) -> torch.Tensor:
        value = gather(rule, prefix, self._source, region, "gradient_tensor", prefix == SECOND_MOMENT_PREFIX)
        for number, (axis, part) in enumerate(zip(rule.axes, region, strict=True)):
            if axis.has_sourceless:
                assert axis.index_tensor is not None
                value.masked_fill_(_along(axis.index_tensor[part] < 0, number, value.dim()), 0.0)
            if self._policy == "asymmetric" and axis.new_tensor is not None:
                value.masked_fill_(_along(axis.new_tensor[part], number, value.dim()), 0.0)
        return value

    def _fill_new(self, value: torch.Tensor, rule: TensorRule, region: Region) -> None:
        """Zeros where some axis has no source, initial values where such an axis is a random one."""
        marked = [(number, axis) for number, axis in enumerate(rule.axes) if axis.has_sourceless]
        random = None
        for number, axis in marked:
            assert axis.index_tensor is not None
            index = axis.index_tensor[region[number]]
            value.masked_fill_(_along(index < 0, number, value.dim()), 0.0)
            if (index == RANDOM).any():
                here = _along(index == RANDOM, number, value.dim())
                random = here if random is None else random | here
        if random is not None:
            fresh = self._init.read(rule.target, region).to(value.dtype)
            torch.where(random, fresh, value, out=value)

    def _rule(self, key: str) -> tuple[str, TensorRule]:
        try:
            return self._rules[key]
        except KeyError:
            raise GrowthError(f"the grown model has no tensor {key}") from None


def gather(
    rule: TensorRule, prefix: str, source: TensorSource, region: Region, factor: str, squared: bool = False
) -> torch.Tensor:
    """``region`` of a target tensor, of that shape, out of its source's, times ``factor`` (of ``AxisRule``) per axis.

    Columns come before rows: a gathered source row serves all its copies. Coordinates without a source hold anything.
    The result is the caller's to change.
    """
    rows, *columns = zip(rule.axes, region, strict=True)
    bounds, picks = [], []
    for axis, part in columns:
        bound, pick = _pick(axis, part)
        bounds.append(bound)
        picks.append(pick)
    parts = []
    for bound, pick in _row_runs(*rows):
        values = source.read(f"{prefix}{rule.source}", (bound, *bounds))
        values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32, copy=True)
        for number, (column_pick, (axis, part)) in enumerate(zip(picks, columns, strict=True), start=1):
            if column_pick is not None:
                values = values.index_select(number, column_pick)
            _scale(values, axis, part, number, factor, squared)
        parts.append(values if pick is None else values.index_select(0, pick))
    gathered = parts[0] if len(parts) == 1 else torch.cat(parts)
    _scale(gathered, *rows, 0, factor, squared)
    return gathered


def _pick(axis: AxisRule, part: slice) -> tuple[slice, torch.Tensor | None]:
    """Region of the source's axis to read, and the places in it to take; places without a source take its first."""
    if axis.index_tensor is None:
        return part, None
    wanted = axis.index_tensor[part]
    present = wanted[wanted >= 0]
    if len(present) == 0:
        return slice(0, min(1, axis.size)), torch.zeros(len(wanted), dtype=torch.int64)
    first, last = int(present.min()), int(present.max())
    return slice(first, last + 1), (wanted - first).clamp_(min=0)


def _row_runs(axis: AxisRule, part: slice) -> Sequence[tuple[slice, torch.Tensor | None]]:
    """As ``_pick``, in several pieces where the rows wanted lie apart, so that what is between them is not read."""
    if axis.index_tensor is None or part.stop == part.start:
        return [_pick(axis, part)]
    wanted = axis.index_tensor[part]
    whole = _pick(axis, part)
    if whole[0].stop - whole[0].start <= 2 * len(wanted):
        return [whole]
    apart = (wanted.diff() < 0) | (wanted.diff() > len(wanted))
    cuts = [0, *(torch.nonzero(apart).flatten() + 1).tolist(), len(wanted)]
    return [_pick(axis, slice(part.start + a, part.start + b)) for a, b in pairwise(cuts)]


def _scale(values: torch.Tensor, axis: AxisRule, part: slice, number: int, factor: str, squared: bool) -> None:
    factors: torch.Tensor | None = getattr(axis, factor)
    if factors is not None:
        chosen = factors[part].square() if squared else factors[part]
        values.mul_(_along(chosen.to(values.dtype), number, values.dim()))


def _along(vector: torch.Tensor, number: int, dimensions: int) -> torch.Tensor:
    return vector.view([-1 if axis == number else 1 for axis in range(dimensions)])


def _add_noise(value: torch.Tensor, rule: TensorRule, noise: Noise, seed: int, region: Region) -> None:
    """In place, ``[rows, columns]``; keyed by the target tensor's name and row. Some rows at a time, for the memory."""
    rows, columns = region
    if noise.mix:
        value.mul_(1 - noise.mix)
    step = max(1, _NOISE_BLOCK // max(1, rule.shape[1]))
    for start in range(rows.start, rows.stop, step):
        block = range(start, min(start + step, rows.stop))
        drawn = torch.from_numpy(normal_rows(seed, f"noise:{rule.target}", block, rule.shape[1])).to(value.dtype)
        if noise.cancelling:
            _cancel(drawn, rule.axes[1])
        here = value[start - rows.start : block.stop - rows.start]
        here.add_(drawn[:, columns], alpha=noise.deviation)


def _cancel(drawn: torch.Tensor, columns: AxisRule) -> None:
    """Make ``[rows, all columns]`` sum to zero over the copies of each column, in place."""
    index, size = columns.index_tensor, columns.size
    assert index is not None
    copies = torch.bincount(index, minlength=size)
    drawn -= (drawn.new_zeros(len(drawn), size).index_add_(1, index, drawn) / copies).index_select(1, index)
    # Less their mean, k numbers have (k - 1) / k of the variance; a single one is left with none.
    drawn *= (copies / (copies - 1).clamp(min=1)).sqrt()[index]
