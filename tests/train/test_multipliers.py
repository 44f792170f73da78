"""Multipliers of learning rate, weight decay and epsilon reach each parameter at every layout, survive a resume, and
make a run grown in width follow the ungrown one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from growth_megatron.checkpoint.folder.manifest import Multipliers, read_manifest
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.errors import CheckpointError
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import whole
from growth_megatron.train.engine import Engine
from tests.conftest import write_growing_config
from tests.ranks import run_ranks
from tests.train.multiplier_workers import BASE, GROWN, OPTIMIZER, RATE, kind_of, multipliers_of, stage_at

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
PP2_VPP2 = {**PP2, "virtual_pipeline_parallel_size": 2}
DP2: dict[str, Any] = {}
TIED = {"tie_embeddings": True}
FOUR_TIED = {**BASE, **TIED, "num_layers": 4}

TOLERANCE = 1e-5
"""Nats, over 25 steps in fp32; the exact rule stays within 4e-7 and the mildest negative control drifts by 1.5e-3."""


LEFT_OUT = ("moments", "norm", "multipliers", "learning_rate", "weight_decay", "epsilon")


class Runs:
    """Losses of the ungrown and the grown runs, by name and what was left out."""

    def __init__(self, folder: Path) -> None:
        cases = [{"name": "untied"}, {"name": "tied"}, *({"name": "untied", "without": name} for name in LEFT_OUT)]
        given = [{"folder": str(folder), "layout": {}, **case} for case in cases]
        arguments = {"folder": str(folder), "cases": given}
        self.folder = folder
        self.ungrown, self.grown = run_ranks("tests.train.multiplier_workers:ungrown_and_grown", 1, arguments)[0]
        self.drifts = {
            (case["name"], case.get("without", "")): self.drift(case["name"], losses)
            for case, losses in zip(cases, self.grown, strict=True)
        }

    def drift(self, name: str, losses: list[float]) -> float:
        """Largest difference of loss between a grown run and the ungrown one."""
        return max(abs(a - b) for a, b in zip(losses, self.ungrown[name], strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_run_grown_in_width_follows_the_ungrown_one(runs: Runs, name: str) -> None:
    assert runs.drifts[name, ""] <= TOLERANCE
    assert runs.ungrown[name][-1] < runs.ungrown[name][0] - 0.1, "nothing is learned, so nothing could drift"


@pytest.mark.parametrize("without", LEFT_OUT)
def test_negative_control_what_is_left_out_is_noticed(runs: Runs, without: str) -> None:
    assert runs.drifts["untied", without] > 50 * TOLERANCE
    first = runs.grown[2 + LEFT_OUT.index(without)][0]
    assert first == pytest.approx(runs.ungrown["untied"][0], abs=TOLERANCE), "and not by the weights, which are exact"


def test_a_run_grown_in_width_follows_the_ungrown_one_at_other_layouts(runs: Runs) -> None:
    cases = [{"name": "untied", "layout": TP2}, {"name": "tied", "layout": PP2}, {"name": "untied", "layout": DP2}]
    given = [{"folder": str(runs.folder), **case} for case in cases]
    grown = run_ranks("tests.train.multiplier_workers:grown_runs", 2, {"cases": given})[0]
    for case, losses in zip(cases, grown, strict=True):
        assert runs.drift(str(case["name"]), losses) <= TOLERANCE, case


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_width_operator_gives_the_tensors_and_multipliers_of_the_rule_by_hand(runs: Runs, name: str) -> None:
    tie = {"tie_embeddings": name == "tied"}
    source, target = (stage_at({}, {**model, **tie}).model for model in (BASE, GROWN))
    growth = GrowthConfig(operator="split", optimizer_state="carry", multipliers=True)
    plan = plan_growth(source, target, growth)
    assert plan.multipliers == multipliers_of(tied=name == "tied")
    by_hand = DistCheckpoint(runs.folder / f"{name}_grown_1_{['untied', 'tied'].index(name)}")
    by_plan = GrownSource(DistCheckpoint(runs.folder / name), plan, "carry")
    assert sorted(by_plan.keys()) == sorted(by_hand.keys())
    for key in by_plan.keys():
        region = whole(by_plan.spec(key).shape)
        assert torch.equal(by_plan.read(key, region), by_hand.read(key, region)), key


def _distinct_multipliers(model: dict[str, Any]) -> dict[str, Multipliers]:
    """One combination for each kind of tensor; every second differs from the one before in epsilon alone."""
    kinds = sorted({kind_of(key) for key in tensor_shapes(stage_at({}, model).model)})
    return {
        kind: Multipliers(learning_rate=1 + number // 2, weight_decay=0.5 + number // 2, epsilon=2.0 + number)
        for number, kind in enumerate(kinds)
        if kind != "decoder.layers.*.mlp.linear_fc2.weight"  # which stays in the default group
    }


ALONE: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, BASE)]
ON_TWO: list[tuple[dict[str, Any], dict[str, Any]]] = [(TP2, BASE), (PP2_VPP2, FOUR_TIED), (DP2, BASE)]


@pytest.mark.parametrize(("ranks", "cases"), [(1, ALONE), (2, ON_TWO)])
def test_loaded_groups_are_the_ones_written(
    ranks: int, cases: list[tuple[dict[str, Any], dict[str, Any]]], tmp_path: Path
) -> None:
    """With multipliers each tensor has its settings on every rank; without, a fresh file trains as a fresh model."""
    given = [
        (layout, model, {key: value.model_dump() for key, value in _distinct_multipliers(model).items()})
        for layout, model in cases
    ]
    arguments = {"folder": str(tmp_path), "cases": given}
    per_rank = run_ranks("tests.train.multiplier_workers:fresh_files", ranks, arguments)
    for number, (layout, model) in enumerate(cases):
        _check_settings([rank[number][0] for rank in per_rank], layout, model)
        loaded, fresh = per_rank[0][number][1]
        assert loaded == fresh, layout


def _check_settings(results: list[dict[str, Any]], layout: dict[str, Any], model: dict[str, Any]) -> None:
    """After a save and a load too, where groups that differ in epsilon alone are one to megatron-core."""
    multipliers, geometry = _distinct_multipliers(model), stage_at({}, model).model
    expected = {}
    for key, shape in tensor_shapes(geometry).items():
        factors = multipliers.get(kind_of(key), Multipliers())
        decay = 0.0 if len(shape) == 1 else OPTIMIZER.weight_decay * factors.weight_decay
        expected[key] = [RATE * factors.learning_rate, decay, OPTIMIZER.epsilon * factors.epsilon]
    if geometry.tie_embeddings and layout != {}:  # the last stage has a copy
        expected["embedding.word_embeddings.weight (output)"] = expected["embedding.word_embeddings.weight"]
    found: dict[str, list[float]] = {}
    for result in results:
        assert all(found.get(key, value) == value for key, value in result["settings"].items())
        found |= result["settings"]
    assert found == expected, layout
    written, saved = ([_identity(group) for group in results[0][name]] for name in ("written", "saved"))
    assert written == saved


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    names = ("lr_mult", "wd_mult", "eps_mult", "is_expert_parallel", "is_decoupled_lr", "default_config")
    return tuple(group.get(name) for name in names)


def test_an_engine_refuses_multipliers_of_no_tensor() -> None:
    with pytest.raises(CheckpointError, match="output_layer.weight, which the model does not have"):
        Engine(stage_at({}, {**BASE, **TIED}), {"output_layer.weight": Multipliers()})


def _train(ranks: int, *runs: tuple[Path | str, ...]) -> None:
    """``runs``: a configuration and its overrides."""
    arguments = {"runs": [{"config": str(config), "overrides": overrides} for config, *overrides in runs]}
    assert run_ranks("tests.workers:train_all", ranks, arguments)[0] == [0] * len(runs)


def _losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def _copy_until(run: Path, target: Path, step: int) -> Path:
    shutil.copytree(run, target, symlinks=True)
    for checkpoint in (target / "checkpoints").iterdir():
        if checkpoint.name > f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    return target


def _write_configs(folder: Path, prepared_corpus: Path) -> tuple[Path, Path]:
    """10 steps of a small model; and 4 of it, 6 of it grown x2 in width, 2 of that stacked."""
    content = yaml.safe_load(write_growing_config(folder, prepared_corpus).read_text())
    content |= {"schedule": {"kind": "constant", "learning_rate": RATE}}
    content |= {"optimizer": {"clip_grad": 0.0, "epsilon": 1e-5}}
    content["checkpoint"]["interval_steps"] = 4
    small: dict[str, Any] = {"num_layers": 2}
    wide = {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 192,
    }
    split = {"operator": "split", "optimizer_state": "carry", "multipliers": True}
    stack = {"operator": "stack", "optimizer_state": "carry"}
    stages = {
        "ungrown": [{"name": "base", "model": small, "training": {"steps": 10}}],
        "grown": [
            {"name": "base", "model": small, "training": {"steps": 4}},
            {"name": "wide", "model": wide, "training": {"steps": 6}, "growth": split},
            {"name": "deep", "model": {**wide, "num_layers": 4}, "training": {"steps": 2}, "growth": stack},
        ],
    }
    for name, listed in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**content, "stages": listed}, sort_keys=False))
    return folder / "ungrown.yaml", folder / "grown.yaml"


def test_a_run_that_grows_keeps_its_multipliers_over_resumes_at_any_layout_and_the_next_growth(
    prepared_corpus: Path, tmp_path: Path
) -> None:
    small, growing = _write_configs(tmp_path, prepared_corpus)
    ungrown, whole_run = tmp_path / "ungrown", tmp_path / "whole"
    _train(1, (small, f"run.directory={ungrown}"), (growing, f"run.directory={whole_run}"))
    expected = _losses(whole_run)
    assert max(abs(loss - expected[step]) for step, loss in _losses(ungrown).items()) <= TOLERANCE
    for step in ("00000004_grown", "00000008", "00000010", "00000010_grown", "00000012"):
        assert read_manifest(whole_run / "checkpoints" / f"step_{step}").multipliers == multipliers_of(tied=False), step
    assert read_manifest(whole_run / "checkpoints" / "step_00000004").multipliers == {}
    assert (whole_run / "metrics.jsonl").read_text().count("multiplied by 1, 1, 0.5: embedding.word_embeddings") == 2
    assert "multiplied by" not in (ungrown / "metrics.jsonl").read_text()

    same, tensor, pipeline = (_copy_until(whole_run, tmp_path / name, 8) for name in ("same", "tensor", "pipeline"))
    _train(1, (growing, f"run.directory={same}"))
    assert _losses(same) == expected
    _train(
        2,
        (growing, f"run.directory={tensor}", "parallel.tensor_parallel_size=2"),
        (growing, f"run.directory={pipeline}", "parallel.pipeline_parallel_size=2"),
    )
    for run in (tensor, pipeline):
        losses = _losses(run)
        assert max(abs(losses[step] - expected[step]) for step in expected) <= TOLERANCE, run.name
