"""Steps that are profiled have a trace of each rank, and are the steps of a run that is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.config.run_schema import LoggingConfig
from growth_megatron.train.metrics import read_metrics
from growth_megatron.train.profiling import StepProfiler
from tests.ranks import run_ranks


def _figures(run: Path) -> list[Any]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(run) if r["kind"] == "train"]


def test_two_ranks_trace_the_steps_asked_for_of_both_stages_and_train_bitwise_as_without(
    growing_config: Path, tmp_path: Path
) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    runs = [
        {"overrides": [f"run.directory={plain}"]},
        {"overrides": [f"run.directory={profiled}", "logging.profile_steps=[5, 7]"]},
    ]
    for result in run_ranks(
        "tests.train.health_workers:train_with_faults", 2, {"config": str(growing_config), "runs": runs}
    ):
        assert [run["code"] for run in result] == [0, 0], result
    assert len(_figures(plain)) == 10
    assert _figures(profiled) == _figures(plain)
    assert not (plain / "profiles").exists()
    names = {path.name for path in (profiled / "profiles").iterdir()}
    ranges = ("steps_00000005_to_00000006", "steps_00000007_to_00000007")  # the first stage ends at 6
    assert names == {f"{steps}_rank_{rank}.trace.json" for steps in ranges for rank in (0, 1)}
    for rank in (0, 1):
        trace = json.loads((profiled / "profiles" / f"{ranges[0]}_rank_{rank}.trace.json").read_text())
        found = {event.get("name") for event in trace["traceEvents"]}
        assert {name for name in found if re.fullmatch(r"step \d+", str(name))} == {"step 5", "step 6"}
        assert "aten::mm" in found
        assert any("all_reduce" in str(name) for name in found)
    told = [record["message"] for record in read_metrics(profiled) if record.get("event") == "profile"]
    assert [message.split(",")[0] for message in told] == ["steps 5 to 6 profiled", "steps 7 to 7 profiled"]
    assert str(profiled / "profiles") in told[0]


def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profiles").touch()
    profiler = StepProfiler(tmp_path / "profiles", 2, 2, 0, print)
    for step in (1, 2, 3):
        profiler.begin_step(step)
        assert profiler.end_step(step) is None
    assert "was not written" in caplog.text


def test_a_range_that_falls_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[7, 5\] must rise; write the first step, then the last"):
        LoggingConfig(profile_steps=(7, 5))
