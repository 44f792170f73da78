"""The vocabulary of growth plans: what one target tensor is made of.

Owns: the rule of a tensor (which source tensor, which index and factor along each axis, a fill, noise) and the plan, a
rule for each tensor of the target model. Plain values: no files, no processes.
Does not own: which rules an operator gives (``growth.plan``, ``growth.width``), their execution (``growth.view``).

One rule serves the weight, its float32 master and both Adam moments. With the factor ``g`` of the gradient along each
axis (``AxisRule.gradient_scale``), ``exp_avg`` is multiplied by g and ``exp_avg_sq`` by g squared: a weight that is
``a`` times its source in ``c`` copies has g = 1 / (a c).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from growth_megatron.checkpoint.folder.manifest import Multipliers
from growth_megatron.config.growth_schema import Ramp
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import GrowthError

if TYPE_CHECKING:
    import torch

ZERO, RANDOM = -1, -2
"""Entries of an index for coordinates without a source. Where a zero and a random axis meet, random wins."""

OptimizerState = Literal["reset", "carry", "asymmetric"]
"""reset: moments zero and step 0, as in the paper; carry: moments by the rule of their weight, step kept; asymmetric:
as carry for the first copy of a coordinate, zero for the others and for new ones (SPARKLING, arXiv 2602.02472)."""


@dataclass(frozen=True)
class AxisRule:
    """Where the coordinates of one axis come from; with no ``index`` it is the source's axis itself.

    ``new`` marks coordinates that are no continuation of an old one: later copies, and those without a source.
    """

    size: int
    index: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None
    gradient_scale: tuple[float, ...] | None = None
    new: tuple[bool, ...] | None = None

    @property
    def target_size(self) -> int:
        """Coordinates of the target's axis."""
        return self.size if self.index is None else len(self.index)

    @property
    def is_identity(self) -> bool:
        """Whether the axis is the source's own, unscaled."""
        return self.index is None and self.scale is None and self.gradient_scale is None

    @cached_property
    def index_tensor(self) -> torch.Tensor | None:
        """``[target size]``, int64."""
        return _tensor(self.index)

    @cached_property
    def scale_tensor(self) -> torch.Tensor | None:
        """``[target size]``, float64, as all factors: they are rounded once, to the type of the computation."""
        return _tensor(self.scale)

    @cached_property
    def gradient_tensor(self) -> torch.Tensor | None:
        """``[target size]``, float64."""
        return _tensor(self.gradient_scale)

    @cached_property
    def new_tensor(self) -> torch.Tensor | None:
        """``[target size]``, bool."""
        return _tensor(self.new)

    @cached_property
    def has_sourceless(self) -> bool:
        """Whether some coordinate has no source."""
        return self.index is not None and min(self.index) < 0


def _tensor(values: tuple[Any, ...] | None) -> torch.Tensor | None:
    if values is None:
        return None
    import torch  # plans and their checks need none

    return torch.tensor(values, dtype=torch.float64 if isinstance(values[0], float) else None)


@dataclass(frozen=True)
class Noise:
    """Normal noise on a matrix: W <- (1 - mix) W + deviation * n.

    With ``cancelling``, n sums to zero over the copies of each input coordinate, so that the function stays.
    """

    deviation: float
    mix: float = 0.0
    cancelling: bool = False


@dataclass(frozen=True)
class TensorRule:
    """How one target tensor comes about: out of a source tensor along each axis, or filled as a whole: with zeros,
    initial values, or what learned maps make of all layers (``growth.learned``).

    ``state`` says what the tensor is to the optimizer: ``old``; a ``copy`` of a tensor that is there already; or
    ``new``, with zero moments under every policy.
    """

    target: str
    axes: tuple[AxisRule, ...]
    source: str | None = None
    fill: Literal["zeros", "initial", "learned"] | None = None
    noise: Noise | None = None
    state: Literal["old", "copy", "new"] = "old"

    def __post_init__(self) -> None:
        if (self.source is None) == (self.fill is None):
            raise ValueError(f"{self.target}: give either a source tensor or a fill")

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape of the target tensor."""
        return tuple(axis.target_size for axis in self.axes)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Global shape of the source tensor."""
        return tuple(axis.size for axis in self.axes)

    @property
    def is_selection(self) -> bool:
        """Whether the target is a whole source tensor, unchanged: then stored data serve as they are."""
        return self.source is not None and self.noise is None and all(axis.is_identity for axis in self.axes)

    def keeps_moments(self, policy: OptimizerState) -> bool:
        """Whether any moment of the tensor is other than zero under ``policy``."""
        if policy == "reset" or self.source is None or self.state == "new":
            return False
        return policy == "carry" or self.state == "old"


@dataclass(frozen=True)
class GrowthPlan:
    """A growth from one geometry to another: one rule per tensor of the target model.

    ``zero_gradient_at_first`` names the new parts that get no gradient in the first step, and why; ``inexact_moments``
    the parts whose carried moments only approximate those of the grown model. ``multipliers`` are those under which the
    grown run follows the source run, by model key with the layer number written ``*``; ``ramps`` those of the masks
    (``growth.masks``), without which the rules alone are not the model at first; ``maps`` are learned ones by name
    (``growth.learned``), once they are known.
    """

    operator: str
    source_geometry: ModelConfig
    target_geometry: ModelConfig
    rules: tuple[TensorRule, ...]
    layers: tuple[int, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    function_preserving: bool = False
    multipliers: Mapping[str, Multipliers] = field(default_factory=dict)
    ramps: Mapping[str, Ramp] = field(default_factory=dict)
    zero_gradient_at_first: tuple[str, ...] = ()
    inexact_moments: tuple[str, ...] = ()
    maps: Mapping[str, torch.Tensor] | None = None

    @property
    def is_learned(self) -> bool:
        """Whether ``maps`` make the target's weights."""
        return any(rule.fill == "learned" for rule in self.rules)

    @property
    def is_selection(self) -> bool:
        """Whether stored chunks, and zeros, are all that the target needs."""
        return all(rule.is_selection or rule.fill == "zeros" for rule in self.rules)


def check_optimizer_state(policy: str) -> OptimizerState:
    """Raises GrowthError unless ``policy`` is one of the policies for the moments."""
    if policy not in get_args(OptimizerState):
        raise GrowthError(f"optimizer_state is {policy!r}; allowed: {', '.join(get_args(OptimizerState))}")
    return policy  # type: ignore[return-value]
