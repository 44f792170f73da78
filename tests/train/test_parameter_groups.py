"""New parameters of a grown model are trained otherwise than old ones, element by element; frozen ones not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.schema import OptimizerConfig
from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from growth_megatron.growth.new_parts import new_mask
from growth_megatron.growth.plan import stage_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.tensors import whole
from growth_megatron.train.metrics import read_metrics
from growth_megatron.train.parameter_groups import update_factors
from tests.command_line import run_command
from tests.conftest import write_growing_config
from tests.train.test_stages import PP2, TP2, _copy_until, _losses, _train

WIDE = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 192}
FROZEN = "decoder.layers.1.mlp.linear_fc1.weight"
GROUPS: dict[str, Any] = {
    "train_only": "new",
    "train_only_steps": 2,
    "new_parameters": {"learning_rate_multiplier": 2, "warmup_steps": 3, "weight_decay": 0.5},
    "freeze": ["decoder.layers.1.mlp.linear_fc1.w*"],
}


def _config(folder: Path, prepared_corpus: Path, optimizer: dict[str, Any], growth: str, **model: Any) -> Path:
    path = write_growing_config(folder, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["schedule"] = {"kind": "constant", "learning_rate": 0.003}
    content["stages"][0]["training"]["steps"] = 2
    grown = {"model": model, "growth": {"operator": growth, "cancelling_noise": 0.0}, "optimizer": optimizer}
    content["stages"][1] |= grown
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _config(tmp_path_factory.mktemp("groups"), prepared_corpus, GROUPS, "split", **WIDE)


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 steps, a growth in width, 4 steps of which 2 train new parameters alone; on one rank, a save every 2 steps."""
    run = tmp_path_factory.mktemp("reference") / "whole"
    assert _train(1, config, [f"run.directory={run}"]) == [0]
    return run


def _changed(run: Path, before: str, after: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each tensor which elements differ between two checkpoints, and which are new."""
    first, second = (DistCheckpoint(run / "checkpoints" / f"step_{name}") for name in (before, after))
    plan = stage_growth(read_manifest(run / "checkpoints" / "step_00000002_grown"))
    assert plan is not None
    return {
        rule.target: (
            first.read(rule.target, whole(rule.shape)) != second.read(rule.target, whole(rule.shape)),
            new_mask(rule, whole(rule.shape)).expand(rule.shape),
        )
        for rule in plan.rules
    }


def test_while_new_parameters_are_trained_alone_no_old_element_changes(reference: Path) -> None:
    for key, (changed, new) in _changed(reference, "00000002_grown", "00000004").items():
        assert not changed[~new].any(), key
        assert key == FROZEN or changed[new].double().mean() > 0.5, key  # embeddings of tokens that were not seen stay


def test_afterwards_all_but_the_frozen_change(reference: Path) -> None:
    for key, (changed, new) in _changed(reference, "00000004", "00000006").items():
        if key == FROZEN:
            assert not changed.any()
        else:
            assert changed[~new].any(), key
            assert changed[new].any(), key


def test_a_run_with_groups_resumes_bitwise(config: Path, reference: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        _copy_until(reference, tmp_path / str(step), step)
    assert _train(1, config, *([f"run.directory={tmp_path / str(step)}"] for step in (2, 4))) == [0, 0]
    for step in (2, 4):
        assert _losses(tmp_path / str(step)) == _losses(reference)


def test_a_run_with_groups_is_the_same_at_other_layouts(config: Path, reference: Path, tmp_path: Path) -> None:
    layouts: dict[str, list[str]] = {"tp2": TP2, "pp2": PP2, "dp2": []}
    runs = [[f"run.directory={tmp_path / name}", *more] for name, more in layouts.items()]
    assert _train(2, config, *runs) == [0, 0, 0]
    expected = [record for record in read_metrics(reference) if record["kind"] == "train"]
    for name in layouts:
        found = [record for record in read_metrics(tmp_path / name) if record["kind"] == "train"]
        for here, there in zip(found, expected, strict=True):
            assert abs(here["loss"] - there["loss"]) <= 1e-5, name
            for key in [key for key in there if key.endswith("_norm")]:
                assert here[key] == pytest.approx(there[key], rel=1e-3), (name, key)


def test_metrics_tell_old_and_new_apart(reference: Path) -> None:
    base, *_, last = [record for record in read_metrics(reference) if record["kind"] == "train"]
    assert "new_grad_norm" not in base
    clipped = min(1.0, last["grad_norm"])
    assert (last["old_grad_norm"] ** 2 + last["new_grad_norm"] ** 2) ** 0.5 == pytest.approx(clipped, rel=1e-4)
    first = next(record for record in read_metrics(reference) if record["kind"] == "train" and record["step"] == 3)
    assert (first["old_grad_norm"], first["old_update_norm"]) == (0, 0)
    assert first["new_update_norm"] > 0
    end = DistCheckpoint(reference / "checkpoints" / "step_00000006")
    plan: GrowthPlan | None = stage_growth(read_manifest(reference / "checkpoints" / "step_00000002_grown"))
    assert plan is not None
    squares = sum(float(end.read(r.target, whole(r.shape)).double().square().sum()) for r in plan.rules)
    assert last["old_weight_norm"] ** 2 + last["new_weight_norm"] ** 2 == pytest.approx(squares, rel=1e-4)


def test_a_multiplier_scales_the_first_update_of_new_parameters_alone(prepared_corpus: Path, tmp_path: Path) -> None:
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    for folder, groups in ((plain, {}), (scaled, {"new_parameters": {"learning_rate_multiplier": 3}})):
        folder.mkdir()
        path = _config(folder, prepared_corpus, {**groups, "weight_decay": 0.1}, "stack", num_layers=4)
        assert _train(1, path, ["stages.grown.training.steps=1"]) == [0]
    one, three = (
        next(record for record in read_metrics(folder / "run") if record["kind"] == "train" and record["step"] == 3)
        for folder in (plain, scaled)
    )
    assert three["new_update_norm"] == pytest.approx(3 * one["new_update_norm"], rel=1e-5)
    assert three["old_update_norm"] == pytest.approx(one["old_update_norm"], rel=1e-5)


def test_factors_are_functions_of_the_stages_step() -> None:
    settings = OptimizerConfig.model_validate(GROUPS)
    found = [update_factors(settings, step) for step in range(4)]
    assert [old for old, _ in found] == [0, 0, 1, 1]
    assert [new for _, new in found] == pytest.approx([2 / 3, 4 / 3, 2, 2])
    assert update_factors(OptimizerConfig(), 0) == (1, 1)


def test_settings_that_would_do_nothing_are_refused_before_the_first_step(config: Path, prepared_corpus: Path) -> None:
    elsewhere = f"run.directory={config.parent / 'refused'}"
    refused = run_command("train", str(config), elsewhere, "optimizer.train_only=new")
    assert refused.code == EXIT_USAGE
    assert "under the stage that grows (stages.NAME.optimizer)" in refused.err
    refused = run_command("train", str(config), elsewhere, "stages.base.optimizer.freeze=[embeding.*]")
    assert refused.code == EXIT_USAGE
    assert "'embeding.*' names no tensor of the model" in refused.err
    refused = run_command("plan", str(config), "stages.grown.optimizer.train_only=all")
    assert refused.code == EXIT_USAGE
    assert "needs train_only: new" in refused.err


def test_the_plan_says_who_is_new_and_how_it_is_trained(config: Path) -> None:
    planned = run_command("plan", str(config))
    assert planned.code == EXIT_OK, planned.printed
    said = " ".join(planned.out.split())
    assert "learning rate x 2" in said
    assert "alone for 2 steps" in said
    assert "not trained: 1 tensor" in said
