"""TensorBoard and wandb, both optional: the same records as metrics.jsonl, under one tag a field.

Owns: availability, the tags, that an output shows every record once however often a run is killed, resumed or rolled
back. Does not own: what is recorded (``train.metrics``).

metrics.jsonl is the truth, and an output is made to say the same: it is written again from the records that a resumed
run has (TensorBoard, wandb offline), or takes of them what it lacks (wandb online, where what was sent stays).
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from growth_megatron.config.run_schema import LoggingConfig, WandbConfig
from growth_megatron.errors import ConfigError
from growth_megatron.train.record_text import event_line

Record = Mapping[str, Any]

# Where a record stands and what model it is of, which are axes or configuration and no curves.
_NOT_PLOTTED = (
    "kind", "step", "stage", "time", "stage_step", "phase_step", "phase_steps", "consumed_tokens", "consumed_samples",
    "flops", "flops_6nd", "source_geometry", "target_geometry",
)  # fmt: skip
_TEXTS = ("event", "growth", "checkpoint")
_OURS = ".growth_megatron"
_ROWS_OF_A_STEP = 1000
# wandb's groups of figures and what they are drawn over.
_AXES = {
    "train": "step", "validation": "step", "growth": "step", "evaluation": "step", "learn": "learn_step",
    "by_tokens": "tokens", "by_flops": "flops",
}  # fmt: skip


class Tracker(Protocol):
    """An output beside metrics.jsonl."""

    def record(self, record: Record) -> None:
        """Take a record of metrics.jsonl."""
        ...

    def rewind(self, records: Sequence[Record]) -> None:
        """The run goes on from these ``records``, which are all that it has; nothing of others is to be seen."""
        ...

    def show(self) -> None:
        """Show what is there without waiting for the next record."""
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
        require("tensorboard", "logging.tensorboard: true", "set it to false")
        trackers.append(TensorBoardTracker(run_directory / "tensorboard"))
    if logging.wandb is not None:
        require("wandb", "logging.wandb", "remove that section")
        trackers.append(training_tracker(run_directory, logging.wandb, config))
    return trackers


def require(package: str, option: str, otherwise: str) -> None:
    """Raises ConfigError with what to do if ``package``, which ``option`` needs, is not there."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{option} needs the package {package}, which is not installed; pip install {package}, or {otherwise}"
        )


def _scalars(record: Record) -> dict[str, float]:
    """Numbers of a record as kind/field; nested mappings as kind/field/key; of learned maps as learn/stage/field."""
    found: dict[str, float] = {}

    def collect(prefix: str, fields: Record) -> None:
        for name, value in fields.items():
            if isinstance(value, Mapping):
                collect(f"{prefix}/{name}", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{prefix}/{name}"] = value

    prefix = f"learn/{record['stage']}" if "phase_step" in record else record["kind"]
    collect(prefix, {name: value for name, value in record.items() if name not in _NOT_PLOTTED})
    return found


class TensorBoardTracker(Tracker):
    """Event files in a folder; after a rewind there is one, written anew.

    It says first that what a TensorBoard which is open has read of earlier ones is void.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kept: Sequence[Record] = ()
        self._writer: Any = None

    @override
    def record(self, record: Record) -> None:
        if record.get("step") is None:
            return
        self.show()
        self._add(record)
        self._writer.flush()

    @override
    def rewind(self, records: Sequence[Record]) -> None:
        self.close()
        self._kept = records

    @override
    def show(self) -> None:
        if self._writer is None:
            self._start()

    @override
    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @staticmethod
    def wrote(path: Path) -> bool:
        """Whether an event file is one of ours."""
        return path.name.endswith(_OURS)

    def _start(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

        earlier = [path for path in self._directory.glob("events.out.tfevents.*") if self.wrote(path)]
        self._writer = SummaryWriter(str(self._directory), purge_step=0, filename_suffix=_OURS)
        for record in self._kept:
            if record.get("step") is not None:
                self._add(record)
        self._kept = ()
        for path in earlier:
            path.unlink()

    def _add(self, record: Record) -> None:
        step, time = record.get("phase_step", record["step"]), record.get("time")
        for tag, value in _scalars(record).items():
            self._writer.add_scalar(tag, value, step, walltime=time)
        if record["kind"] in _TEXTS:
            self._writer.add_text(record["kind"], event_line(record), record["step"], walltime=time)


class WandbTracker(Tracker):
    """One wandb run, offline without an API key; it goes on as long as its id does.

    wandb keeps the steps of a run in order by a counter of its own. It is made of a record's step and place within it,
    so a record has the same one whenever it is sent, and what an online run has already is not sent again. Offline,
    wandb begins a folder with a counter at 0 each time it starts, and a killed process loses the last lines of its own:
    the new folder takes all records, and earlier ones of this id are removed.

    Args:
        directory: takes wandb's folder.
        run_id: the same for the same run.
        name: of the run, unless the options have one.
        config: effective configuration of the run.
        resume: as in ``wandb.init``.
    """

    def __init__(
        self, directory: Path, run_id: str, options: WandbConfig, name: str, config: Record, resume: str | None
    ) -> None:
        self._directory, self._id, self._options, self._name = directory, run_id, options, name
        self._config, self._resume = config, resume
        self._kept: Sequence[Record] = ()
        self._run: Any = None
        self.where = ""
        """The run's address, or the command that sends what is offline, once there is a run."""
        self._next = 0
        self._place = (-1, 0)

    @override
    def record(self, record: Record) -> None:
        if record.get("step") is None:
            return
        self.show()
        self._send(record)

    @override
    def rewind(self, records: Sequence[Record]) -> None:
        self._kept, self._place = records, (-1, 0)
        if self._run is not None and self._run.offline:
            self.close()
        elif self._run is not None:
            self._send_kept(texts=False)

    @override
    def show(self) -> None:
        if self._run is None:
            self._start()

    @override
    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _start(self) -> None:
        import wandb  # optional

        earlier = list((self._directory / "wandb").glob(f"offline-run-*-{self._id}"))
        self._run = run = wandb.init(
            project=self._options.project,
            entity=self._options.entity,
            group=self._options.group,
            tags=list(self._options.tags),
            name=self._options.name or self._name,
            id=self._id,
            resume=self._resume,  # type: ignore[arg-type]  # a Literal of theirs
            dir=str(self._directory),
            config=wandb_config(self._config),
            mode=_wandb_mode(),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.where = f"wandb sync {Path(run.dir).parent}" if run.offline else str(run.url)
        for axis in dict.fromkeys(_AXES.values()):
            run.define_metric(axis, hidden=True)
        for group, axis in _AXES.items():
            run.define_metric(f"{group}/*", step_metric=axis)
        self._next, self._place = run.starting_step, (-1, 0)
        self._send_kept(texts=not run.resumed)
        if run.offline:
            for folder in earlier:
                shutil.rmtree(folder, ignore_errors=True)

    def _send_kept(self, texts: bool) -> None:
        # A record may stand behind later ones: a checkpoint written in the background, an evaluation added by hand.
        for record in sorted((r for r in self._kept if r.get("step") is not None), key=lambda r: int(r["step"])):
            if texts or record["kind"] not in _TEXTS:
                self._send(record)
        self._kept = ()

    def _send(self, record: Record) -> None:
        if record["kind"] in _TEXTS:
            self._run.write_logs(event_line(record))
        values = _scalars(record)
        if not values or record["kind"] in ("event", "checkpoint"):
            return
        step, place = record["step"], self._place
        self._place = step, place[1] + 1 if step == place[0] else 0
        index = step * _ROWS_OF_A_STEP + min(self._place[1], _ROWS_OF_A_STEP - 1)
        if index >= self._next:
            self._run.log(_axes(record) | values, step=index)
            self._next = index + 1


def training_tracker(run_directory: Path, options: WandbConfig, config: Record) -> WandbTracker:
    """The wandb run of a run directory, which keeps its id."""
    path = run_directory / "wandb_run_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return WandbTracker(run_directory, path.read_text().strip(), options, run_directory.name, config, "allow")


def wandb_config(config: Record) -> dict[str, Any]:
    """A run's configuration such that wandb can filter by it: stages by name, operators under ``growth/operator``."""
    stages = config.get("stages") or ()
    operators = [stage["growth"]["operator"] for stage in stages if stage.get("growth")]
    named = {stage["name"]: {key: value for key, value in stage.items() if key != "name"} for stage in stages}
    return {**config, "stages": named, "growth/operator": ", ".join(operators) or "none"}


def _axes(record: Record) -> dict[str, float]:
    """What a row of wandb can be drawn over, and its loss once over tokens and once over FLOPs."""
    row = {"step": record["step"], "_timestamp": record.get("time")}
    found = {
        "tokens": record.get("consumed_tokens"),
        "flops": record.get("flops"),
        "learn_step": record.get("phase_step"),
    }
    row |= {name: value for name, value in found.items() if value is not None}
    for loss in ("loss", "validation_loss") if record["kind"] in ("train", "validation") else ():
        if record.get(loss) is not None:
            row |= {f"by_{axis}/{loss}": record[loss] for axis in ("tokens", "flops") if axis in row}
    return row


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
