"""A run with a masked stage: the loss goes on where it was, any checkpoint of the ramps resumes exactly and is exported
as it acts, and what comes after the masks is an ordinary model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.origin import checkpoint_origin, huggingface_origin
from growth_megatron.commands.export_hf import export_hf
from growth_megatron.commands.growth import grow
from growth_megatron.commands.growth_request import GrowthRequest
from growth_megatron.commands.inspect import describe_checkpoint, render_description
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.errors import EXIT_USAGE, ConfigError, GrowthError
from growth_megatron.growth.configuration import load_config
from growth_megatron.growth.masks import as_it_acts, masked_plan
from growth_megatron.growth.verify import verify_checkpoints
from growth_megatron.model.reference import reference_logits
from growth_megatron.train.plan import plan_run
from tests.command_line import run_command
from tests.conftest import WIDE, write_growing_config
from tests.ranks import run_ranks

RAMP = {"depth": [0, 3], "ffn": [0, 3], "hidden": [2, 5], "heads": [4, 6]}
GROWN, LAST = 4, 16
"""Steps of the masked growth, and of the run's end: it is stacked at 12, and masked again at 14."""


def _write_config(folder: Path, prepared_corpus: Path, ramp: dict[str, Any] | None = None) -> Path:
    content = yaml.safe_load(write_growing_config(folder, prepared_corpus).read_text())
    content["evaluation"] |= {"interval_steps": 2}
    content["stages"] = [
        {"name": "base", "model": {"num_layers": 2}, "training": {"steps": GROWN}},
        {
            "name": "wide",
            "model": WIDE,
            "training": {"steps": 8},
            "growth": {"operator": "masked", "ramp": ramp or RAMP},
        },
        {"name": "deep", "model": {**WIDE, "num_layers": 6}, "training": {"steps": 2}, "growth": {"operator": "stack"}},
        {
            "name": "hop",
            "model": {**WIDE, "num_layers": 6, "ffn_hidden_size": 136},
            "training": {"steps": 2},
            "growth": {"operator": "masked", "ramp": {"ffn": [0, 2]}},
        },
    ]
    path = folder / "masked.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_config(tmp_path_factory.mktemp("masked_stages"), prepared_corpus)


@pytest.fixture(scope="module")
def reference(config: Path) -> Path:
    """The uninterrupted run on one rank."""
    run = config.parent / "whole"
    _train(1, config, [f"run.directory={run}"])
    return run


def _train(ranks: int, config: Path, *runs: list[str]) -> None:
    arguments = {"runs": [{"config": str(config), "overrides": overrides} for overrides in runs]}
    assert run_ranks("tests.workers:train_all", ranks, arguments)[0] == [0] * len(runs)


def _losses(run: Path, kind: str = "train") -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    key = {"train": "loss", "validation": "validation_loss"}[kind]
    return {line["step"]: line[key] for line in lines if line["kind"] == kind}


def _copy_until(run: Path, step: int, name: str) -> Path:
    target = run.with_name(name)
    shutil.copytree(run, target, symlinks=True)
    for checkpoint in (target / "checkpoints").iterdir():
        if int(checkpoint.name.split("_")[1]) > step:
            shutil.rmtree(checkpoint)
    return target


def test_a_masked_growth_keeps_the_validation_loss_and_its_checkpoint_is_verified(reference: Path) -> None:
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    masked, stacked, hop = [line for line in lines if line["kind"] == "growth"]
    assert masked["operator"] == "masked"
    assert masked["optimizer_state"] == "carry"
    for growth in (masked, hop):
        assert growth["validation_loss_after"] == pytest.approx(growth["validation_loss_before"], rel=2e-6)
    assert abs(stacked["validation_loss_after"] - stacked["validation_loss_before"]) > 1e-4
    checks = list(verify_checkpoints(reference / "checkpoints" / f"step_{GROWN:08d}_grown", full=True))
    assert {check.subject: check.outcome for check in checks}["logits"] == "OK"
    assert all(check.outcome == "OK" for check in checks)
    losses = _losses(reference)
    assert list(losses) == list(range(1, LAST + 1))
    assert losses[12] < losses[GROWN] < losses[1]


def test_any_checkpoint_of_the_ramps_resumes_exactly_and_at_other_layouts(config: Path, reference: Path) -> None:
    expected = _losses(reference)
    same = [_copy_until(reference, step, f"from_{step}") for step in (GROWN, 6, 8)]
    _train(1, config, *[[f"run.directory={run}"] for run in same])
    for run in same:
        assert _losses(run) == expected, run.name
        assert _losses(run, "validation") == _losses(reference, "validation"), run.name
    layouts = {
        "tensor": ["parallel={tensor_parallel_size: 2, sequence_parallel: true}"],
        "pipeline": ["parallel.pipeline_parallel_size=2"],
        "data": [],
    }
    others = {name: _copy_until(reference, 6, f"from_6_{name}") for name in layouts}
    _train(2, config, *[[f"run.directory={others[name]}", *layouts[name]] for name in layouts])
    for name, run in others.items():
        losses = _losses(run)
        assert max(abs(losses[step] - expected[step]) for step in expected) <= 2e-5, name


def test_in_mid_ramp_the_exported_model_has_the_live_one_s_loss(reference: Path, tmp_path: Path) -> None:
    checkpoint = reference / "checkpoints" / "step_00000008"
    target = tmp_path / "exported"
    export_hf(str(checkpoint), target)
    origin, exported = checkpoint_origin(checkpoint), huggingface_origin(target)
    share = (64 + 32 * (4 - 2) / 3) / 96
    assert exported.geometry.norm_epsilon == pytest.approx(1e-5 * share)
    assert json.loads((target / "config.json").read_text())["rms_norm_eps"] == exported.geometry.norm_epsilon
    (found,) = run_ranks("tests.growth.live_workers:loss_of", 1, {"checkpoint": str(checkpoint)})
    tokens = torch.tensor(found["tokens"])
    logits = reference_logits(*as_it_acts(origin), tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    assert loss == pytest.approx(found["loss"], rel=1e-6)
    vocabulary = exported.geometry.vocab_size  # the padding is not exported
    of_export = reference_logits(exported.tensors, exported.geometry, tokens[:, :-1])
    assert torch.equal(of_export[..., :vocabulary], logits[..., :vocabulary])
    trainable = reference_logits(origin.tensors, origin.geometry, tokens[:, :-1])
    assert (trainable - logits).abs().max() > 0.01, "the masks change nothing, so nothing was compared"


def test_after_the_ramps_the_checkpoint_is_an_ordinary_one(reference: Path) -> None:
    opened = checkpoint_origin(reference / "checkpoints" / "step_00000012")
    assert as_it_acts(opened) == (opened.tensors, opened.geometry)
    assert masked_plan(read_manifest(reference / "checkpoints" / "step_00000008")) is not None
    assert masked_plan(read_manifest(reference / "checkpoints" / "step_00000010")) is None


def test_a_model_behind_masks_is_not_grown_and_the_advice_works(reference: Path, tmp_path: Path) -> None:
    checkpoint = str(reference / "checkpoints" / "step_00000008")
    request = GrowthRequest({"num_layers": 8}, GrowthConfig(operator="stack"))
    with pytest.raises(GrowthError, match="masks are not open yet.* export it with export-hf"):
        grow(checkpoint, str(tmp_path / "grown"), request, materialize=False)
    export_hf(checkpoint, tmp_path / "exported")
    grow(str(tmp_path / "exported"), str(tmp_path / "grown"), request, materialize=False)
    masked = GrowthRequest({"num_layers": 8}, GrowthConfig(operator="masked"))
    with pytest.raises(GrowthError, match="a Hugging Face folder has none; write a checkpoint instead, or use random"):
        grow(str(reference), f"hf:{tmp_path / 'folder'}", masked, materialize=False)


def test_inspect_says_how_far_the_masks_are_open(reference: Path) -> None:
    description = describe_checkpoint(reference / "checkpoints" / "step_00000006")
    assert description["masks"]["open"] == pytest.approx({"depth": 2 / 3, "ffn": 2 / 3, "hidden": 0.0, "heads": 0.0})
    assert description["masks"]["norm_epsilon"] == pytest.approx(1e-5 * 64 / 96)
    text = "open so far: depth 0.667, ffn 0.667, hidden 0, heads 0; with them norm epsilon 6.667e-06"
    assert text in render_description(description)
    assert describe_checkpoint(reference / "checkpoints" / "step_00000012")["masks"] is None


def test_other_ramps_than_those_of_the_growth_are_refused_on_resuming_and_the_advice_works(
    config: Path, reference: Path
) -> None:
    run = _copy_until(reference, 6, "other_ramps")
    changed = "stages.wide.growth.ramp.heads=[4, 8]"
    ramps = "depth over steps 0 to 3, ffn over steps 0 to 3, hidden over steps 2 to 5, heads over steps 4 to"
    refused = run_command("train", str(config), f"run.directory={run}", changed)
    assert refused.code == EXIT_USAGE
    assert f"open {ramps} 6, the configuration says {ramps} 8; set growth.ramp" in refused.printed
    before = run / "checkpoints" / f"step_{GROWN:08d}"
    _train(1, config, [f"run.directory={run.with_name('again')}", f"checkpoint.resume={before}", changed])
    hand = config.parent / "by_hand"
    sizes = [f"{key}={size}" for key, size in WIDE.items()]
    grown = run_command("grow", str(before), str(hand), "--operator", "masked", "--set", *sizes, f"ramp={RAMP}")
    assert "masked, ramp {depth: [0, 3], ffn: [0, 3], hidden: [2, 5], heads: [4, 6]}" in grown.printed
    alone = yaml.safe_load(config.read_text())
    alone["stages"] = [{"name": "wide", "model": WIDE, "training": {"steps": 5}}]
    path = config.with_name("alone.yaml")
    path.write_text(yaml.safe_dump(alone))
    overrides = [f"run.directory={run.with_name('longer')}", f"checkpoint.resume={hand}"]
    refused = run_command("train", str(path), *overrides)
    assert refused.code == EXIT_USAGE
    assert "but stage wide has 5 steps; give it 6 or more (stages.wide.training.steps)" in refused.printed
    _train(1, path, [*overrides, "stages.wide.training.steps=6"])


def test_the_plan_says_when_masks_open_and_a_stage_that_ends_before_is_refused(
    config: Path, prepared_corpus: Path, tmp_path: Path
) -> None:
    grown_by = plan_run(load_config(config).config).stages[1].grown_by
    assert grown_by is not None
    ramps = "depth over steps 0 to 3, ffn over steps 0 to 3, hidden over steps 2 to 5, heads over steps 4 to 6"
    assert grown_by.endswith(f"optimizer state carry, masks open: {ramps}")
    late = _write_config(tmp_path, prepared_corpus, {**RAMP, "heads": [4, 9]})
    with pytest.raises(ConfigError) as caught:
        load_config(late)
    assert "growth.ramp.heads: " in str(caught.value)
    assert "[4, 9] ends after the stage, which has 8 steps; end it by step 8, or make the stage longer" in str(
        caught.value
    )
    for remedy in ("stages.wide.growth.ramp.heads=[4, 8]", "stages.wide.training.steps=9"):
        load_config(late, [remedy])
