"""``import-megatron``: what megatron-core saved by default goes on as if it had never left, and grows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.manifest import read_manifest, validate_checkpoint
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, read_common
from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from growth_megatron.growth.verify import verify_checkpoints
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import MASTER_PREFIX, MOMENT_PREFIXES, split_state_key
from tests.checkpoint.megatron_workers import STEPS
from tests.command_line import run_commands
from tests.conftest import VOCABULARY
from tests.ranks import run_ranks
from tests.workers import BATCH, SMALL, stage_of

MODEL = {**SMALL, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
MODEL |= {"ffn_hidden_size": 48, "vocab_size": VOCABULARY}
GEOMETRY = stage_of({}, MODEL).model

# (layout, precision, optimizer)
SAVED: dict[str, tuple[dict[str, Any], str, str]] = {
    "distributed": ({}, "fp32", "fully_reshardable"),
    "distributed_bf16": ({}, "bf16", "fully_reshardable"),
    "plain": ({}, "fp32", "plain"),
    "plain_bf16": ({}, "bf16", "plain"),
    "flat": ({}, "bf16", "dp_reshardable"),
    "bare": ({}, "fp32", "fully_reshardable"),  # without Megatron-LM's arguments
    "distributed_tp2": ({"tensor_parallel_size": 2}, "fp32", "fully_reshardable"),
    "plain_pp2": ({"pipeline_parallel_size": 2}, "bf16", "plain"),
}
RESUMABLE = [name for name in SAVED if name not in ("flat", "bare")]
SETTINGS = [
    "num_attention_heads=4",
    "rope_base=10000",
    "norm_epsilon=1e-5",
    f"sequence_length={SMALL['sequence_length']}",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Folder with ``NAME`` for each of ``SAVED``, and the losses of the two steps after the save."""
    folder = tmp_path_factory.mktemp("megatron")
    losses: dict[str, list[float]] = {}
    for ranks in (1, 2):
        names = [name for name, (layout, _, _) in SAVED.items() if max([*layout.values(), 1]) == ranks]
        cases = [
            {
                "layout": SAVED[name][0],
                "precision": SAVED[name][1],
                "kind": SAVED[name][2],
                "folder": str(folder / name),
                "model": MODEL,
                "with_args": name != "bare",
            }
            for name in names
        ]
        found = run_ranks("tests.checkpoint.megatron_workers:save_and_go_on", ranks, {"cases": cases})[0]
        losses |= dict(zip(names, found, strict=True))
    return folder, losses


@pytest.fixture(scope="module")
def imported(saved: tuple[Path, dict[str, list[float]]]) -> Path:
    """Folder with the imported checkpoint of each of ``RESUMABLE``."""
    folder = saved[0] / "imported"
    for name in RESUMABLE:
        assert main(["import-megatron", str(saved[0] / name), str(folder / name)]) == EXIT_OK
    return folder


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}])
def test_the_next_steps_are_those_of_going_on(
    saved: tuple[Path, dict[str, list[float]]], imported: Path, layout: dict[str, int]
) -> None:
    cases = [
        {"folder": str(imported / name), "layout": layout, "precision": SAVED[name][1], "model": MODEL}
        for name in RESUMABLE
    ]
    ranks = max([*layout.values(), 1])
    losses = run_ranks("tests.checkpoint.megatron_workers:losses_after_loading", ranks, {"cases": cases})[0]
    for number, name in enumerate(RESUMABLE):
        # The first loss is that of the weights, the second follows a step with moments and Adam's step.
        tolerance = 1e-6 if SAVED[name][1] == "fp32" else 2e-3
        assert losses[number] == pytest.approx(saved[1][name], abs=tolerance), name


def test_negative_control_fresh_moments_change_the_second_step(
    saved: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    assert main(["import-megatron", str(saved[0] / "distributed"), str(tmp_path / "c"), "--weights-only"]) == EXIT_OK
    case = {"folder": str(tmp_path / "c"), "layout": {}, "precision": "fp32", "model": MODEL}
    ((first, second),) = run_ranks("tests.checkpoint.megatron_workers:losses_after_loading", 1, {"cases": [case]})[0]
    expected = saved[1]["distributed"]
    assert first == pytest.approx(expected[0], abs=1e-6)
    assert abs(second - expected[1]) > 1e-4


@pytest.mark.parametrize("name", RESUMABLE)
def test_nothing_but_names_is_new(saved: tuple[Path, dict[str, list[float]]], imported: Path, name: str) -> None:
    path = imported / name
    assert validate_checkpoint(path, full=True) is None
    manifest = read_manifest(path)
    assert (manifest.step, manifest.stage, manifest.stage_step) == (STEPS, 0, 0)
    assert manifest.consumed_samples == STEPS * BATCH
    assert (manifest.consumed_tokens, manifest.flops) == (STEPS * BATCH * SMALL["sequence_length"], 1e9)
    sizes = {"vocab_size": GEOMETRY.padded_vocab_size}  # which entries pad it is not said
    assert manifest.geometry == GEOMETRY.model_copy(update=sizes)
    ours, theirs = DistCheckpoint(path), DistCheckpoint(saved[0] / name)
    assert len(ours.keys()) == 4 * len(tensor_shapes(GEOMETRY))
    for key in ours.keys():
        prefix, weight = split_state_key(key)
        names = [key]
        if prefix == MASTER_PREFIX:  # of the plain optimizer; in float32 the weight itself
            names += [f"optimizer.state.fp32_param.{weight}", weight]
        stored = next(name for name in names if name in theirs.keys())
        assert torch.equal(ours.read(key), theirs.read(stored)), key
    data = list(path.glob("__*.distcp"))
    assert data
    assert all(file.stat().st_nlink > 1 for file in data)
    steps = {group["step"] for group in read_common(path)["optimizer"]["optimizer"]["param_groups"]}
    assert steps == {STEPS}


def test_it_is_trained_grown_inspected_verified_and_exported(
    imported: Path,
    growing_config: Path,
    prepared_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = str(imported / "distributed")
    deeper, wider = tmp_path / "deeper", tmp_path / "wider"
    content = yaml.safe_load(growing_config.read_text())
    content["stages"] = [{"name": "base", "model": {"num_layers": 4}, "training": {"steps": 2}}]
    content["model"] |= {"hidden_size": 32, "ffn_hidden_size": 48, "norm_epsilon": 1e-5}
    growing_config.write_text(yaml.safe_dump(content))
    carry = ["--optimizer-state", "carry"]
    outcomes = run_commands(
        [
            ["grow", source, str(deeper), "--set", "num_layers=4", *carry],
            ["grow", source, str(wider), "--set", "hidden_size=64", "num_attention_heads=8", *carry],
            ["train", str(growing_config), f"checkpoint.resume={deeper}"],
            ["train", f"{source}/train.yaml", f"data.train.0.path={prepared_corpus / 'train'}", "training.steps=2",
             "schedule.warmup_steps=1", f"run.directory={tmp_path / 'shallow'}"],
        ]
    )  # fmt: skip
    assert [outcome.code for outcome in outcomes] == [EXIT_OK] * 4, outcomes
    assert " linked" in outcomes[0].out
    for grown in (deeper, wider):
        checks = list(verify_checkpoints(grown, full=True))
        assert {check.outcome for check in checks if check.subject != "logits"} == {"OK"}, checks
    assert read_manifest(tmp_path / "shallow" / "latest").step == STEPS + 2
    capsys.readouterr()
    assert main(["inspect", source, "--json"]) == EXIT_OK
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert sum(row["count"] for row in tensors) == 4 * len(tensor_shapes(GEOMETRY))
    pytest.importorskip("transformers")
    assert main(["export-hf", source, str(tmp_path / "hf"), "--verify"]) == EXIT_OK


def test_what_the_checkpoint_does_not_say_is_asked_for(
    saved: tuple[Path, dict[str, list[float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import-megatron", str(saved[0] / "bare"), str(tmp_path / "c")]
    assert main(command) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "has no args in common.pt; add --set num_attention_heads=... rope_base=... norm_epsilon=..." in said
    assert main([*command, "--set", "num_heads=4"]) == EXIT_USAGE
    assert "keys: num_attention_heads" in capsys.readouterr().err
    for setting in ("num_attention_heads=twelve", "norm_epsilon=true", "rotary_base=[1]"):
        assert main([*command, "--set", setting]) == EXIT_USAGE
        assert "is not a number" in capsys.readouterr().err
    assert main([*command, "--set", *SETTINGS, f"vocab_size={VOCABULARY}"]) == EXIT_OK
    manifest = read_manifest(tmp_path / "c")
    assert (manifest.geometry, manifest.step) == (GEOMETRY, STEPS)
    assert main([*command, "--set", *SETTINGS]) == EXIT_USAGE
    assert "exists; name a new folder" in capsys.readouterr().err


def test_state_of_one_layout_is_refused_and_weights_can_go_alone(
    saved: tuple[Path, dict[str, list[float]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["import-megatron", str(saved[0] / "flat"), str(tmp_path / "c")]
    assert main(command) == EXIT_USAGE
    said = capsys.readouterr().err
    for words in ("dp_reshardable", "--dist-ckpt-optim-fully-reshardable", "--weights-only"):
        assert words in said
    assert not (tmp_path / "c").exists()
    assert main([*command, "--weights-only"]) == EXIT_OK
    ours, theirs = DistCheckpoint(tmp_path / "c"), DistCheckpoint(saved[0] / "flat")
    for key in tensor_shapes(GEOMETRY):
        assert torch.equal(ours.read(key), theirs.read(key))
        assert torch.equal(ours.read(MASTER_PREFIX + key), theirs.read(key).float())
        assert not any(ours.read(prefix + key).any() for prefix in MOMENT_PREFIXES)


@pytest.mark.parametrize(("argument", "value"), [("normalization", "LayerNorm"), ("swiglu", False), ("num_experts", 8)])
def test_another_model_is_refused_by_its_arguments(
    saved: tuple[Path, dict[str, list[float]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    value: Any,
) -> None:
    shutil.copytree(saved[0] / "plain", tmp_path / "other")
    common = read_common(tmp_path / "other")
    setattr(common["args"], argument, value)
    torch.save(common, tmp_path / "other" / "common.pt")
    assert main(["import-megatron", str(tmp_path / "other"), str(tmp_path / "c")]) == EXIT_USAGE
    assert f"{argument} is {value!r}, allowed:" in capsys.readouterr().err


def test_a_folder_of_checkpoints_and_a_checkpoint_of_this_library_are_named(
    saved: tuple[Path, dict[str, list[float]]], imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved[0] / "plain", tmp_path / "run" / "iter_0000003")
    assert main(["import-megatron", str(tmp_path / "run"), str(tmp_path / "c")]) == EXIT_USAGE
    assert f"name one of them, such as {tmp_path / 'run' / 'iter_0000003'}" in capsys.readouterr().err
    assert main(["import-megatron", str(imported / "plain"), str(tmp_path / "c")]) == EXIT_USAGE
    assert "is a checkpoint of this library already" in capsys.readouterr().err
