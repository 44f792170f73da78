"""metrics.jsonl through crashes and resumes."""

import json
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.config.run_schema import LoggingConfig
from growth_megatron.errors import DataError, GrowthMegatronError
from growth_megatron.train.metrics import FIELDS, MetricsLogger, NullMetrics, read_metrics
from growth_megatron.train.position import Position

STAGES = {"base": 20, "grown": 40}


def train_fields(step: int, stage: str = "base", **changes: Any) -> dict[str, Any]:
    values = {
        "step": step, "stage": stage, "stage_step": step, "consumed_tokens": step * 1000, "consumed_samples": step * 8,
        "flops": step * 1e9, "loss": 5.0 - step / 100, "grad_norm": 1.25, "learning_rate": 3e-4,
        "tokens_per_s": 12345.6, "tflops_per_s": 0.0213, "mfu": None, "step_time_s": 0.5, "data_time_s": 0.01,
        "memory_bytes": 3 << 29,
    }  # fmt: skip
    return values | changes


@pytest.fixture
def logger(tmp_path: Path):
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as opened:
        yield opened


def steps(path: Path) -> list[tuple[str, Any]]:
    return [(record["kind"], record.get("step")) for record in read_metrics(path)]


def test_a_training_record_has_all_fields_in_the_documented_order(logger: MetricsLogger, tmp_path: Path) -> None:
    shuffled = dict(reversed(train_fields(1).items()))
    del shuffled["memory_bytes"]
    logger.log("train", **shuffled, time=17.0)
    line = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(line)
    assert list(record) == ["kind", *FIELDS["train"], "time"]
    assert (record["kind"], record["memory_bytes"], record["time"]) == ("train", None, 17.0)


def test_a_record_is_on_disk_before_log_returns(logger: MetricsLogger, tmp_path: Path) -> None:
    logger.log("event", message="one")
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_becomes_null_and_an_event(
    logger: MetricsLogger, tmp_path: Path, value: float
) -> None:
    logger.log("train", **train_fields(3, loss=value))
    loss, event = read_metrics(tmp_path)
    assert loss["loss"] is None
    assert (event["kind"], event["event"], event["step"]) == ("event", "non_finite", 3)
    assert event["message"] == f"loss of the train record is {value}"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_tensors_and_numpy_scalars_become_numbers(logger: MetricsLogger, tmp_path: Path) -> None:
    torch, numpy = pytest.importorskip("torch"), pytest.importorskip("numpy")
    logger.log("train", **train_fields(1, loss=torch.tensor(2.5), grad_norm=numpy.float32(0.5)))
    record = read_metrics(tmp_path)[0]
    assert (record["loss"], record["grad_norm"]) == (2.5, 0.5)


def test_an_unknown_kind_is_refused(logger: MetricsLogger) -> None:
    with pytest.raises(ValueError, match="unknown kind of metrics 'trian'; allowed: train"):
        logger.log("trian", step=1)


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as first:
        first.log("event", message="started")
        for step in range(1, 8):
            first.log("train", **train_fields(step))
            if step == 5:
                first.log("checkpoint", step=5, path="checkpoints/step_00000005", seconds=1.0, bytes=10)
        first.log("event", message="about to die")
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as second:
        second.rewind(5)
        for step in range(6, 9):
            second.log("train", **train_fields(step))
    assert steps(tmp_path) == [
        ("event", None), *(("train", step) for step in range(1, 6)), ("checkpoint", 5),
        ("train", 6), ("train", 7), ("train", 8),
    ]  # fmt: skip


def test_rewind_to_a_stages_end_forgets_the_growth_only_if_it_is_to_come(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger:
        logger.log("train", **train_fields(20))
        logger.log("validation", step=20, validation_loss=4.0)
        logger.log("event", step=20, event="grow", message="grew")
        logger.log("validation", step=20, validation_loss=4.1)
        logger.log("growth", step=20, operator="stack")
        logger.log("train", **train_fields(21, "grown"))
        logger.rewind(20)
        assert [kind for kind, _ in steps(tmp_path)] == ["train", "validation", "event", "validation", "growth"]
        logger.rewind(20, before_growth=True)
        assert steps(tmp_path) == [("train", 20), ("validation", 20)]


def test_rewind_of_a_new_run_does_nothing(logger: MetricsLogger, tmp_path: Path) -> None:
    logger.rewind(0)
    assert list(tmp_path.iterdir()) == []


def test_a_line_cut_short_by_a_crash_is_dropped_and_later_lines_are_whole(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger:
        logger.log("train", **train_fields(1))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "st')
    assert steps(tmp_path) == [("train", 1)]
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger:
        logger.log("train", **train_fields(2))
    assert steps(tmp_path) == [("train", 1), ("train", 2)]


@pytest.mark.parametrize(
    "line", [b"rubbish", b'{"kind": "\xff"}', b"3", b"{}", b'{"kind": "train", "step": "x"}', b"[" * 100_000]
)
def test_a_damaged_line_is_named_and_a_resumed_run_goes_on_without_it(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger:
        logger.log("train", **train_fields(1))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger:
        logger.log("train", **train_fields(2))
        with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record of metrics"):
            read_metrics(tmp_path)
        logger.rewind(1)
        logger.log("train", **train_fields(2))
    assert steps(tmp_path) == [("train", 1), ("train", 2)]
    assert "dropped 1 damaged line(s), the first was line 2" in caplog.text


def test_a_directory_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give the run.directory"):
        read_metrics(tmp_path)


def test_null_metrics_takes_the_same_calls() -> None:
    null = NullMetrics()
    null.log("train", **train_fields(1))
    null.progress(1, "base")
    null.rewind(1)
    null.close()


def test_metrics_without_room_end_the_run_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger,
        pytest.raises(
            GrowthMegatronError, match=r"metrics\.jsonl cannot be written \(No space left on device\); make room"
        ),
    ):
        logger.log("train", **train_fields(1))
