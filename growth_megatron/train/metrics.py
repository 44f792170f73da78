"""What a run reports: metrics.jsonl always, the console, TensorBoard and wandb on request.

Owns: the form of metrics.jsonl, its repair on resume, the fan-out to the other outputs.
Does not own: their looks (``train.console``) and libraries (``train.trackers``), nor what is measured (``train.loop``).

One rank logs (the last pipeline stage's, data-parallel rank 0, which has the loss); the others get a ``NullMetrics``.
"""

from __future__ import annotations

import json
import logging as log
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from typing_extensions import Self, override

from growth_megatron.config.run_schema import LoggingConfig
from growth_megatron.errors import DataError, GrowthMegatronError
from growth_megatron.train.console import Console, open_console
from growth_megatron.train.position import Position
from growth_megatron.train.trackers import Tracker, open_trackers

_LOG = log.getLogger(__name__)
FILE_NAME = "metrics.jsonl"

# Fields of each kind in the order they are written; fields not named here follow, `time` comes last.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "train": (
        "step", "stage", "stage_step", "consumed_tokens", "consumed_samples", "flops", "flops_6nd", "loss", "grad_norm",
        "learning_rate", "tokens_per_s", "tflops_per_s", "mfu", "step_time_s", "data_time_s", "memory_bytes",
    ),
    "learn": (
        "step", "stage", "phase_step", "phase_steps", "consumed_tokens", "consumed_samples", "flops", "flops_6nd",
        "loss", "grad_norm", "learning_rate", "tokens_per_s", "step_time_s", "memory_bytes",
    ),
    "validation": ("step", "consumed_tokens", "flops", "flops_6nd", "validation_loss"),
    "growth": (
        "step", "operator", "source", "target", "source_geometry", "target_geometry", "optimizer_state",
        "validation_loss_before", "validation_loss_after", "seconds", "bytes_written",
    ),
    "checkpoint": ("step", "path", "seconds", "blocking_seconds", "bytes"),
    "evaluation": ("step", "consumed_tokens", "flops", "flops_6nd", "results"),
    "event": ("step", "event", "message"),
}  # fmt: skip
_TEXTS = ("stage", "operator", "source", "target", "optimizer_state", "path", "event", "message")
_MAPPINGS = ("source_geometry", "target_geometry", "results")


class Metrics(Protocol):
    """What the training loop talks to."""

    def log(self, kind: str, **fields: Any) -> None:
        """Take one record of a kind in ``FIELDS``."""
        ...

    def progress(self, step: int, stage: str) -> None:
        """A step is done that has no record."""
        ...

    def phase(self, text: str) -> None:
        """Say what is begun and may take a while; it goes on no record."""
        ...

    def rewind(self, step: int, *, before_growth: bool = False, learned: int | None = None) -> None:
        """Forget what a resumed run is going to do again."""
        ...

    def close(self) -> None:
        """Write out what is left, and end the outputs."""
        ...


class NullMetrics(Metrics):
    """For the ranks that do not log."""

    @override
    def log(self, kind: str, **fields: Any) -> None:
        pass

    @override
    def progress(self, step: int, stage: str) -> None:
        pass

    @override
    def phase(self, text: str) -> None:
        pass

    @override
    def rewind(self, step: int, *, before_growth: bool = False, learned: int | None = None) -> None:
        pass

    @override
    def close(self) -> None:
        pass


class MetricsLogger:
    """Appends to RUN/metrics.jsonl and passes each record on to the console and the trackers.

    Args:
        run_directory: exists already.
        logging: which outputs.
        position: the run's start, which the console follows.
        config: effective configuration, for wandb.
        console: default: live view on a terminal, lines elsewhere.

    Raises:
        ConfigError: an output is asked for whose package is not installed.
    """

    def __init__(
        self,
        run_directory: Path,
        logging: LoggingConfig,
        position: Position,
        *,
        config: Mapping[str, Any] | None = None,
        console: Console | None = None,
    ) -> None:
        self.path = Path(run_directory) / FILE_NAME
        self._trackers: list[Tracker] = open_trackers(Path(run_directory), logging, config or {})
        self._console = console or open_console(position)
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def log(self, kind: str, **fields: Any) -> None:
        """Write one record; a number that is not finite becomes null and an event of its own."""
        if kind not in FIELDS:
            raise ValueError(f"unknown kind of metrics {kind!r}; allowed: {', '.join(FIELDS)}")
        lost: list[tuple[str, float]] = []
        record = _plain(_ordered(kind, fields), lost)
        self._emit(record)
        for name, value in lost:
            message = f"{name} of the {kind} record is {value}"
            self.log("event", step=record.get("step"), event="non_finite", message=message)

    def progress(self, step: int, stage: str) -> None:
        """Move the live view between two records; free on a console without one."""
        self._console.progress(step, stage)

    def phase(self, text: str) -> None:
        """Say what is begun and may take a while; it goes on no record."""
        self._console.phase(text)

    def rewind(self, step: int, *, before_growth: bool = False, learned: int | None = None) -> None:
        """Forget what a resumed run is going to do again; call before the first ``log`` of a resumed run.

        Args:
            step: the step resumed from; records of later steps go, by a new file and a rename.
            before_growth: the resumed checkpoint is a stage's end whose growth is still to come, so a growth at this
                step goes too, and what followed it.
            learned: steps of learning maps at this step that are not done again; all that are recorded if None.
        """
        self._close_file()
        if self.path.exists():
            temporary = self.path.with_suffix(".jsonl.tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in _until(self.path, step, before_growth, learned))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        records = read_metrics(self.path.parent) if self.path.exists() else []
        self._console.rewind(records)
        self._each(lambda tracker: tracker.rewind(records))

    def close(self) -> None:
        """End file, console and trackers."""
        self._close_file()
        self._console.close()
        for tracker in self._trackers:
            tracker.close()

    def _emit(self, record: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self._file = _open_for_append(self.path)
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._file = None  # closing it would write again
            raise GrowthMegatronError(
                f"{self.path} cannot be written ({error.strerror}); make room there and re-run the same command: it "
                "goes on from the last checkpoint"
            ) from error
        self._console.record(record)
        self._each(lambda tracker: tracker.record(record))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # a tracker's service being down is no reason to end a run
                _LOG.warning("%s failed and is left out from now on: %s", type(tracker).__name__, error)
                self._trackers.remove(tracker)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def append_record(run_directory: Path, kind: str, **fields: Any) -> None:
    """Add one record to the metrics of a run that another process may be writing to.

    Raises: GrowthMegatronError if the file cannot be written.
    """
    path = Path(run_directory) / FILE_NAME
    try:
        with _open_for_append(path) as file:
            file.write(json.dumps(_plain(_ordered(kind, fields), []), allow_nan=False) + "\n")
    except OSError as error:
        raise GrowthMegatronError(f"{path} cannot be written ({error.strerror}); make room or permit it") from error


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """All records of a run; a last line cut short by a crash is left out.

    Raises:
        DataError: no metrics there, or a line before the last that is not JSON.
    """
    path = Path(run_directory) / FILE_NAME
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the run.directory of a configuration that was trained")
    return list(_records(path))


class MetricsTail:
    """What another process writes to the metrics of a run, as it comes; whoever only looks passes over damage."""

    def __init__(self, run_directory: Path) -> None:
        self._path = Path(run_directory) / FILE_NAME
        self._file, self._read_bytes = 0, 0

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """New records; True with all of them if the run was taken back, which makes another file."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                anew = status.st_ino != self._file or status.st_size < self._read_bytes
                known, self._file = self._file != 0, status.st_ino
                self._read_bytes = 0 if anew else self._read_bytes
                file.seek(self._read_bytes)
                content = file.read()
        except FileNotFoundError:
            return False, []
        whole = content[: content.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        return anew and known, list(_parsed(whole.split(b"\n"), self._path, []))


def _records(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The records; the numbers of lines that hold none go onto ``damaged``, without it they are an error."""
    return _parsed(path.read_bytes().split(b"\n"), path, damaged)


def _parsed(lines: list[bytes], path: Path, damaged: list[int] | None) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record["kind"], str) or not isinstance(record.get("step"), int | None):
                raise ValueError(record)
            _check_fields(record)
        except (ValueError, TypeError, KeyError, RecursionError):  # also bytes that are not UTF-8
            if number == len(lines):  # no newline behind it: the write was cut short
                return
            if damaged is not None:
                damaged.append(number)
                continue
            raise DataError(
                f"{path}:{number}: not a record of metrics; the file was damaged, remove that line"
            ) from None
        yield record


def _check_fields(record: Mapping[str, Any]) -> None:
    """Raises ValueError if a field of ours has a value that it never has: all but a few are numbers, or null."""
    for name in FIELDS.get(record["kind"], ()):
        value = record.get(name)
        expected = str if name in _TEXTS else Mapping if name in _MAPPINGS else int | float
        if value is not None and not isinstance(value, expected):
            raise ValueError(f"{name} is {value!r}")


def _until(path: Path, step: int, before_growth: bool, learned: int | None) -> Iterator[dict[str, Any]]:
    """Records up to ``step``; one without a step belongs to what precedes it. Damage stops no run that can go on."""
    keep, damaged = True, list[int]()
    for record in _records(path, damaged):
        at = record.get("step")
        if at is not None:
            keep = at <= step and (keep or at < step)
            if before_growth and at == step and "grow" in (record["kind"][:4], record.get("event")):
                keep = False  # from the event that announces a growth, or its record, on
        # A checkpoint written in the background is recorded behind later steps.
        if learned is not None and at == step and record.get("phase_step", 0) > learned:
            continue
        if keep or (record["kind"] == "checkpoint" and at is not None and at <= step):
            yield record
    if damaged:
        _LOG.warning("%s: dropped %d damaged line(s), the first was line %d", path, len(damaged), damaged[0])


def _open_for_append(path: Path) -> IO[str]:
    """Starts a new line where a crash left half a one."""
    file = path.open("a+", encoding="utf-8")
    size = file.seek(0, os.SEEK_END)
    if size:
        with path.open("rb") as tail:
            tail.seek(-1, os.SEEK_END)
            if tail.read(1) != b"\n":
                complete = path.read_bytes().rfind(b"\n") + 1
                file.truncate(complete)
                file.seek(0, os.SEEK_END)
    return file


def _ordered(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: fields[name] for name in FIELDS[kind] if name in fields}
    if kind == "train":
        known = {name: fields.get(name) for name in FIELDS[kind]}
    others = {name: value for name, value in fields.items() if name not in known and name != "time"}
    return {"kind": kind, **known, **others, "time": fields.get("time", time.time())}


def _plain(value: Any, lost: list[tuple[str, float]], name: str = "") -> Any:
    """JSON's own types; numbers that JSON lacks are put on the list ``lost``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, lost, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, lost, name) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a tensor or NumPy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        lost.append((name, value))
        return None
    if isinstance(value, Path):
        return str(value)
    return value
