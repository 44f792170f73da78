"""The checkpoints of one run: names, commit, which one to resume from, which ones to keep.

Owns: ``RUN/checkpoints/step_00000200``, ``RUN/latest``, the choice of ``checkpoint.resume``, retention.
Does not own: the content of a checkpoint. Everything here runs on one rank (rank 0); the caller broadcasts the outcome.

At a stage boundary a step has two checkpoints: what the stage ended with, ``step_00000200``, and what it was grown to,
``step_00000200_grown``, which is the newer one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from growth_megatron.checkpoint.folder.commit import (
    TEMPORARY_PREFIX,
    TRASH_PREFIX,
    begin_folder,
    commit_folder,
    recover_folder,
    remove_folder,
    temporary_path,
)
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import FileEntry, Manifest, read_manifest, validate_checkpoint
from growth_megatron.errors import CheckpointError, ConfigError, NothingValidError
from growth_megatron.parallel.file_lock import locked

_LOG = logging.getLogger(__name__)

LATEST_NAME = "latest"
_NAME = re.compile(r"step_(\d{8,})(_grown)?")


@dataclass(frozen=True, order=True)
class CheckpointName:
    """Step of a checkpoint and whether it is the grown one of that step; orders oldest to newest."""

    step: int
    grown: bool = False

    def __str__(self) -> str:
        return f"step_{self.step:08d}" + ("_grown" if self.grown else "")

    @classmethod
    def parse(cls, name: str) -> CheckpointName | None:
        """The step that a folder's name says; None for a name of another form."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), match[2] is not None) if match else None


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class ResumeChoice:
    """What to start from: a checkpoint, or nothing (``path`` None: initialise)."""

    path: Path | None
    manifest: Manifest | None
    skipped: tuple[Skipped, ...] = ()


def at_step(path: Path) -> Path:
    """The checkpoint that ``RUN@STEP`` means, at a stage's end the one before growth; another path as it is.

    Raises: CheckpointError naming the steps that the run has.
    """
    run, at, step = str(path).rpartition("@")
    folder = Path(run) / "checkpoints"
    if not at or not step.isdecimal() or path.exists() or not folder.is_dir():
        return path
    found = folder / f"step_{int(step):08d}"
    if not found.is_dir():
        names = sorted(filter(None, (CheckpointName.parse(entry.name) for entry in folder.iterdir())))
        grown = {name.step for name in names if name.grown} - {name.step for name in names if not name.grown}
        steps = ", ".join(f"{step} (grown)" if step in grown else f"{step}" for step in sorted({n.step for n in names}))
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has those of steps {steps or 'none'}")
    return found


class RunDirectory:
    """The checkpoint side of a run directory. Creating the object touches nothing."""

    def __init__(self, path: str | Path, files: FileOperations | None = None) -> None:
        self.path = Path(path)
        self.checkpoints_path = self.path / "checkpoints"
        self.latest_path = self.path / LATEST_NAME
        self._files = files or FileOperations()
        self._refused: dict[Path, str] = {}
        self._lock = ExitStack()

    def lock(self) -> None:
        """Keep other jobs out of this run for as long as the process lives, however it ends.

        Raises: ConfigError where another process has the run.
        """
        lock = self.path / ".lock"
        held = ConfigError(
            f"another job is running in {self.path} (it holds {lock}); end it first, or choose another run.directory"
        )
        self._lock.enter_context(locked(lock, held))

    def checkpoint_path(self, step: int, grown: bool = False) -> Path:
        """Folder of a step's checkpoint, whether it exists or not."""
        return self.checkpoints_path / str(CheckpointName(step, grown))

    def make_way(self, step: int, grown: bool = False) -> None:
        """Remove what stands at a step that has no valid checkpoint: the names of a run's checkpoints are its own."""
        if os.path.lexists(self.checkpoint_path(step, grown)):
            remove_folder(self.checkpoint_path(step, grown), self._files)

    def begin(self, step: int, grown: bool = False) -> Path:
        """Temporary folder, empty, into which the checkpoint of ``step`` is to be written before ``commit``."""
        return begin_folder(self.checkpoint_path(step, grown), self._files)

    def commit(self, manifest: Manifest, grown: bool = False, checksums: Mapping[str, FileEntry] | None = None) -> Path:
        """Make what was written since ``begin(manifest.step, grown)`` the newest checkpoint; see ``commit_folder``."""
        final = self.checkpoint_path(manifest.step, grown)
        commit_folder(final, manifest, self._files, checksums)
        self.point_latest(final)
        return final

    def discard(self, step: int) -> None:
        """Remove what was written since ``begin(step)``, as far as it can be."""
        shutil.rmtree(temporary_path(self.checkpoint_path(step)), ignore_errors=True)

    def point_latest(self, checkpoint: Path) -> None:
        """Let ``RUN/latest`` name a committed checkpoint. It is for people: nothing is decided or ended by it."""
        self._refused.pop(checkpoint, None)  # it has just been written anew
        try:
            self._files.symlink(self.latest_path, f"{self.checkpoints_path.name}/{checkpoint.name}")
        except FileExistsError:
            _LOG.warning("%s is left as it is: it is no link; remove it to have one there", self.latest_path)
        self._files.sync_directory(self.path)

    def checkpoints(self) -> list[Path]:
        """All committed checkpoints, valid or not, newest first."""
        if not self.checkpoints_path.is_dir():
            return []
        named = [(CheckpointName.parse(path.name), path) for path in self.checkpoints_path.iterdir()]
        return [path for name, path in sorted((n, p) for n, p in named if n is not None)][::-1]

    def refuse(self, checkpoint: Path, reason: str) -> None:
        """Pass ``checkpoint`` over from now on: its manifest is sound and sizes are right, yet it cannot be used."""
        self._refused[checkpoint] = reason

    def _problem(self, checkpoint: Path, full: bool = False) -> str | None:
        return self._refused.get(checkpoint) or validate_checkpoint(checkpoint, full)

    def newest_valid(self, full: bool = False) -> tuple[Path | None, tuple[Skipped, ...]]:
        """The newest checkpoint that is whole, and the newer ones passed over; ``full`` sums all contents."""
        skipped: list[Skipped] = []
        for path in self.checkpoints():
            reason = self._problem(path, full)
            if reason is None:
                return path, tuple(skipped)
            skipped.append(Skipped(path, reason))
        return None, tuple(skipped)

    def recover(self) -> tuple[str, ...]:
        """Finish or remove what a kill left behind, and say what was done; at start, before anything is written."""
        if not self.checkpoints_path.is_dir():
            return ()
        left = sorted(self.checkpoints_path.iterdir())
        done = [recover_folder(path, self._files) for path in left if path.name.startswith(TEMPORARY_PREFIX)]
        for path in left:
            if path.name.startswith(TRASH_PREFIX) and os.path.lexists(path):
                self._files.remove_tree(path)
                done.append(f"removed {path.name}, left by an interrupted removal")
        newest, _ = self.newest_valid()
        named = self.latest_path.readlink().name if self.latest_path.is_symlink() else None
        if newest is not None and named != newest.name:
            self.point_latest(newest)
        return tuple(done)

    def choose_resume(self, mode: str) -> ResumeChoice:
        """What ``checkpoint.resume`` means for this run as it stands.

        ``auto`` goes on from the newest valid checkpoint, or starts; ``must`` never starts; ``never`` always starts and
        refuses where a run is. A path starts this run from that checkpoint (or the newest one of that run directory);
        once the run has checkpoints of its own it goes on from those, so re-running the same command resumes.

        Raises:
            ConfigError: ``never`` where a run is.
            CheckpointError: ``must`` without a checkpoint; a path that cannot be resumed from.
            NothingValidError: there are checkpoints and none is valid.
        """
        if mode == "never":
            return self._start_afresh()
        own, skipped = self.newest_valid()
        if mode not in ("auto", "must"):
            return self._resume_from(Path(mode), own, skipped)
        if own is None and skipped:
            raise _nothing_valid(self.checkpoints_path, skipped)
        if own is None and mode == "must":
            raise CheckpointError(
                f"checkpoint.resume is must, but {self.checkpoints_path} holds no checkpoint; "
                "set it to auto to start a new run, or correct run.directory"
            )
        return ResumeChoice(own, read_manifest(own) if own else None, skipped)

    def apply_retention(
        self, keep_last: int, keep_every_steps: int | None = None, protect: Collection[Path] = ()
    ) -> tuple[Path, ...]:
        """Remove old checkpoints and return their paths.

        Kept: the newest ``keep_last`` valid ones (at least one), those at multiples of ``keep_every_steps``, those in
        ``protect``, and damaged ones newer than the newest valid. A checkpoint still being written has another name.
        """
        protected = {path.resolve() for path in protect}
        valid_seen = 0
        removed: list[Path] = []
        for path in self.checkpoints():
            valid_seen += self._problem(path) is None
            name = CheckpointName.parse(path.name)
            permanent = keep_every_steps is not None and name is not None and name.step % keep_every_steps == 0
            is_recent = valid_seen <= max(keep_last, 1)
            if not is_recent and not permanent and path.resolve() not in protected:
                removed.append(path)
        for path in reversed(removed):
            remove_folder(path, self._files)
        return tuple(removed)

    def _start_afresh(self) -> ResumeChoice:
        existing = [str(path) for path in self.checkpoints()]
        existing += [str(path) for path in (self.path / "metrics.jsonl",) if path.exists()]
        if existing:
            raise ConfigError(
                f"checkpoint.resume is never, but {self.path} holds a run already ({existing[0]}); set it to auto to "
                "go on with that run, choose another run.directory, or remove the folder yourself"
            )
        return ResumeChoice(None, None)

    def _resume_from(self, origin: Path, own: Path | None, skipped: tuple[Skipped, ...]) -> ResumeChoice:
        origin = at_step(origin)
        if not origin.is_dir():
            raise CheckpointError(
                f"checkpoint.resume: {origin} is not a folder; allowed: auto, must, never, the path of a checkpoint "
                "or of a run directory, or RUN@STEP"
            )
        if origin.resolve().parent == self.checkpoints_path.resolve():
            return self._resume_from_own(origin)
        if own is not None:
            return ResumeChoice(own, read_manifest(own), skipped)
        if skipped:
            raise _nothing_valid(self.checkpoints_path, skipped)
        if (origin / "checkpoints").is_dir():
            other = RunDirectory(origin)
            other._refused = self._refused
            newest, passed_over = other.newest_valid()
            if newest is None:
                raise _nothing_valid(origin / "checkpoints", passed_over)
            return ResumeChoice(newest, read_manifest(newest), passed_over)
        reason = self._problem(origin)
        if reason is not None:
            raise CheckpointError(f"checkpoint.resume: cannot resume from {origin}: {reason}")
        return ResumeChoice(origin, read_manifest(origin))

    def _resume_from_own(self, origin: Path) -> ResumeChoice:
        """Going back within a run would leave newer checkpoints that a later ``auto`` takes for its own."""
        reason = self._problem(origin)
        if reason is not None:
            raise CheckpointError(f"checkpoint.resume: cannot resume from {origin}: {reason}")
        newer = [path.name for path in self.checkpoints() if _order(path) > _order(origin.resolve())]
        if newer:
            raise ConfigError(
                f"checkpoint.resume: {origin} is not the newest checkpoint of this run ({', '.join(reversed(newer))}); "
                "set checkpoint.resume to auto to go on from the newest, remove the newer ones to go back, or choose "
                "another run.directory to branch off"
            )
        return ResumeChoice(origin, read_manifest(origin))


def _nothing_valid(where: Path, skipped: tuple[Skipped, ...]) -> NothingValidError:
    found = "; ".join(f"{item.path.name}: {item.reason}" for item in skipped)
    return NothingValidError(
        f"{where} holds no valid checkpoint ({found or 'it is empty'}); restore one from a backup, or choose another "
        "run.directory to start anew"
    )


def _order(checkpoint: Path) -> CheckpointName:
    return CheckpointName.parse(checkpoint.name) or CheckpointName(-1)
