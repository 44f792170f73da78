"""A run goes on where it was: bitwise at the same layout, within 1e-5 at another, after a kill and across a growth."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.checkpoint.folder.manifest import read_manifest
from tests.command_line import Outcome, run_command
from tests.conftest import write_growing_config
from tests.pool import ROOT, TIMEOUT_S, environment, pool
from tests.ranks import run_ranks

TP2 = ["parallel.tensor_parallel_size=2"]
PP2 = ["parallel.pipeline_parallel_size=2"]
TP2_PP2 = [*TP2, *PP2]
GROWN_PP2 = "{pipeline_parallel_size: 2, virtual_pipeline_parallel_size: 2}"


def _records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def _losses(run: Path) -> dict[int, float]:
    records = _records(run)
    assert len({r["step"] for r in records}) == len(records), "a step is recorded twice"
    return {record["step"]: record["loss"] for record in records}


def _copy_until(run: Path, target: Path, step: int) -> None:
    """``run`` as it stood right after the checkpoint of ``step``."""
    shutil.copytree(run, target, symlinks=True)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.split("_")[1]) > step or checkpoint.name == f"step_{step:08d}_grown":
            shutil.rmtree(checkpoint)


def _train(ranks: int, config: Path, *runs: list[str]) -> list[int]:
    arguments = {"runs": [{"config": str(config), "overrides": overrides} for overrides in runs]}
    return run_ranks("tests.workers:train_all", ranks, arguments)[0]


def _run(config: Path, *overrides: str) -> Outcome:
    return run_command("train", str(config), *overrides)


def _start(config: Path, *overrides: str) -> subprocess.Popen[str]:
    """The run in a process session of its own, its output to be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "growth_megatron", "train", str(config), *overrides],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def growing_config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_growing_config(tmp_path_factory.mktemp("growing"), prepared_corpus)


@pytest.fixture(scope="module")
def reference(growing_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on one rank."""
    run = tmp_path_factory.mktemp("reference") / "whole"
    assert _train(1, growing_config, [f"run.directory={run}"]) == [0]
    return run


def test_resume_at_the_same_layout_is_bitwise_the_uninterrupted_run(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    overrides = []
    for step in (2, 4, 6, 8):  # 6 is the stage's end: the growth is done again
        _copy_until(reference, tmp_path / f"from_{step}", step)
        overrides.append([f"run.directory={tmp_path / f'from_{step}'}"])
    assert _train(1, growing_config, *overrides) == [0, 0, 0, 0]
    for step in (2, 4, 6, 8):
        assert _losses(tmp_path / f"from_{step}") == _losses(reference)
        (growth,) = _records(tmp_path / f"from_{step}", "growth")
        assert growth["validation_loss_after"] == _records(reference, "growth")[0]["validation_loss_after"]


@pytest.mark.parametrize("is_recorded", [True, False])
def test_killed_between_a_growth_and_the_next_save_the_growth_is_recorded_once(
    reference: Path, growing_config: Path, tmp_path: Path, is_recorded: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run, symlinks=True)
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("_")[1]) > 6:
            shutil.rmtree(checkpoint)
    grown = run / "checkpoints" / "step_00000006_grown" / "manifest.json"
    as_committed = grown.read_bytes()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (place,) = (number for number, line in enumerate(lines) if json.loads(line)["kind"] == "growth")
    (run / "metrics.jsonl").write_text("".join(lines[: place + 2 if is_recorded else place]))
    assert _train(1, growing_config, [f"run.directory={run}"]) == [0]
    assert _losses(run) == _losses(reference)
    (growth,), (expected,) = _records(run, "growth"), _records(reference, "growth")
    for name in ("validation_loss_before", "validation_loss_after"):
        assert growth[name] == expected[name]
    assert (growth["seconds"] is not None) == is_recorded
    assert read_manifest(run / "latest").lineage[0].validation_loss_after == expected["validation_loss_after"]
    assert grown.read_bytes() == as_committed


def test_resume_at_another_layout_follows_the_uninterrupted_run(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    def at(name: str, *layout: str) -> list[str]:
        return [f"run.directory={tmp_path / name}", *layout]

    changing = at(
        "tp2_grown_pp2", "stages.base.parallel={tensor_parallel_size: 2}", "stages.grown.parallel=" + GROWN_PP2
    )
    assert _train(2, growing_config, at("tp2", *TP2), at("pp2", *PP2), changing) == [0, 0, 0]
    assert _train(4, growing_config, at("tp2pp2", *TP2_PP2)) == [0]
    for source, name in (("tp2", "tp2_pp2"), ("pp2", "pp2_dp2"), ("tp2", "tp2_tp2"), ("tp2pp2", "tp2pp2_one")):
        _copy_until(tmp_path / source, tmp_path / name, 4)
    assert _train(2, growing_config, at("tp2_pp2", *PP2), at("pp2_dp2"), at("tp2_tp2", *TP2)) == [0, 0, 0]
    assert _train(1, growing_config, at("tp2pp2_one")) == [0]
    expected = _losses(reference)
    for name in ("tp2", "pp2", "tp2pp2", "tp2_grown_pp2", "tp2_pp2", "pp2_dp2", "tp2pp2_one"):
        losses = _losses(tmp_path / name)
        assert losses.keys() == expected.keys()
        assert max(abs(losses[step] - expected[step]) for step in expected) <= 1e-5, name
    assert _losses(tmp_path / "tp2_tp2") == _losses(tmp_path / "tp2")


def test_the_grown_checkpoint_tells_where_it_comes_from(reference: Path) -> None:
    manifest = read_manifest(reference / "checkpoints" / "step_00000006_grown")
    (record,) = manifest.lineage
    assert (record.operator, record.layers, record.optimizer_state) == ("stack", (0, 1, 0, 1), "carry")
    assert record.source_geometry.num_layers == 2
    assert record.target_geometry.num_layers == manifest.geometry.num_layers == 4
    assert record.source.endswith("step_00000006")
    losses = {r["step"]: r["validation_loss"] for r in _records(reference, "validation")[:1]}
    assert record.validation_loss_before == losses[6]
    assert read_manifest(reference / "checkpoints" / "step_00000006").validation_loss == losses[6]
    # A committed manifest is never rewritten: the loss after the growth is in the lineage of what is saved next.
    assert (record.validation_loss_after, manifest.validation_loss) == (None, None)
    (logged,) = _records(reference, "growth")
    assert (logged["validation_loss_before"], logged["validation_loss_after"] is None) == (losses[6], False)
    for name in ("checkpoints/step_00000008", "latest"):
        (later,) = read_manifest(reference / name).lineage
        assert later == record.model_copy(update={"validation_loss_after": logged["validation_loss_after"]})
    assert manifest.consumed_samples == 48
    assert read_manifest(reference / "latest").consumed_samples == 80


def test_background_saves_give_the_same_checkpoints(reference: Path, growing_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "background"
    assert _train(2, growing_config, [f"run.directory={run}", "checkpoint.async_save=true"]) == [0]
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    assert _train(1, growing_config, [f"run.directory={run}"]) == [0]
    losses, expected = _losses(run), _losses(reference)
    assert max(abs(losses[step] - expected[step]) for step in expected) <= 1e-5


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_that_fails_in_the_background_is_said_and_the_run_goes_on_one_in_the_foreground_ends_it(
    reference: Path, growing_config: Path, tmp_path: Path, in_background: bool
) -> None:
    run = tmp_path / "run"
    overrides = [f"run.directory={run}", f"checkpoint.async_save={str(in_background).lower()}"]
    arguments = {"config": str(growing_config), "overrides": overrides, "failing": 0}
    (ended,) = run_ranks("tests.checkpoint.saver_workers:train_with_a_failing_save", 1, arguments)
    assert not (run / "checkpoints" / "step_00000002").exists()
    assert not list((run / "checkpoints").glob(".tmp_*"))
    if in_background:
        assert ended == "0"
        (event,) = [line for line in _records(run, "event") if line["event"] == "save_failed"]
        assert "no checkpoint of step 2: cannot write" in event["message"]
        assert "No space left on device" in event["message"]
    else:
        assert "No space left on device; mend that and re-run the same command to resume" in ended
        assert _train(1, growing_config, overrides) == [0]
    assert _losses(run) == _losses(reference)


def _kill_during_save(config: Path, run: Path, step: int) -> None:
    """Start the run and kill all its processes with SIGKILL once the checkpoint of ``step`` is being written."""
    arguments = ["train", str(config), f"run.directory={run}"]
    for _ in range(20):  # where this process was not woken before the save was over, once more
        shutil.rmtree(run, ignore_errors=True)
        with tempfile.TemporaryFile("w+") as output:
            process = pool.start("growth_megatron", arguments, environment(), output, output)
            while not pool.ended(process) and not (run / "checkpoints" / f".tmp_step_{step:08d}").exists():
                time.sleep(0.0005)
            pool.wait([process], timeout_s=0)
        if (run / "checkpoints" / f".tmp_step_{step:08d}").exists():
            return
    raise AssertionError("no save was met")


def test_a_run_killed_during_a_save_resumes_from_the_last_good_checkpoint(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    _kill_during_save(growing_config, run, 4)
    assert not (run / "checkpoints" / "step_00000004").exists()
    again = _run(growing_config, f"run.directory={run}")
    assert again.code == 0, again.printed
    assert "removed .tmp_step_00000004" in again.printed
    assert "resuming from" in again.printed
    assert "step_00000002 (step 2)" in again.printed
    assert _losses(run) == _losses(reference)


def test_a_truncated_file_is_noticed_and_the_checkpoint_before_it_taken(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "damaged"
    _copy_until(reference, run, 8)
    data = max((run / "checkpoints" / "step_00000008").glob("*.distcp"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-100])
    again = _run(growing_config, f"run.directory={run}")
    assert again.code == 0, again.printed
    assert "skipped" in again.printed
    assert data.name in again.printed
    assert "step_00000006_grown (step 6)" in again.printed
    assert _losses(run) == _losses(reference)


def test_when_nothing_valid_is_left_the_run_ends_with_77(growing_config: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "hopeless"
    _copy_until(reference, run, 2)
    (run / "checkpoints" / "step_00000002" / "manifest.json").unlink()
    ended = _run(growing_config, f"run.directory={run}")
    assert ended.code == 77, ended.printed
    assert "Traceback" not in ended.printed


@pytest.mark.parametrize("whole_job", [False, True], ids=["to the rank", "to every process of the job"])
def test_a_signal_stops_the_run_with_75_and_the_same_command_ends_it(
    whole_job: bool, reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    """Schedulers signal the whole job, the helper processes of a save included."""
    run = tmp_path / "stopped"
    process = _start(growing_config, f"run.directory={run}")
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if "step  3/10" in line:  # a checkpoint has been written by then, so all helpers are there
            if whole_job:
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.send_signal(signal.SIGTERM)
            break
    printed += process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 75, printed
    assert "SIGTERM" in printed
    assert _run(growing_config, f"run.directory={run}").code == 0
    assert _losses(run) == _losses(reference)


def test_a_signal_after_the_save_of_the_first_one_changes_nothing(growing_config: Path, tmp_path: Path) -> None:
    arguments = {"config": str(growing_config), "overrides": [f"run.directory={tmp_path / 'run'}"]}
    assert run_ranks("tests.workers:signalled_again_after_the_save", 1, arguments) == [75]
    assert (tmp_path / "run" / "latest" / "manifest.json").is_file()


def test_a_flipped_byte_is_noticed_and_the_checkpoint_before_it_taken(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "flipped"
    _copy_until(reference, run, 4)
    data = max((run / "checkpoints" / "step_00000004").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    again = _run(growing_config, f"run.directory={run}")
    assert again.code == 0, again.printed
    assert data.name in again.printed
    assert "step_00000002 (step 2)" in again.printed
    assert _losses(run) == _losses(reference)


def test_a_stages_model_and_optimizer_are_gone_when_the_next_stage_is_built() -> None:
    assert run_ranks("tests.workers:what_outlives_an_engine", 2, {"layout": {}}) == [[], []]
    unclosed = run_ranks("tests.workers:what_outlives_an_engine", 1, {"layout": {}, "close": False})[0]
    assert "gradients" in unclosed
    assert "optimizer" in unclosed


def test_a_stage_for_another_world_size_ends_with_76_and_goes_on_there(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "wider"
    overrides = [f"run.directory={run}", "stages.grown.parallel={data_parallel_size: 2, tensor_parallel_size: 1}"]
    assert _train(1, growing_config, overrides) == [76]
    assert json.loads((run / "next_layout.json").read_text())["world_size"] == 2
    assert _train(2, growing_config, overrides) == [0]
    assert not (run / "next_layout.json").exists()
    losses, expected = _losses(run), _losses(reference)
    assert max(abs(losses[step] - expected[step]) for step in expected) <= 1e-5


def test_other_data_or_another_model_are_refused_on_resume(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "changed"
    _copy_until(reference, run, 4)
    other_seed = _run(growing_config, f"run.directory={run}", "run.seed=4")
    assert other_seed.code == 2
    assert "data.seed: 3 in the checkpoint, 4 now" in other_seed.printed
    other_model = _run(growing_config, f"run.directory={run}", "stages.base.model.num_layers=4")
    assert other_model.code == 2
    assert "num_layers 2 -> 4" in other_model.printed
    assert "growth-megatron grow" in other_model.printed
    assert "Traceback" not in other_seed.printed + other_model.printed


def test_a_changed_learning_rate_takes_effect_and_is_shown(
    reference: Path, growing_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "rate"
    _copy_until(reference, run, 4)
    resumed = _run(growing_config, f"run.directory={run}", "schedule.learning_rate=0.001", "schedule.kind=constant")
    assert resumed.code == 0, resumed.printed
    assert "stages.0.schedule.learning_rate: 0.003 -> 0.001" in resumed.printed
    assert {r["learning_rate"] for r in _records(run) if r["step"] in (5, 6)} == {0.001}


def test_a_second_job_in_the_same_run_is_turned_away(growing_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "shared"
    arguments = ["train", str(growing_config), f"run.directory={run}", "stages.grown.training.steps=100000"]
    with (tmp_path / "printed").open("w") as output:
        process = pool.start("growth_megatron", arguments, environment(), output, output)
        while "step  " not in (tmp_path / "printed").read_text():
            assert not pool.ended(process), "the run ended before another could start"
            time.sleep(0.01)
        second = _run(growing_config, f"run.directory={run}")
        pool.wait([process], timeout_s=0)
    assert second.code == 2, second.printed
    assert "another job is running" in second.printed
