"""TensorBoard and wandb, both optional: the same records as metrics.jsonl, under one tag a field.

Owns: availability, the tags, going on with the same run after a resume.
Does not own: what is recorded (``train.metrics``).
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from growth_megatron.config.run_schema import LoggingConfig, WandbConfig
from growth_megatron.errors import ConfigError

_NOT_PLOTTED = ("kind", "step", "stage", "time")


class Tracker(Protocol):
    """An output beside metrics.jsonl."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics.jsonl."""
        ...

    def rewind(self, step: int) -> None:
        """Steps after ``step`` are done again."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


def open_trackers(run_directory: Path, logging: LoggingConfig, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that the configuration asks for.

    Raises:
        ConfigError: one whose package is not installed.
    """
    trackers: list[Tracker] = []
    if logging.tensorboard:
        _require("tensorboard", "logging.tensorboard: true", "set it to false")
        trackers.append(TensorBoardTracker(run_directory))
    if logging.wandb is not None:
        _require("wandb", "logging.wandb", "remove that section")
        trackers.append(WandbTracker(run_directory, logging.wandb, config))
    return trackers


def _require(package: str, option: str, otherwise: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{option} needs the package {package}, which is not installed; pip install {package}, or {otherwise}"
        )


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a record as kind/field; nested mappings as kind/field/key."""
    found: dict[str, float] = {}

    def collect(prefix: str, fields: Mapping[str, Any]) -> None:
        for name, value in fields.items():
            if isinstance(value, Mapping):
                collect(f"{prefix}/{name}", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{prefix}/{name}"] = value

    collect(record["kind"], {name: value for name, value in record.items() if name not in _NOT_PLOTTED})
    return found


class TensorBoardTracker(Tracker):
    """Event files in RUN/tensorboard; on resume the steps that are done again are purged."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory / "tensorboard"
        self._purge_step: int | None = None
        self._writer: Any = None

    @override
    def record(self, record: Mapping[str, Any]) -> None:
        step = record.get("step")
        if step is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self._writer = SummaryWriter(str(self._directory), purge_step=self._purge_step)
        for tag, value in _scalars(record).items():
            self._writer.add_scalar(tag, value, step, walltime=record.get("time"))
        if record["kind"] in ("growth", "event"):
            self._writer.add_text(record["kind"], str(record.get("message") or record.get("operator")), step)
        self._writer.flush()

    @override
    def rewind(self, step: int) -> None:
        self._purge_step = step + 1

    @override
    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbTracker(Tracker):
    """One wandb run, offline without an API key; its id in RUN/wandb_run_id makes a resumed run go on with it."""

    def __init__(self, run_directory: Path, options: WandbConfig, config: Mapping[str, Any]) -> None:
        self._directory = run_directory
        self._options = options
        self._config = config
        self._run: Any = None

    @override
    def record(self, record: Mapping[str, Any]) -> None:
        step = record.get("step")
        values = _scalars(record)
        if step is None or not values:
            return
        if self._run is None:
            self._run = self._start()
        # As a value and not as wandb's own step, which never goes back: a resumed run repeats some steps.
        self._run.log({"step": step, **values})

    @override
    def rewind(self, step: int) -> None:
        pass

    @override
    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _start(self) -> Any:
        import wandb  # optional

        run = wandb.init(
            project=self._options.project,
            name=self._options.name or self._directory.name,
            id=self._run_id(),
            resume="allow",
            dir=str(self._directory),
            config=dict(self._config),
            mode=_wandb_mode(),
            settings=wandb.Settings(console="off", silent=True),
        )
        run.define_metric("*", step_metric="step")
        return run

    def _run_id(self) -> str:
        path = self._directory / "wandb_run_id"
        if path.exists():
            return path.read_text().strip()
        run_id = uuid.uuid4().hex[:12]
        path.write_text(run_id + "\n")
        return run_id


def _wandb_mode() -> Any:
    """WANDB_MODE if set, else online where a key is known (WANDB_API_KEY or `wandb login`) and offline where not."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        known = netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known or os.environ.get("WANDB_API_KEY") else "offline"
