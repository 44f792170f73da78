"""Whether the files of a checkpoint, or of a run's checkpoints, are whole.

Owns: ``verify``'s checks of files, and the form of a check.
Does not own: the validation itself (``checkpoint.folder.manifest``), what becomes of a growth (``growth.verify``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from growth_megatron.checkpoint.folder.commit import TEMPORARY_PREFIX
from growth_megatron.checkpoint.folder.manifest import Manifest, read_manifest, validate_checkpoint
from growth_megatron.checkpoint.folder.run_directory import RunDirectory, Skipped
from growth_megatron.checkpoint.origin import existing_folder, none_valid, run_of
from growth_megatron.config.units import format_bytes
from growth_megatron.errors import CheckpointError

Outcome = Literal["OK", "FAILED", "SKIPPED"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at in a checkpoint; ``figures`` are the numbers its text names."""

    path: Path
    subject: str
    outcome: Outcome
    text: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The check as it is printed."""
        return f"{self.outcome:<7}  {self.path}  {self.subject}: {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, the figures beside the rest; null where one is not finite."""
        words = {"path": str(self.path), "subject": self.subject, "outcome": self.outcome, "text": self.text}
        return {**words, **{name: value if math.isfinite(value) else None for name, value in self.figures.items()}}


def verify_files(path: Path, full: bool = False) -> Iterator[Check]:
    """One check for each checkpoint at ``path``, newest first: are its files whole. ``full`` sums the contents too.

    Raises, after the last check:
        CheckpointError: the checkpoint, or some of the run's, are damaged; or there is none.
        NothingValidError: the run has checkpoints and none of them is whole.
    """
    path = existing_folder(path)
    run = run_of(path)
    checkpoints = [path] if run is None else run.checkpoints()
    damaged: list[Skipped] = []
    for checkpoint in checkpoints:
        reason = validate_checkpoint(checkpoint, full)
        if reason is None:
            yield Check(checkpoint, "files", "OK", _contents_line(read_manifest(checkpoint), full))
        else:
            damaged.append(Skipped(checkpoint, reason))
            yield Check(checkpoint, "files", "FAILED", reason)
    if run is not None:
        yield from _left_behind(run)
        if len(damaged) == len(checkpoints):
            raise none_valid(run, damaged)
    if damaged:
        remedy = "the others are whole, and a run goes on from the newest of those" if run else "use another one"
        names = ", ".join(item.path.name for item in damaged)
        raise CheckpointError(f"{len(damaged)} of {len(checkpoints)} checkpoints damaged ({names}); {remedy}")


def _left_behind(run: RunDirectory) -> Iterator[Check]:
    text = "unfinished: a save under way, or one that was killed; the next train tidies it up"
    for entry in sorted(run.checkpoints_path.iterdir()):
        if entry.name.startswith(TEMPORARY_PREFIX):
            yield Check(entry, "files", "SKIPPED", text)


def _contents_line(manifest: Manifest, full: bool) -> str:
    checked = "contents match their checksums" if full else "sizes alone were looked at, contents are with --full"
    return f"step {manifest.step}, {len(manifest.files)} files, {format_bytes(manifest.total_bytes)}, {checked}"
