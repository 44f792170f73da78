"""A step that is not finite, or a spike, is never taken nor saved; what follows is the same on all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.config.schema import TrainingConfig
from growth_megatron.train.counters import Counters
from growth_megatron.train.health import highest_loss
from tests.ranks import run_ranks

BAD_STEP_4 = [25]  # of the samples 24 to 31
TP2 = "parallel.tensor_parallel_size=2"
PP2 = "parallel.pipeline_parallel_size=2"
OVERLAP = "parallel.overlap_param_gather=true"


def _train(ranks: int, config: Path, *runs: dict[str, Any]) -> list[dict[str, Any]]:
    """What became of each run, the same on all ranks."""
    results = run_ranks("tests.train.health_workers:train_with_faults", ranks, {"config": str(config), "runs": runs})
    assert all(result == results[0] for result in results)
    return results[0]


def _records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def _losses(run: Path) -> dict[int, float | None]:
    return {record["step"]: record["loss"] for record in _records(run)}


def _events(run: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in _records(run, "event") if record["event"] == event]


def _copy_until(run: Path, target: Path, step: int) -> None:
    shutil.copytree(run, target, symlinks=True)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.split("_")[1]) > step:
            shutil.rmtree(checkpoint)


def test_a_step_that_is_not_finite_ends_the_run_unsaved_and_what_the_message_advises_works(
    growing_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    (ended,) = _train(1, growing_config, {"overrides": [f"run.directory={run}"], "nan": BAD_STEP_4})
    assert ended["code"] == 1
    assert "the loss is nan at step 4" in ended["error"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    again = []
    for advice in ("", "training.on_non_finite=skip", "training.on_non_finite=rollback"):
        assert advice in ended["error"] or advice.split(".")[1].split("e=")[1] in ended["error"]
        copy = tmp_path / f"again{advice[-4:]}"
        shutil.copytree(run, copy, symlinks=True)
        again.append({"overrides": [f"run.directory={copy}", *([advice] if advice else [])], "nan": BAD_STEP_4})
    assert [result["code"] for result in _train(1, growing_config, *again)] == [1, 0, 0]


def test_a_skipped_step_changes_nothing_at_any_layout_and_counts(growing_config: Path, tmp_path: Path) -> None:
    def skipping(name: str, *layout: str) -> dict[str, Any]:
        overrides = [f"run.directory={tmp_path / name}", "training.on_non_finite=skip", *layout]
        return {"overrides": overrides, "nan": BAD_STEP_4}

    assert _train(1, growing_config, skipping("one"))[0]["code"] == 0
    several = [skipping("tp2", TP2), skipping("pp2", PP2), skipping("dp2"), skipping("overlap", OVERLAP)]
    assert [result["code"] for result in _train(2, growing_config, *several)] == [0] * 4
    expected = _losses(tmp_path / "one")
    for name in ("one", "tp2", "pp2", "dp2", "overlap"):
        losses = _losses(tmp_path / name)
        assert [step for step, loss in losses.items() if loss is None] == [4]
        assert all(loss == pytest.approx(expected[step], abs=1e-5) for step, loss in losses.items())
        (event,) = _events(tmp_path / name, "skip")
        assert (event["step"], event["message"]) == (4, "the loss is nan: the update was left out (1 so far)")
        assert read_manifest(tmp_path / name / "latest").skipped_steps == 1


@pytest.mark.parametrize(
    ("sample", "step", "checkpoint", "first", "background"),
    [(25, 4, 2, 16, "false"), (58, 8, 6, 48, "true")],
    ids=["in the first stage", "after a growth, with background saves"],
)
def test_a_rolled_back_run_passes_over_the_samples_and_resumes_bitwise(
    growing_config: Path, tmp_path: Path, sample: int, step: int, checkpoint: int, first: int, background: str
) -> None:
    """Killed between the rollback and the next save it goes on past them, though they do no harm any more."""

    def run(name: str, **faults: Any) -> dict[str, Any]:
        policy = ["training.on_non_finite=rollback", f"checkpoint.async_save={background}"]
        return {"overrides": [f"run.directory={tmp_path / name}", *policy], **faults}

    assert _train(1, growing_config, run("back", nan=[sample]))[0]["code"] == 0
    _copy_until(tmp_path / "back", tmp_path / "killed", checkpoint)
    runs = [run("killed"), run("without", passed_over=[first, 16])]
    assert [result["code"] for result in _train(1, growing_config, *runs)] == [0, 0]
    losses = [_losses(tmp_path / name) for name in ("back", "killed", "without")]
    assert losses[0] == losses[1] == losses[2]
    assert list(losses[0]) == list(range(1, 11))
    for name in ("back", "killed"):
        (event,) = _events(tmp_path / name, "rollback")
        assert (event["step"], event["skipped_samples"]) == (checkpoint, 16)
        assert f"the loss is nan at step {step}: back to" in event["message"]
        assert len(_records(tmp_path / name, "growth")) == 1
        checkpoints = tmp_path / name / "checkpoints"
        saved = {n: read_manifest(checkpoints / f"step_{n:08d}").skipped_samples for n in (checkpoint, checkpoint + 2)}
        assert list(saved.values()) == [0, 16]
        assert read_manifest(tmp_path / name / "latest").consumed_samples == 80


def test_rollbacks_and_skips_are_bounded_and_the_message_says_what_to_do(growing_config: Path, tmp_path: Path) -> None:
    for policy, wanted in (
        ("rollback", "the loss is nan at step 3, after 2 rollbacks to step 2"),
        ("skip", "3 steps in a row could not be taken: the loss is nan at step 5"),
    ):
        run = tmp_path / policy
        overrides = [f"run.directory={run}", f"training.on_non_finite={policy}", "training.non_finite_limit=2"]
        (ended,) = _train(1, growing_config, {"overrides": overrides, "nan": list(range(16, 400))})
        assert ended["code"] == 1
        assert wanted in ended["error"]
        assert "schedule.learning_rate" in ended["error"]


@pytest.mark.parametrize("layout", [[], [TP2], [PP2]], ids=["DP2", "TP2", "PP2"])
def test_a_checkpoint_with_a_moment_that_is_not_finite_is_never_written(
    growing_config: Path, tmp_path: Path, layout: list[str]
) -> None:
    stopped, back = tmp_path / "stopped", tmp_path / "back"
    runs: list[dict[str, Any]] = [
        {"overrides": [f"run.directory={stopped}", *layout], "bad_state_at": 4},
        {"overrides": [f"run.directory={back}", *layout, "training.on_non_finite=rollback"], "bad_state_at": 4},
        {"overrides": [f"run.directory={stopped}", *layout, "schedule.learning_rate=1e-3"]},  # as the message advises
    ]
    results = _train(2, growing_config, *runs)
    assert [result["code"] for result in results] == [1, 0, 0]
    assert "Adam's moments are not finite after step 4: they were not saved" in results[0]["error"]
    assert "lower schedule.learning_rate" in results[0]["error"]
    (event,) = _events(back, "rollback")
    assert (event["step"], event["skipped_samples"]) == (2, 16)


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any() -> None:
    expected = run_ranks("tests.train.health_workers:steps_without_it", 1, {"steps": [1, 2]})[0]
    layouts = [{}, {"overlap_param_gather": True}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}]
    for results in run_ranks("tests.train.health_workers:steps_around_a_bad_gradient", 2, {"layouts": layouts}):
        for layout, result in zip(layouts, results, strict=True):
            assert (result["taken"], result["finite"]) == (False, True), layout
            assert result["losses"] == pytest.approx(expected, abs=1e-5), layout


@pytest.mark.parametrize(("policy", "at"), [("skip", 136), ("rollback", 120)])
def test_a_spike_is_left_out_or_gone_around_and_a_resumed_run_sees_the_same(
    growing_config: Path, tmp_path: Path, policy: str, at: int
) -> None:
    def run(name: str) -> dict[str, Any]:
        length = ["stages.base.training.steps=140", "checkpoint.interval_steps=40", "training.global_batch_size=2"]
        wanted = [f"training.on_non_finite={policy}", "training.spike_deviations=8"]
        return {"overrides": [f"run.directory={tmp_path / name}", *length, *wanted], "random": [270, 271]}

    assert _train(1, growing_config, run("whole"))[0]["code"] == 0
    (event,) = _events(tmp_path / "whole", policy)
    assert event["step"] == at
    assert "is a spike (training.spike_deviations allows" in event["message"]
    _copy_until(tmp_path / "whole", tmp_path / "resumed", 120)
    assert _train(1, growing_config, run("resumed"))[0]["code"] == 0
    assert _losses(tmp_path / "resumed") == _losses(tmp_path / "whole")


def test_the_band_of_usual_losses_begins_anew_with_each_stage() -> None:
    training = TrainingConfig(steps=10, global_batch_size=1, spike_deviations=2)
    counters = Counters(loss_mean=100.0, loss_deviation=50.0)
    for step, loss in enumerate([3.0, 2.0, 4.0, *[3.0] * 125], 1):
        assert highest_loss(counters, training) == float("inf")
        counters = Counters(**{**vars(counters), "stage_step": step}).with_loss(loss)
    assert highest_loss(counters, training) == pytest.approx(3.0, abs=0.1)
    assert highest_loss(counters, TrainingConfig(steps=10, global_batch_size=1)) == float("inf")


def test_a_token_id_beyond_the_vocabulary_ends_all_ranks_with_one_message_at_every_layout(
    growing_config: Path, tmp_path: Path
) -> None:
    """The sample is on the second data-parallel rank alone."""
    runs: list[dict[str, Any]] = [
        {"overrides": [f"run.directory={tmp_path / str(number)}", *layout], "unknown": [26]}
        for number, layout in enumerate([[], [TP2], [PP2]])
    ]
    for result in (*_train(2, growing_config, *runs), *_train(1, growing_config, runs[0])):
        assert result["code"] == 2
        assert "sample 26 of the data holds token 300, the model's vocab_size is 300" in result["error"]


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_checkpoint_without_room_is_removed_and_the_run_ends_with_what_to_do(
    growing_config: Path, tmp_path: Path, background: str
) -> None:
    run = tmp_path / "run"
    overrides = [f"run.directory={run}", f"checkpoint.async_save={background}"]
    arguments = {"config": str(growing_config), "overrides": overrides, "largest_bytes": 200_000}
    for ended in run_ranks("tests.train.health_workers:train_with_small_files", 2, arguments):
        assert ended["code"] == 1
        step = 6 if background == "true" else 2  # a save in the background that fails is said, and the run goes on
        assert f"no checkpoint of step {step}: cannot write " in ended["error"]
    assert not list((run / "checkpoints").glob("*step_*"))
    assert _train(1, growing_config, {"overrides": overrides})[0]["code"] == 0
