"""A run begins from any checkpoint of another: as its continuation, as a branch, with the same or with other data."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.checkpoint.folder.manifest import read_identified_manifest, read_manifest
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.run_schema import CheckpointConfig
from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from growth_megatron.model.tensors import FIRST_MOMENT_PREFIX, whole
from growth_megatron.report.curves import render_summary, summarise
from growth_megatron.train.metrics import read_metrics
from tests.command_line import Outcome, run_command
from tests.conftest import write_growing_config


@pytest.fixture(scope="module")
def parent(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``config.yaml`` and ``run``: 4 steps of 2 layers, then 4 of 4, at one learning rate."""
    folder = tmp_path_factory.mktemp("parent")
    path = write_growing_config(folder, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["schedule"] = {"kind": "constant", "learning_rate": 0.003}
    for stage in content["stages"]:
        stage["training"]["steps"] = 4
    path.write_text(yaml.safe_dump(content))
    assert run_command("train", str(path)).code == EXIT_OK
    return folder


def _one_stage(parent: Path, folder: Path, layers: int, step: int, **checkpoint: Any) -> Path:
    """``folder/one.yaml``: 2 steps of one stage from a checkpoint of ``parent``, in ``folder/branch``."""
    content = yaml.safe_load((parent / "config.yaml").read_text())
    content["stages"] = [{"name": "only", "model": {"num_layers": layers}, "training": {"steps": 2}}]
    content["run"]["directory"] = str(folder / "branch")
    content["checkpoint"] |= {"resume": str(parent / "run" / "checkpoints" / f"step_{step:08d}"), **checkpoint}
    (folder / "one.yaml").write_text(yaml.safe_dump(content))
    return folder / "one.yaml"


def _train(path: Path, *more: str) -> Outcome:
    outcome = run_command("train", str(path), *more)
    assert outcome.code == EXIT_OK, outcome.printed
    return outcome


def _losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run) if record["kind"] == "train"}


def test_a_stage_that_a_configuration_no_longer_has_is_one_line_among_what_changed(
    parent: Path, tmp_path: Path
) -> None:
    said = _train(_one_stage(parent, tmp_path, 2, 2, mode="branch")).out
    changed = [line for line in said.splitlines() if line.startswith("config changed")]
    assert sum("is no longer in it" in line for line in changed) == 1, said
    assert not [line for line in changed if "stages.1." in line]
    assert [line for line in changed if "stages.0.training.steps: 4 -> 2" in line]


def test_a_run_whose_checkpoints_are_gone_says_so_and_keeps_its_metrics(parent: Path, tmp_path: Path) -> None:
    shutil.copytree(parent / "run", tmp_path / "run", symlinks=True)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    said = _train(parent / "config.yaml", f"run.directory={tmp_path / 'run'}").out
    (kept,) = (tmp_path / "run").glob("metrics_before_*.jsonl")
    assert f"is left (up to step 8): the run begins anew; its earlier metrics are {kept}" in said
    assert kept.read_bytes() == before
    again = _train(parent / "config.yaml", f"run.directory={tmp_path / 'run'}").out
    assert "begins anew" not in again


@pytest.mark.parametrize(("layers", "step"), [(2, 2), (4, 6)])
def test_a_branch_off_any_stage_repeats_its_parents_next_steps_bitwise(
    parent: Path, tmp_path: Path, layers: int, step: int
) -> None:
    _train(_one_stage(parent, tmp_path, layers, step, mode="branch"))
    expected, found = _losses(parent / "run"), _losses(tmp_path / "branch")
    assert found == {number: expected[number] for number in (step + 1, step + 2)}
    source, identity = read_identified_manifest(parent / "run" / "checkpoints" / f"step_{step:08d}")
    saved = read_manifest(tmp_path / "branch" / "latest")
    assert (saved.step, saved.stage, saved.stage_step) == (step + 2, 0, 2)
    assert saved.lineage == source.lineage
    (branch,) = saved.branches
    assert (branch.step, branch.stage, branch.source_manifest_sha256) == (step, source.stage, identity)


def test_a_branch_has_a_schedule_of_its_own_and_resumes_as_any_run(parent: Path, tmp_path: Path) -> None:
    path = _one_stage(parent, tmp_path, 2, 2, mode="branch")
    schedule = ["schedule.warmup_steps=2", "schedule.kind=cosine"]
    _train(path, *schedule)
    assert "run complete" in _train(path, *schedule).out
    rates = [r["learning_rate"] for r in read_metrics(tmp_path / "branch") if r["kind"] == "train"]
    assert rates == pytest.approx([0.0015, 0.003])


def test_a_stage_that_a_configuration_does_not_have_can_be_branched_off_as_the_message_says(
    parent: Path, tmp_path: Path
) -> None:
    path = _one_stage(parent, tmp_path, 4, 6)
    refused = run_command("train", str(path))
    assert refused.code == EXIT_USAGE
    (advice,) = re.findall(r"with it: (.*)$", refused.err, re.MULTILINE)
    _train(path, *shlex.split(advice.replace("=NEW", f"={tmp_path / 'new'}")))
    assert read_manifest(tmp_path / "new" / "latest").step == 8


def test_other_data_are_refused_and_begin_at_their_first_sample_as_the_message_says(
    parent: Path, prepared_corpus: Path, tmp_path: Path
) -> None:
    path = _one_stage(parent, tmp_path, 4, 6, mode="branch")
    other = [f"data.train.0.path={prepared_corpus / 'validation'}", "data.validation=[]"]
    refused = run_command("train", str(path), *other)
    assert refused.code == EXIT_USAGE
    assert "bin_content_sha256" in refused.err
    (advice,) = re.findall(r"in another run: (.*)$", refused.err, re.MULTILINE)
    _train(path, *other, *shlex.split(advice.replace("=NEW", f"={tmp_path / 'new'}")))
    source, saved = read_manifest(parent / "run/checkpoints/step_00000006"), read_manifest(tmp_path / "new" / "latest")
    assert (saved.step, saved.consumed_samples) == (8, 16)
    assert saved.consumed_tokens == source.consumed_tokens + 16 * 32
    (branch,) = saved.branches
    assert (branch.data, branch.data_fingerprint) == ("new", source.data_fingerprint)
    assert saved.data_fingerprint != source.data_fingerprint
    assert saved.data_fingerprint is not None


def test_another_length_of_samples_is_other_data(parent: Path, tmp_path: Path) -> None:
    path = _one_stage(parent, tmp_path, 2, 2, mode="branch")
    assert "data.sequence_length: 32 in the checkpoint, 16 now" in run_command(
        "train", str(path), "model.sequence_length=16"
    ).err  # fmt: skip
    _train(path, "model.sequence_length=16", "checkpoint.data=new")
    assert read_manifest(tmp_path / "branch" / "latest").geometry.sequence_length == 16


def test_the_report_joins_a_branch_to_its_parent(parent: Path, tmp_path: Path) -> None:
    _train(_one_stage(parent, tmp_path, 4, 6, mode="branch"))
    summary = summarise(tmp_path / "branch")
    assert [(stage.name, stage.steps) for stage in summary.stages] == [("run/base", 4), ("run/grown", 2), ("only", 2)]
    assert summary.tokens == read_manifest(tmp_path / "branch" / "latest").consumed_tokens
    assert summary.growths
    assert [stage.geometry and stage.geometry["num_layers"] for stage in summary.stages] == [2, 4, 4]
    assert "run/grown" in render_summary(summary)


def test_masks_that_are_open_stay_open_in_a_branch_and_others_are_refused(parent: Path, tmp_path: Path) -> None:
    source, grown = parent / "run" / "checkpoints" / "step_00000002", tmp_path / "grown"
    how = ["--operator", "masked", "--set", "num_layers=4", "ramp={depth: [0, 3]}"]
    assert run_command("grow", str(source), str(grown), *how).code == EXIT_OK
    run = _one_stage(parent, tmp_path, 4, 2, resume=str(grown), interval_steps=1)
    _train(run, "stages.only.training.steps=4")
    expected = _losses(tmp_path / "branch")
    again = _one_stage(parent, tmp_path, 4, 2, mode="branch", resume=str(tmp_path / "branch/checkpoints/step_00000005"))
    one_step = ["stages.only.training.steps=1", f"run.directory={tmp_path / 'again'}"]
    _train(again, *one_step)
    assert _losses(tmp_path / "again") == {6: expected[6]}
    halfway = f"checkpoint.resume={tmp_path / 'branch/checkpoints/step_00000004'}"
    refused = run_command("train", str(again), halfway, f"run.directory={tmp_path / 'other'}")
    assert refused.code == EXIT_USAGE
    assert "a branch would close them again. Set checkpoint.mode to continue" in refused.err


def test_without_a_checkpoint_to_start_from_nothing_can_be_branched() -> None:
    for key, value in (("mode", "branch"), ("data", "new")):
        with pytest.raises(ValueError, match=f"{key}: needs the path of a checkpoint as resume, which is auto"):
            CheckpointConfig.model_validate({key: value})
        CheckpointConfig.model_validate({key: value, "resume": "runs/a"})


def _from(parent: Path, folder: Path, source: str, growth: dict[str, Any], layers: int) -> Path:
    """``folder/from.yaml``: 2 steps of one stage that begins from ``source``, in ``folder/grown``."""
    content = yaml.safe_load((parent / "config.yaml").read_text())
    stage = {"name": "grown", "from": source, "model": {"num_layers": layers}, "training": {"steps": 2}}
    content["stages"] = [{**stage, "growth": growth}]
    content["run"]["directory"] = str(folder / "grown")
    (folder / "from.yaml").write_text(yaml.safe_dump(content))
    return folder / "from.yaml"


def test_a_first_stage_grows_out_of_another_runs_step_as_the_stage_of_that_run_did(
    parent: Path, tmp_path: Path
) -> None:
    path = _from(parent, tmp_path, f"{parent / 'run'}@4", {"operator": "stack", "optimizer_state": "carry"}, 4)
    _train(path)
    expected, found = _losses(parent / "run"), _losses(tmp_path / "grown")
    assert found == {5: expected[5], 6: expected[6]}
    saved = read_manifest(tmp_path / "grown" / "latest")
    assert [record.operator for record in saved.lineage] == ["stack"]
    assert (saved.stage, saved.stage_step, len(saved.branches)) == (0, 2, 1)
    (record,) = [line for line in read_metrics(tmp_path / "grown") if line["kind"] == "growth"]
    assert record["source"] == str(parent / "run" / "checkpoints" / "step_00000004")
    assert "run complete" in _train(path).out


def test_a_run_killed_after_its_first_growth_goes_on_bitwise(parent: Path, tmp_path: Path) -> None:
    path = _from(parent, tmp_path, f"{parent / 'run'}@4", {"operator": "stack", "optimizer_state": "carry"}, 4)
    _train(path)
    expected = _losses(tmp_path / "grown")
    for checkpoint in (tmp_path / "grown" / "checkpoints").iterdir():
        if not checkpoint.name.endswith("_grown"):
            shutil.rmtree(checkpoint)
    _train(path)
    assert _losses(tmp_path / "grown") == expected


def test_weights_alone_begin_a_branch_by_a_growth_to_the_same_geometry(parent: Path, tmp_path: Path) -> None:
    _train(_from(parent, tmp_path, f"{parent / 'run'}@4", {"optimizer_state": "reset"}, 2))
    source, start = (
        DistCheckpoint(folder / "checkpoints" / name)
        for folder, name in ((parent / "run", "step_00000004"), (tmp_path / "grown", "step_00000004_grown"))
    )
    key = "embedding.word_embeddings.weight"
    region = whole(source.spec(key).shape)
    assert source.read(key, region).equal(start.read(key, region))
    moment = FIRST_MOMENT_PREFIX + key
    assert source.read(moment, region).any()
    assert not start.read(moment, region).any()


def test_a_step_that_the_run_does_not_have_names_those_it_has(parent: Path, tmp_path: Path) -> None:
    refused = run_command("train", str(_from(parent, tmp_path, f"{parent / 'run'}@5", {}, 4)))
    assert refused.code == EXIT_USAGE
    assert "has no checkpoint of step 5; it has those of steps 2, 4, 6, 8" in refused.err


def test_a_growth_that_cannot_be_is_refused_before_the_first_step(parent: Path, tmp_path: Path) -> None:
    refused = run_command("train", str(_from(parent, tmp_path, f"{parent / 'run'}@4", {"operator": "stack"}, 1)))
    assert refused.code == EXIT_USAGE
    assert "num_layers" in refused.err


def test_a_first_stage_of_no_steps_is_grown_from_its_initial_weights(parent: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((parent / "config.yaml").read_text())
    content["run"]["directory"] = str(tmp_path / "run")
    content["schedule"]["warmup_steps"] = 1
    content["stages"][0]["training"]["steps"] = 0
    content["stages"][1]["training"]["steps"] = 2
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(content))
    assert "initialised" in _train(tmp_path / "zero.yaml").out
    assert sorted(_losses(tmp_path / "run")) == [1, 2]
    (record,) = read_manifest(tmp_path / "run" / "latest").lineage
    assert (record.step, record.source_geometry.num_layers) == (0, 2)
    assert run_command("plan", str(tmp_path / "zero.yaml")).code == EXIT_OK
    refused = run_command("plan", str(tmp_path / "zero.yaml"), "stages.grown.training.steps=0")
    assert refused.code == EXIT_USAGE
    assert "which only a first stage that is then grown may have" in refused.err


def test_another_geometry_is_refused_with_a_growth_that_works_where_there_is_one(parent: Path, tmp_path: Path) -> None:
    refused = run_command("train", str(_one_stage(parent, tmp_path, 4, 2)))
    assert refused.code == EXIT_USAGE
    advised = re.search(r"grow the checkpoint: growth-megatron (grow .* --set num_layers=4)$", refused.printed, re.M)
    assert advised is not None, refused.printed
    words = shlex.split(advised[1].replace("TARGET", str(tmp_path / "target")))
    assert run_command(*words).code == EXIT_OK
    refused = run_command("train", str(_one_stage(parent, tmp_path, 2, 2)), "model.rope_base=500")
    assert refused.code == EXIT_USAGE
    assert "rope_base" in refused.printed
    assert "--set" not in refused.printed, "nothing that growth could set differs"
