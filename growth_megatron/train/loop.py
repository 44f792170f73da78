"""One stage of a run, from its first to its last step.

Owns: the order of data, step, validation, checkpoint and report within a stage.
Does not own: what a step is (``train.engine``), what comes before and after the stage (``train.stages``).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.api import CheckpointException

from growth_megatron.checkpoint.folder.manifest import FileEntry, Manifest, library_version
from growth_megatron.checkpoint.folder.run_directory import RunDirectory
from growth_megatron.checkpoint.folder.store import StoreCopies
from growth_megatron.checkpoint.torch_dist.saver import Save, start_save
from growth_megatron.config.load import LoadedConfig
from growth_megatron.config.schema import StageConfig
from growth_megatron.data.loader import BatchLoader
from growth_megatron.errors import CheckpointError, GrowthMegatronError
from growth_megatron.model.cost import flops_per_token
from growth_megatron.parallel import collectives
from growth_megatron.train.batches import read_step, step_loader, validation_set
from growth_megatron.train.counters import Counters
from growth_megatron.train.data import RunData
from growth_megatron.train.engine import Engine, StepResult
from growth_megatron.train.hardware import mfu, peak_flops_per_s
from growth_megatron.train.health import RollBack, fault, highest_loss, stopping
from growth_megatron.train.metrics import Metrics
from growth_megatron.train.profiling import FOLDER, StepProfiler
from growth_megatron.train.resilience import StopRequest
from growth_megatron.train.schedule import learning_rate, schedule_position
from growth_megatron.train.watchdog import Watchdog

AGAIN = "re-run the same command to resume"
_TORCH_CANNOT_WRITE = "PytorchStreamWriter"  # failed writing, says torch.save


TaskEvaluation = Callable[[Engine, Callable[[], None]], Mapping[str, Any]]
"""Figures by task of the live model, the same on all ranks; calls back while it works, so that it is seen to."""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What all stages of a run share."""

    loaded: LoadedConfig
    directory: RunDirectory
    metrics: Metrics
    stop: StopRequest
    watchdog: Watchdog
    data: RunData
    world_size: int
    evaluate_tasks: TaskEvaluation | None = None
    """What ``evaluation.tasks`` asks for."""
    copies: StoreCopies | None = None
    """On rank 0 what keeps ``checkpoint.store`` like the run directory."""


@dataclasses.dataclass
class _Pending:
    """A checkpoint that is being written and not yet committed."""

    folder: Path
    manifest: Manifest
    save: Save
    started: float
    blocking_s: float
    in_background: bool


class StageLoop:
    """Trains one stage. Every method is called on all ranks alike."""

    def __init__(self, context: RunContext, engine: Engine, start: Manifest | None, counters: Counters) -> None:
        self.context, self.engine, self.counters = context, engine, counters
        self.config = context.loaded.config
        self.stage: StageConfig = engine.stage
        self._data = context.data.of(self.stage)
        self._lineage = start.lineage if start else ()
        self._branches = start.branches if start else ()
        self._pending: _Pending | None = None
        self._saved_step = counters.step if start else -1
        self._evaluated_step, self._validation_loss = -1, float("nan")
        self._tasks_step = -1
        self._validation = collectives.on_all_ranks(lambda: validation_set(self._data.validation, self.stage))
        self._rollback: RollBack | None = None
        self._skipped_in_a_row = 0
        self._leaving = False
        steps = self.config.logging.profile_steps
        folder = context.directory.path / FOLDER
        self._profiler = (
            None if steps is None else StepProfiler(folder, *steps, collectives.rank(), context.metrics.phase)
        )
        self._window_start, self._window_steps, self._window_data_s = time.perf_counter(), 0, 0.0

    def note_loss_after_growth(self, loss: float | None) -> None:
        """The validation loss before the first step: the next checkpoint's lineage has it; no manifest is rewritten."""
        *earlier, newest = self._lineage
        self._lineage = (*earlier, newest.model_copy(update={"validation_loss_after": loss}))

    def run(self) -> bool | RollBack:
        """Train to the stage's end, validate there and save. Returns False if stopped before it (and saved)."""
        with step_loader(self._data.train, self.stage) as loader:
            stopped = collectives.any_rank(self.context.stop.requested)
            self._restart_window()
            while not (stopped or self._rollback or self.counters.ends_stage(self.config)):
                stopped = self._step(loader) if self._profiler is None else self._profiled_step(loader)
        ended = self.counters.ends_stage(self.config)
        if self._rollback:
            pass
        elif not ended:
            self.context.metrics.log("event", step=self.counters.step, event="stop", message=self._stop_message())
        else:
            if self._evaluated_step != self.counters.step:
                self.validate()
            if self._tasks_step != self.counters.step:
                self._evaluate_tasks()
        self._commit_pending(wait=True)
        self._leaving = not ended and not self._rollback
        if self._saved_step != self.counters.step and (self.counters.step > 0 or ended) and not self._rollback:
            self._save(in_background=False)
        return self._rollback or ended

    def validate(self) -> float | None:
        """Loss on the validation set (nats per token), logged; None without one."""
        if not self._validation:
            return None
        self.context.watchdog.alive("validating", self.counters.step)
        loss = self.engine.evaluate(self._validation, self.counters.stage_step)
        self._evaluated_step, self._validation_loss = self.counters.step, loss
        self.context.metrics.log(
            "validation",
            step=self.counters.step,
            stage=self.stage.name,
            consumed_tokens=self.counters.consumed_tokens,
            flops=self.counters.flops,
            flops_6nd=self.counters.flops_6nd,
            validation_loss=loss,
        )
        self._restart_window()
        return loss

    def _evaluate_tasks(self) -> None:
        """Figures of lm-eval's tasks, logged; nothing where none are asked for."""
        if self.context.evaluate_tasks is None:
            return
        step, started = self.counters.step, time.perf_counter()
        with self.engine.evaluating(self.counters.stage_step):
            results = self.context.evaluate_tasks(
                self.engine, lambda: self.context.watchdog.alive("evaluating tasks", step)
            )
        self._tasks_step = step
        self.context.metrics.log(
            "evaluation",
            step=step,
            stage=self.stage.name,
            consumed_tokens=self.counters.consumed_tokens,
            flops=self.counters.flops,
            flops_6nd=self.counters.flops_6nd,
            results=results,
            limit=self.config.evaluation.tasks_limit,
            seconds=time.perf_counter() - started,
        )
        self._restart_window()

    def _step(self, loader: BatchLoader) -> bool:
        self.context.watchdog.alive("waiting for data", self.counters.step)
        started = time.perf_counter()
        batches, error = read_step(loader, self.counters.next_sample, self.stage)
        self._window_data_s += time.perf_counter() - started
        position, total = schedule_position(self.config, self.counters.stage, self.counters.stage_step)
        rate = learning_rate(self.stage.schedule, position, total)
        bound = highest_loss(self.counters, self.stage.training)
        self.context.watchdog.alive(step=self.counters.step)
        every = self.config.logging.interval_steps
        result = self.engine.train_step(
            batches,
            rate,
            self.context.stop.requested,
            error is not None,
            bound,
            self.counters.stage_step,
            measures=(self.counters.step + 1) % every == 0,
        )
        if result.failed:
            collectives.on_all_ranks(partial(raise_it, error))
        self.counters = self.counters.after_step(self.stage)
        self._window_steps += 1
        self.context.watchdog.alive("between steps", self.counters.step)
        if result.taken:
            self.counters, self._skipped_in_a_row = self.counters.with_loss(result.loss), 0
        else:
            self._not_taken(result, bound)
            if self._rollback:
                return False
        if self._due(every):
            self._report(result, rate)
        else:
            self.context.metrics.progress(self.counters.step, self.stage.name)
        if self._due(self.config.evaluation.interval_steps):
            self.validate()
        if self._due(self.config.evaluation.tasks_interval_steps):
            self._evaluate_tasks()
        self._commit_pending(wait=False)
        last = result.stop_requested or self.counters.ends_stage(self.config)  # run() saves there, after validation
        if self._due(self.config.checkpoint.interval_steps) and not last:
            self._save(self.config.checkpoint.async_save)
        return result.stop_requested

    def _profiled_step(self, loader: BatchLoader) -> bool:
        assert self._profiler is not None
        self._profiler.begin_step(self.counters.step + 1)
        stopped = self._step(loader)
        self.context.watchdog.alive("writing a profile", self.counters.step)
        message = self._profiler.end_step(self.counters.step)
        if self.counters.ends_stage(self.config) or stopped or self._rollback:
            message = message or self._profiler.finish(self.counters.step)
        if message is not None:
            self.context.metrics.log("event", step=self.counters.step, event="profile", message=message)
            self._restart_window()
        return stopped

    def _not_taken(self, result: StepResult, bound: float) -> None:
        """Do as ``training.on_non_finite`` says; the counters are those after the step."""
        training, step = self.stage.training, self.counters.step
        what = fault(result.loss, result.grad_norm, bound)
        self._skipped_in_a_row += 1
        if training.on_non_finite == "rollback":
            self._rollback = RollBack(f"{what} at step {step}", self.counters.next_sample)
        elif training.on_non_finite == "stop":
            raise stopping(what, step)
        elif self._skipped_in_a_row > training.non_finite_limit:
            raise stopping(f"{self._skipped_in_a_row} steps in a row could not be taken: {what}", step)
        else:
            self.counters = dataclasses.replace(self.counters, skipped_steps=self.counters.skipped_steps + 1)
            message = f"{what}: the update was left out ({self.counters.skipped_steps} so far)"
            self.context.metrics.log("event", step=step, event="skip", message=message)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.counters.step % interval == 0

    def _report(self, result: StepResult, rate: float) -> None:
        now = time.perf_counter()
        seconds, data_s = (now - self._window_start) / self._window_steps, self._window_data_s / self._window_steps
        self._window_start, self._window_steps, self._window_data_s = now, 0, 0.0  # what follows is part of the next
        tokens_per_s = self.stage.tokens_per_step / seconds
        flops_per_s = tokens_per_s * flops_per_token(self.stage.model) / self.context.world_size
        peak = self._peak_flops_per_s()
        self.context.metrics.log(
            "train",
            step=self.counters.step,
            stage=self.stage.name,
            stage_step=self.counters.stage_step,
            consumed_tokens=self.counters.consumed_tokens,
            consumed_samples=self.counters.consumed_samples,
            flops=self.counters.flops,
            flops_6nd=self.counters.flops_6nd,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=rate,
            **result.norms,
            tokens_per_s=tokens_per_s,
            tflops_per_s=flops_per_s / 1e12,
            mfu=mfu(flops_per_s, peak),
            step_time_s=seconds,
            data_time_s=data_s,
            memory_bytes=int(collectives.largest(memory_bytes())),
        )

    def _peak_flops_per_s(self) -> float | None:
        configured = self.config.logging.peak_tflops_per_s
        if configured is not None:
            return configured * 1e12
        if not torch.cuda.is_available() or self.stage.training.precision != "bf16":
            return None
        return peak_flops_per_s(torch.cuda.get_device_name())

    def _restart_window(self) -> None:
        self._window_start, self._window_steps, self._window_data_s = time.perf_counter(), 0, 0.0

    @contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        """A checkpoint that cannot be written ends the run, and what there is of it is removed.

        What fails on one rank alone ends the others by their launcher: they may be in a collective.
        """
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            if isinstance(error, RuntimeError) and _TORCH_CANNOT_WRITE not in str(error):
                raise  # such as a rank that is gone
            if collectives.rank() == 0:
                self.context.directory.discard(step)
            causes = [failure for failure, _ in getattr(error, "failures", {}).values()]
            cause = causes[0] if causes else error
            raise GrowthMegatronError(f"no checkpoint of step {step}: {cause}; mend that and {AGAIN}") from error

    def _save(self, in_background: bool) -> None:
        self.context.watchdog.alive("saving", self.counters.step)
        self._commit_pending(wait=True)
        started = time.perf_counter()
        directory, step = self.context.directory, self.counters.step
        if collectives.any_rank(not self.engine.is_finite()):
            what = f"weights or Adam's moments are not finite after step {step}"
            if self.stage.training.on_non_finite != "rollback":
                raise GrowthMegatronError(
                    f"{what}: they were not saved, and what was saved is finite. Re-run the command, which goes on "
                    "from there, with a lower schedule.learning_rate or with training.on_non_finite=rollback"
                )
            self._rollback = RollBack(what, self.counters.next_sample)
            return
        with self._writing(step), self.engine.gathered_parameters():
            folder: Path = collectives.on_rank_zero(lambda: directory.begin(step))
            save = start_save(folder, self.engine.models, self.engine.optimizer)
        blocking_s = time.perf_counter() - started
        self._pending = _Pending(folder, self._manifest(), save, started, blocking_s, in_background)
        self._saved_step = step
        if not in_background:
            self._commit_pending(wait=True)
        self._restart_window()

    def _commit_pending(self, wait: bool) -> None:
        """Make a written checkpoint visible; with ``wait``, first wait for one still being written."""
        pending = self._pending
        if pending is None or (not wait and collectives.any_rank(not pending.save.is_written())):
            return
        self._pending = None
        step, commit_started = pending.manifest.step, time.perf_counter()
        try:
            with self._writing(step):
                checksums = pending.save.finish()
                path, size_bytes = collectives.on_rank_zero(partial(self._commit, pending, checksums))
            if self._leaving:
                self.context.stop.finish()  # all is saved: another signal changes nothing
        except CheckpointError as error:  # of all ranks alike
            collectives.on_rank_zero(partial(self.context.directory.discard, step))
            message = f"no checkpoint of step {step}: {error}"
            if not pending.in_background:
                raise GrowthMegatronError(message) from error
            message += "; training goes on to the next save"
            self.context.metrics.log("event", step=self.counters.step, event="save_failed", message=message)
            self._saved_step = -1
            return
        ended = time.perf_counter()
        self.context.metrics.log(
            "checkpoint",
            step=pending.manifest.step,
            path=str(path),
            seconds=ended - pending.started,
            blocking_seconds=pending.blocking_s + ended - commit_started,
            bytes=size_bytes,
        )

    def _commit(self, pending: _Pending, checksums: dict[str, FileEntry]) -> tuple[Path, int]:
        """On rank 0: the checkpoint's folder and its size in bytes. Files of no rank in particular are summed here."""
        directory, settings = self.context.directory, self.config.checkpoint
        try:
            (pending.folder / "config.yaml").write_text(self.context.loaded.text, encoding="utf-8")
            for name, content in self._data.tokenizer_files.items():
                (pending.folder / name).write_bytes(content)
            path = directory.commit(pending.manifest, checksums=checksums)
        except OSError as error:
            where = error.filename or pending.folder
            raise CheckpointError(f"cannot write {where}: {error.strerror}; mend that and {AGAIN}") from error
        directory.apply_retention(settings.keep_last, settings.keep_every_steps)
        if self.context.copies is not None:
            self.context.copies.update()
        return path, sum(file.stat().st_size for file in path.iterdir())

    def _manifest(self) -> Manifest:
        return Manifest(
            library_version=library_version(),
            **dataclasses.asdict(self.counters),
            geometry=self.stage.model,
            layout=self.stage.parallel,
            world_size=self.context.world_size,
            data_fingerprint=dict(self._data.fingerprint),
            config_hash=self.context.loaded.hash,
            multipliers=dict(self.engine.multipliers),
            lineage=self._lineage,
            branches=self._branches,
            validation_loss=self._validation_loss if self._evaluated_step == self.counters.step else None,
        )

    def _stop_message(self) -> str:
        return f"stopped early on request at step {self.counters.step}; re-run the same command to resume"


def raise_it(error: Exception | None) -> None:
    """Raises ``error`` if there is one."""
    if error is not None:
        raise error


def memory_bytes() -> int:
    """Peak device memory of this rank; without a device its resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
