"""When the masks of a growth open: linear ramps over steps of the stage, one for each kind of new part.

Owns: which ramps a growth has, how far open a mask is. Pure functions of the stage's step, no torch.
Does not own: what a mask multiplies (``growth.masks``), the option (``config.growth_schema``).
"""

from __future__ import annotations

from collections.abc import Mapping

from growth_megatron.config.growth_schema import MaskRamps, Ramp
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.operators import Choice

_SIZES = {
    "depth": "num_layers",
    "ffn": "ffn_hidden_size",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
}
"""What grows behind a mask of each kind."""


def mask_ramps(source: ModelConfig, target: ModelConfig, choice: Choice) -> dict[str, Ramp]:
    """First and last step of each mask of a growth, by kind; empty where nothing new is behind one."""
    ramps = choice.growth.ramp or MaskRamps()
    found = {}
    for kind, size in _SIZES.items():
        part = choice.depth if kind == "depth" else choice.width
        if part is not None and part.is_masked and getattr(source, size) != getattr(target, size):
            found[kind] = getattr(ramps, kind)
    return found


def gate(ramp: Ramp, step: int) -> float:
    """How far a mask is open, 0 to 1, after ``step`` steps of the stage."""
    first, last = ramp
    return min(max((step - first) / (last - first), 0.0), 1.0)


def last_step(ramps: Mapping[str, Ramp]) -> int:
    """From this step of the stage on all masks are open; 0 without any."""
    return max((last for _, last in ramps.values()), default=0)


def describe_ramps(ramps: Mapping[str, Ramp]) -> str:
    """The ramps in one line."""
    return ", ".join(f"{kind} over steps {first:,} to {last:,}" for kind, (first, last) in ramps.items())
