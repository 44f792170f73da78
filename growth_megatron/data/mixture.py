"""What a run draws of each of its datasets, from the sizes of their files; without torch.

Owns: the tokens of a dataset, the weights that nobody gave, shares and epochs.
Does not own: opening datasets (``prepared``), the order of a blend (``order``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from growth_megatron.config.schema import DataConfig, DatasetConfig, StageConfig
from growth_megatron.config.units import format_count
from growth_megatron.errors import DataError

IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document bounds
_TOKEN_BYTES = {4: 4, 5: 8, 8: 2}  # by dtype code: int32, int64, uint16


def suffixed(prefix: str | Path, suffix: str) -> Path:
    """``PREFIX.bin`` and its like; unlike ``Path.with_suffix`` it keeps the dots of the prefix."""
    return Path(f"{prefix}{suffix}")


def stored_tokens(prefix: str | Path) -> int:
    """Tokens of a dataset.  Raises: DataError where it is not there."""
    try:
        with open(suffixed(prefix, ".idx"), "rb") as stream:
            code = IDX_HEADER.unpack(stream.read(IDX_HEADER.size))[2]
        return suffixed(prefix, ".bin").stat().st_size // _TOKEN_BYTES[code]
    except (OSError, struct.error, KeyError):
        raise DataError(f"{prefix}.bin and {prefix}.idx are not there, or no dataset; see prepare-data") from None


def weights(entries: Sequence[DatasetConfig]) -> list[float]:
    """Weights in the blend, in proportion to which samples are drawn: those given, else the datasets' tokens.

    One dataset alone has the weight 1.
    """
    if len(entries) == 1:
        return [entries[0].weight or 1.0]
    return [float(entry.weight or stored_tokens(entry.path)) for entry in entries]


@dataclass(frozen=True)
class Draw:
    """What a run draws of one dataset; ``tokens`` are those of one epoch."""

    path: str
    share: float
    tokens: int
    epochs: float

    def __str__(self) -> str:
        return f"{self.path} {self.share:.1%} ({format_count(self.tokens)} tokens, {self.epochs:.3g} epochs)"


def draws(data: DataConfig, tokens: int) -> list[Draw]:
    """What ``tokens`` draw of each training dataset.  Raises: DataError where one is not there."""
    given = weights(data.train)
    sizes = [round(stored_tokens(entry.path) * (1 - data.validation_fraction)) for entry in data.train]
    return [
        Draw(entry.path, weight / sum(given), size, tokens * weight / sum(given) / max(size, 1))
        for entry, weight, size in zip(data.train, given, sizes, strict=True)
    ]


def draws_of_stages(stages: Sequence[StageConfig], tokens: Sequence[int]) -> list[tuple[list[str], list[Draw]]]:
    """For stages in a row that go on in the same samples: their names, and what they draw together.

    ``tokens`` are those of each stage.
    """
    found = []
    for _, group in groupby(zip(stages, tokens, strict=True), key=lambda pair: pair[0].stream):
        alike = list(group)
        together = sum(number for _, number in alike)
        found.append(([stage.name for stage, _ in alike], draws(alike[0][0].data, together)))
    return found


def describe_draws(stages: Sequence[StageConfig], tokens: Sequence[int]) -> str:
    """The same in words, a line for each change of data."""
    found = draws_of_stages(stages, tokens)
    lines = []
    for names, drawn in found:
        of = f" of {', '.join(names)}" if len(found) > 1 else ""
        repeats = "; more than one epoch repeats text" if any(draw.epochs > 1 for draw in drawn) else ""
        lines.append(f"data{of}: {', '.join(map(str, drawn))}{repeats}")
    return "\n".join(lines)
