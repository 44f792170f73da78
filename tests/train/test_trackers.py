"""TensorBoard and wandb say what metrics.jsonl says, through kills and resumes, each record once; so does ``publish``.

wandb is the real package, offline; what it wrote is read back from its files.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.config.run_schema import LoggingConfig, WandbConfig
from growth_megatron.errors import EXIT_OK, EXIT_USAGE, ConfigError
from growth_megatron.train import trackers
from growth_megatron.train.metrics import MetricsLogger
from growth_megatron.train.position import Position
from tests.command_line import run_command
from tests.pool import TIMEOUT_S

STAGES = {"base": 20, "grown": 40}
GEOMETRY = {"num_layers": 2, "hidden_size": 64}


def log_train(logger: MetricsLogger, step: int, loss: float, stage: str = "base") -> None:
    logger.log("train", step=step, stage=stage, consumed_tokens=step * 100, flops=step * 1e9, loss=loss)


def log_growth(logger: MetricsLogger, step: int) -> None:
    logger.log("validation", step=step, stage="base", consumed_tokens=step * 100, flops=step * 1e9, validation_loss=4.0)
    logger.log("event", step=step, event="grow", message="grew by stack")
    logger.log(
        "validation", step=step, stage="grown", consumed_tokens=step * 100, flops=step * 1e9, validation_loss=5.0
    )
    geometries = {"source_geometry": GEOMETRY, "target_geometry": GEOMETRY | {"num_layers": 8}}
    logger.log(
        "growth", step=step, operator="stack", validation_loss_before=4.0, validation_loss_after=5.0, **geometries
    )


def scalars(folder: Path) -> Any:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return reader.EventAccumulator(str(folder)).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in scalars(folder).Scalars(tag)]


def chunks(path: Path) -> Iterator[bytes]:
    """Entries of a .wandb file, which has the form of LevelDB's log: blocks of 32 KiB, whole entries or parts."""
    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def wandb_records(directory: Path) -> dict[str, list[Any]]:
    """What is in the only offline run of a directory, by kind of record."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (folder,) = (directory / "wandb").glob("offline-run-*")
    found: dict[str, list[Any]] = {}
    for chunk in chunks(next(folder.glob("*.wandb"))):
        record = protocol.Record()
        record.ParseFromString(chunk)
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def rows(records: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row.item}
        for row in records["history"]
    ]


def curve(found: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in found if name in row]


def config_of(records: dict[str, list[Any]]) -> dict[str, Any]:
    return {update.key: json.loads(update.value_json) for update in records["run"][0].config.update}


def test_figures_of_tasks_are_a_tag_each() -> None:
    figures = {"arc_easy": {"acc": 0.25, "acc_norm": 0.5}, "pages": {"word_perplexity": 31.5}}
    tags = trackers._scalars({"kind": "evaluation", "step": 200, "results": figures, "seconds": 12.0})
    assert tags["evaluation/results/arc_easy/acc_norm"] == 0.5
    assert tags["evaluation/results/pages/word_perplexity"] == 31.5


@pytest.mark.parametrize(
    ("logging", "package"),
    [(LoggingConfig(tensorboard=True), "tensorboard"), (LoggingConfig(wandb=WandbConfig()), "wandb")],
)
def test_an_output_whose_package_is_missing_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging: LoggingConfig, package: str
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}.*pip install {package}"):
        MetricsLogger(tmp_path, logging, Position(STAGES))


def test_tensorboard_shows_each_step_once_after_resumes_and_rollbacks(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for loss in (1.0, 2.0):
        with MetricsLogger(tmp_path, LoggingConfig(tensorboard=True), Position(STAGES)) as logger:
            logger.rewind(3)
            for step in range(4 if loss == 2.0 else 1, 6):
                log_train(logger, step, loss)
    with MetricsLogger(tmp_path, LoggingConfig(tensorboard=True), Position(STAGES)) as logger:
        logger.rewind(5)
        log_growth(logger, 5)
        logger.rewind(5, before_growth=True)
        log_growth(logger, 5)
        log_train(logger, 6, 3.0)
        logger.rewind(5)
        log_train(logger, 6, 4.0)
    folder = tmp_path / "tensorboard"
    assert points(folder, "train/loss") == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 4)]
    assert points(folder, "growth/validation_loss_after") == [(5, 5)]
    assert not [tag for tag in scalars(folder).Tags()["scalars"] if "geometry" in tag]
    assert len(list(folder.iterdir())) == 1


WANDB_RUN = """
import json, os, signal, sys
from pathlib import Path
from growth_megatron.config.run_schema import LoggingConfig, WandbConfig
from growth_megatron.train.metrics import MetricsLogger
from growth_megatron.train.position import Position
from tests.train.test_trackers import log_growth, log_train
at, steps, growth, loss, end = json.loads(sys.argv[2])
logging = LoggingConfig(wandb=WandbConfig(group="g", tags=("small",)))
stages = [{"name": "base", "growth": None}, {"name": "grown", "growth": {"operator": "stack"}}]
logger = MetricsLogger(Path(sys.argv[1]), logging, Position({"base": 5, "grown": 5}), config={"stages": stages})
logger.rewind(at, before_growth=growth == at)
for step in steps:
    log_train(logger, step, loss)
    if step == growth:
        log_growth(logger, step)
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
logger.close()
"""


def test_wandb_has_each_record_once_after_kills_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for session in (
        [-1, [1, 2, 3, 4, 5, 6], 0, 1.0, "killed"],
        [3, [4, 5, 6, 7, 8], 8, 2.0, "killed"],
        [8, [9], 0, 3.0, "closed"],
        [8, [9, 10], 0, 4.0, "closed"],
    ):
        subprocess.run(
            [sys.executable, "-c", WANDB_RUN, str(tmp_path), json.dumps(session)],
            env=variables | {"HOME": str(tmp_path)},  # no netrc
            check=session[-1] == "closed",
            timeout=TIMEOUT_S,
        )
    records = wandb_records(tmp_path)
    found = rows(records)
    losses = [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2), (7, 2), (8, 2), (9, 4), (10, 4)]
    assert curve(found, "train/loss") == losses
    assert curve(found, "validation/validation_loss") == [(8, 4.0), (8, 5.0)]
    assert [(row["flops"], row["by_flops/loss"]) for row in found if "by_flops/loss" in row] == [
        (step * 1e9, loss) for step, loss in losses
    ]
    counter = [row["_step"] for row in found]
    assert counter == sorted(set(counter))
    assert not [name for row in found for name in row if "geometry" in name]
    config, run = config_of(records), records["run"][0]
    assert config["growth/operator"] == "stack"
    assert list(config["stages"]) == ["base", "grown"]
    assert run.run_id == (tmp_path / "wandb_run_id").read_text().strip()
    assert (run.run_group, list(run.tags)) == ("g", ["small"])
    assert "grew by stack" in str(records["output_logger"])
    axes = {metric.glob_name: metric.step_metric for metric in records["metric"]}
    assert (axes["train/*"], axes["by_flops/*"], axes["by_tokens/*"]) == ("step", "flops", "tokens")


def test_publish_shows_a_run_that_had_no_tracker_and_replaces_what_it_has_shown(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    run, board = tmp_path / "run", tmp_path / "board"
    run.mkdir()
    with MetricsLogger(run, LoggingConfig(), Position(STAGES)) as logger:
        for step in (1, 2):
            log_train(logger, step, 3.0)
        log_growth(logger, 2)
        logger.log("checkpoint", step=1, path="late")
        logger.log("evaluation", step=1, consumed_tokens=100, results={"arc": {"acc": 0.5}})
    for _ in range(2):
        outcome = run_command(
            "publish", str(run), "--wandb", "p", "--tags", "a,b", "--tensorboard", str(board),
            HOME=str(tmp_path), WANDB_MODE="offline",
        )  # fmt: skip
        assert outcome.code == EXIT_OK, outcome.printed
        assert "no configuration is published" in outcome.out
    found = rows(wandb_records(run))
    assert curve(found, "train/loss") == [(1, 3.0), (2, 3.0)]
    assert curve(found, "evaluation/results/arc/acc") == [(1, 0.5)]
    assert points(board / "run", "train/loss") == [(1, 3.0), (2, 3.0)]
    assert len(list((board / "run").iterdir())) == 1
    (board / "run" / "events.out.tfevents.1.other").touch()
    refused = run_command("publish", str(run), "--tensorboard", str(board))
    assert refused.code == EXIT_USAGE
    assert "is of another program; give another --name" in refused.err
    assert run_command("publish", str(run), "--tensorboard", str(board), "--name", "b").code == EXIT_OK


@pytest.mark.parametrize(
    ("variables", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": "k"}, "", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "", "disabled"),
        ({}, "machine api.wandb.ai login user password k\n", "online"),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password k\n", "offline"),
    ],
)
def test_wandb_is_online_where_a_key_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], netrc: str, mode: str
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text(netrc)
    (tmp_path / ".netrc").chmod(0o600)
    assert trackers._wandb_mode() == mode
