"""``growth-megatron grow``: shows its plan first, refuses before it writes, and what it writes is trained on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from growth_megatron.checkpoint.folder.manifest import (
    checksum_files,
    list_files,
    read_manifest,
    validate_checkpoint,
    write_manifest,
)
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.commands.growth import grow, plan_grow
from growth_megatron.commands.growth_request import read_request
from growth_megatron.commands.inspect import growth_line
from growth_megatron.errors import EXIT_USAGE, CheckpointError, GrowthError, GrowthMegatronError, NothingValidError
from growth_megatron.growth.layers import parse_layers
from tests.checkpoint.written import geometry, manifest_of, model_tensors, write_checkpoint, write_distributed
from tests.command_line import run_commands

SOURCE = geometry(3)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", SOURCE)
    return tmp_path / "source"


def _grow(source: Path, target: Path, *settings: str, **options: Any) -> None:
    asked = {"operator": None, "layers": None, "optimizer_state": None, "seed": None}
    request = read_request(
        options.pop("config", None), settings=settings, **{k: options.pop(k, v) for k, v in asked.items()}
    )
    if options.pop("plan", False):
        plan_grow(str(source), str(target), request, materialize=False, as_json=False)
    else:
        grow(str(source), str(target), request, **{"materialize": False, **options})


def _refused(source: Path, target: Path, *settings: str, **options: Any) -> str:
    before = {path: path.lstat().st_mtime_ns for path in source.parent.rglob("*")}
    with pytest.raises(GrowthMegatronError) as caught:
        _grow(source, target, *settings, **options)
    assert caught.value.exit_code == EXIT_USAGE
    assert {path: path.lstat().st_mtime_ns for path in source.parent.rglob("*")} == before, "something was written"
    return str(caught.value)


def test_the_plan_is_printed_and_the_grown_checkpoint_is_what_it_says(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "grown"
    _grow(source, target, "num_layers=9", optimizer_state="carry", seed=5)
    printed = capsys.readouterr().out
    for words in ("3 layers, hidden 8", "9 layers, hidden 8", "0-2 x3", "75.0 %", "carry (", "linked", "grew "):
        assert words in printed, printed
    assert validate_checkpoint(target, full=True) is None
    manifest = read_manifest(target)
    assert manifest.geometry == SOURCE.model_copy(update={"num_layers": 9})
    (record,) = manifest.lineage
    assert (record.layers, record.optimizer_state, record.seed) == ((0, 1, 2) * 3, "carry", 5)
    grown, small = DistCheckpoint(target), DistCheckpoint(source)
    for layer in range(9):
        for name in ("mlp.linear_fc1.weight", "self_attention.linear_qkv.weight"):
            expected = small.read(f"decoder.layers.{layer % 3}.{name}")
            assert torch.equal(grown.read(f"decoder.layers.{layer}.{name}"), expected)


def test_counters_go_on_and_the_stage_starts_anew(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source)
    write_checkpoint(source, SOURCE, manifest_of(SOURCE, stage=2, stage_step=40))
    _grow(source, tmp_path / "grown", "num_layers=6")
    before, after = read_manifest(source), read_manifest(tmp_path / "grown")
    assert (after.stage, after.stage_step) == (0, 0)
    for name in ("step", "consumed_samples", "consumed_tokens", "flops", "data_fingerprint"):
        assert getattr(after, name) == getattr(before, name)


def test_the_printed_layers_can_be_given_and_a_growth_in_width_says_nothing_of_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _grow(source, tmp_path / "one", "num_layers=4", operator="solar")
    (printed,) = re.findall(r"^layers +(.*) \(source", capsys.readouterr().out, re.MULTILINE)
    _grow(source, tmp_path / "two", layers=printed)
    assert read_manifest(tmp_path / "two").lineage[-1].layers == read_manifest(tmp_path / "one").lineage[-1].layers
    assert "connection rate" in capsys.readouterr().out
    _grow(source, tmp_path / "wide", "hidden_size=16")
    assert "connection rate" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("notation", "compact"), [("1-23*2", "0-2, 1-2"), ("0,2,2,1", "0, 2 x2, 1"), ("3-1*2", "2, 0 x2")]
)
def test_a_layer_list_says_the_depth_by_itself(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], notation: str, compact: str
) -> None:
    _grow(source, tmp_path / "grown", layers=notation)
    assert read_manifest(tmp_path / "grown").lineage[-1].layers == parse_layers(notation, 3)
    assert f" {compact} (source layers" in capsys.readouterr().out


def test_a_plan_says_the_same_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _grow(source, tmp_path / "deep" / "grown", "num_layers=6", plan=True)
    plan = capsys.readouterr().out
    assert not (tmp_path / "deep").exists()
    _grow(source, tmp_path / "deep" / "grown", "num_layers=6")
    forecast, tensors = plan.split("\n\n")
    assert capsys.readouterr().out.startswith(forecast + "\n")
    assert tensors.splitlines()[0].split() == ["count", "target", "shape", "source", "rule"]
    assert tensors.endswith("nothing was written\n")


def test_a_plan_reads_no_tensor(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in source.glob("*.distcp"):
        file.unlink()
    _grow(source, tmp_path / "grown", "num_layers=6", "hidden_size=16", plan=True)
    assert "nothing was written" in capsys.readouterr().out


def test_the_announced_bytes_are_about_those_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for policy in ("reset", "carry"):
        _grow(source, tmp_path / policy, "num_layers=6", optimizer_state=policy)
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("files"))
        announced = float(line.split("about ")[1].split(" KiB")[0]) * 1024
        own = [file for file in (tmp_path / policy).iterdir() if file.stat().st_nlink == 1]
        assert announced == pytest.approx(sum(file.stat().st_size for file in own), rel=0.1)


def _run(folder: Path, *steps: int) -> Path:
    for step in steps:
        write_checkpoint(folder / "checkpoints" / f"step_{step:08d}", SOURCE, manifest_of(SOURCE, step))
    (folder / "latest").symlink_to(f"checkpoints/step_{max(steps):08d}")
    return folder


@pytest.mark.parametrize("name", ["", "latest", "checkpoints"])
def test_a_run_and_its_link_stand_for_the_newest_checkpoint(tmp_path: Path, name: str) -> None:
    run = _run(tmp_path / "run", 10, 20)
    _grow(run / name, tmp_path / "grown", "num_layers=6")
    manifest = read_manifest(tmp_path / "grown")
    assert manifest.step == 20
    assert manifest.lineage[-1].source == str(run / "checkpoints" / "step_00000020")  # true when the link moves on


def test_damaged_newer_checkpoints_of_a_run_are_passed_over_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "run", 10, 20)
    (run / "checkpoints" / "step_00000020" / "common.pt").unlink()
    _grow(run, tmp_path / "grown", "num_layers=6")
    assert read_manifest(tmp_path / "grown").step == 10
    assert "passed over" in capsys.readouterr().out
    (run / "checkpoints" / "step_00000010" / "manifest.json").write_text("{")
    with pytest.raises(NothingValidError, match="step_00000020: common.pt is missing"):
        _grow(run, tmp_path / "again", "num_layers=6")


@pytest.mark.parametrize(
    ("settings", "layers", "words"),
    [
        ([], None, "say what is to grow: --set num_layers=24"),
        (["num_layer=6"], None, "did you mean num_layers?"),
        (["vocab_size=64"], None, "cannot set vocab_size; allowed: num_layers, hidden_size"),
        (["num_layers"], None, "write key=value"),
        (["num_layers=six"], None, "num_layers: Input should be a valid integer"),
        (["num_layers=-6"], None, "should be greater than or equal to 0 (here -6)"),
        (["num_layers=0"], None, "would drop every layer; keep 1 at least"),
        (["num_layers=" + 5000 * "9"], None, "--set: num_layers: '99999999999999999999' cannot be read as a number"),
        (["rotary_base=1e5"], None, "cannot set rope_base"),
        (["num_layers=6", "num_layers=9"], None, "more than once (6 and 9)"),
        (["num_layers=2"], None, "to drop layers, list those to keep in growth.layers (--layers), as 0,1"),
        (
            ["num_layers=6"],
            "0,1,2",
            "gives 3 layers but the target model has 6; change the list, or set num_layers to 3",
        ),
        ([], "0,1,3", "there is no layer 3; allowed: 0 to 2"),
        ([], "1-24*2", "there is no layer 4; allowed: 1 to 3"),
        ([], "1-*2", "a segment without layers"),
        ([], "", "a segment without layers"),
    ],
)
def test_impossible_growths_name_what_is_possible(
    source: Path, tmp_path: Path, settings: list[str], layers: str | None, words: str
) -> None:
    assert words in _refused(source, tmp_path / "grown", *settings, layers=layers)


def test_an_existing_target_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("mine")
    _grow(source, tmp_path / "grown", "num_layers=6")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "folder", "grown", "link", "source"):
        assert "exists; name a new folder" in _refused(source, tmp_path / name, "num_layers=6")
    assert "is not a folder" in _refused(source, tmp_path / "file" / "grown", "num_layers=6")
    assert "lie in one another" in _refused(source, source / "grown", "num_layers=6")


def test_overwrite_replaces_a_checkpoint_and_nothing_else(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "grown"
    _grow(source, target, "num_layers=6")
    assert "add --overwrite to replace it" in _refused(source, target, "num_layers=4")
    _grow(source, target, "num_layers=4", overwrite=True)
    os.truncate(target / "common.pt", 5)  # damaged, but ours
    _grow(source, target, "num_layers=5", overwrite=True, materialize=True)
    assert read_manifest(target).geometry.num_layers == 5
    assert validate_checkpoint(target, full=True) is None
    (target / "notes.txt").write_text("mine")
    assert "exists; name a new folder, or remove" in _refused(source, target, "num_layers=4", overwrite=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/metadata.json").write_text("{}")
    assert "exists; name a new folder, or remove" in _refused(source, tmp_path / "data", "num_layers=4", overwrite=True)
    inner = shutil.copytree(source, tmp_path / "outer/inner")
    shutil.copytree(source, tmp_path / "outer", dirs_exist_ok=True)
    manifest = read_manifest(source)
    files = checksum_files(tmp_path / "outer", list_files(tmp_path / "outer"))
    write_manifest(tmp_path / "outer", manifest.model_copy(update={"files": files}))
    (inner / "manifest.json").unlink()
    write_manifest(inner, manifest)
    assert "lie in one another" in _refused(inner, tmp_path / "outer", "num_layers=4", overwrite=True)


def test_an_empty_folder_serves_as_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "grown").mkdir()
    _grow(source, tmp_path / "grown", "num_layers=6")
    assert validate_checkpoint(tmp_path / "grown") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    assert "cannot be written to" in _refused(source, tmp_path / "closed" / "grown", "num_layers=6")


def test_a_fault_of_the_file_system_names_the_target(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "common.pt")

    monkeypatch.setattr("growth_megatron.commands.growth.carry_out", full)
    with pytest.raises(CheckpointError, match="grown: No space left on device"):
        _grow(source, tmp_path / "grown", "num_layers=6")


@pytest.mark.parametrize("plan", [False, True])
def test_a_source_that_cannot_be_grown_is_refused(source: Path, tmp_path: Path, plan: bool) -> None:
    def refused(path: Path, **options: Any) -> str:
        return _refused(path, tmp_path / "grown", "num_layers=6", plan=plan, **options)

    assert "does not exist; give a checkpoint" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is neither a checkpoint or a run" in refused(tmp_path / "empty")
    if not plan:  # which reads none of it
        data = source / "__0_1.distcp"
        data.write_bytes(data.read_bytes()[:-1])
        assert "__0_1.distcp has" in refused(source)
    (source / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in refused(source)


def test_carry_needs_optimizer_state(tmp_path: Path) -> None:
    bare = write_distributed(tmp_path / "bare", model_tensors(SOURCE, optimizer=False))
    files = checksum_files(bare, list_files(bare))
    write_manifest(bare, manifest_of(SOURCE).model_copy(update={"files": files, "has_optimizer_state": False}))
    for plan in (True, False):
        words = _refused(bare, tmp_path / "grown", "num_layers=6", optimizer_state="carry", plan=plan)
        assert "use reset" in words
    _grow(bare, tmp_path / "grown", "num_layers=6")


def test_a_wrong_policy_or_seed_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match="'reset', 'carry' or 'asymmetric'"):
        _grow(source, tmp_path / "grown", "num_layers=6", optimizer_state="keep")
    assert "allowed: whole numbers from 0" in _refused(source, tmp_path / "grown", "num_layers=6", seed=-1)


def _one_stage(growing_config: Path, name: str, **model: int) -> Path:
    """The configuration without its stages: 3 steps of one model."""
    content = yaml.safe_load(growing_config.read_text())
    del content["stages"]
    content["model"] |= model
    content["training"]["steps"] = 3
    content["run"]["directory"] = str(growing_config.parent / name)
    path = growing_config.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_one_stage_run_goes_on_from_a_checkpoint_grown_by_hand(growing_config: Path, tmp_path: Path) -> None:
    base = _one_stage(growing_config, "base", num_layers=2)
    deep = _one_stage(growing_config, "deep", num_layers=4)
    seed = tmp_path / "seed"
    go_on = ["train", str(deep), f"checkpoint.resume={seed}"]
    outcomes = run_commands(
        [
            ["train", str(base)],
            ["grow", str(tmp_path / "base" / "latest"), str(seed), "--set", "num_layers=4"],
            go_on,
            go_on,
            ["inspect", str(tmp_path / "deep")],
        ]
    )
    assert [outcome.code for outcome in outcomes] == [0] * 5, outcomes
    assert f"resuming from {seed} (step 3)" in outcomes[2].out
    assert "step_00000006 (step 6)" in outcomes[3].out  # given again, the run is found complete
    assert "stack: layers 2 -> 4" in outcomes[4].out
    lines = [json.loads(line) for line in (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert [(line["step"], line["stage_step"]) for line in trained] == [(4, 1), (5, 2), (6, 3)]
    assert [line["consumed_samples"] for line in trained] == [32, 40, 48]
    assert [line["consumed_tokens"] for line in trained] == [32 * 32, 40 * 32, 48 * 32]
    before, after = read_manifest(seed), read_manifest(tmp_path / "deep" / "latest")
    assert trained[0]["flops"] > before.flops > 0
    assert (after.step, after.stage, after.stage_step, after.geometry.num_layers) == (6, 0, 3, 4)
    assert [record.layers for record in after.lineage] == [(0, 1, 0, 1)]
    # Warm-up over 2 steps, anew.
    assert [line["learning_rate"] for line in trained][:2] == pytest.approx([0.0015, 0.003])


def test_two_growths_of_one_target_do_not_run_at_once(source: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDING.format(target=str(tmp_path / "grown"))], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CheckpointError, match="another process is writing"):
        _grow(source, tmp_path / "grown", "num_layers=6")
    assert not (tmp_path / "grown").exists()
    holder.kill()
    holder.wait()
    _grow(source, tmp_path / "grown", "num_layers=6")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock_grown", "grown", "source"]


_HOLDING = """
from pathlib import Path
from time import sleep
from growth_megatron.checkpoint.folder.commit import exclusive
with exclusive(Path({target!r})):
    print("held", flush=True)
    sleep(600)
"""


def test_a_growth_onto_another_file_system_is_planned_as_a_copy(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("checked", "link"):
        monkeypatch.setattr(f"growth_megatron.growth.{module}.same_file_system", lambda one, other: False)
    _grow(source, tmp_path / "grown", "num_layers=6", plan=True)
    assert "two file systems, so data are copied, not linked" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for plan in (True, False):
        with pytest.raises(
            CheckpointError, match=r"needs .* where 1000 B are free; .* choose a target on another disk"
        ):
            _grow(source, tmp_path / "grown", "num_layers=6", plan=plan)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_options_are_shown_where_the_growth_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _grow(source, tmp_path / "grown", "hidden_size=16", "shares=uneven", "cancelling_noise=0.5", seed=4)
    how = "split, shares uneven, cancelling_noise 0.5, seed 4"
    assert f"operator         {how}: hidden 8 -> 16" in capsys.readouterr().out
    assert f"{how}: hidden 8 -> 16" in growth_line(read_manifest(tmp_path / "grown").lineage[-1])
