"""A run with a learned growth: the loss falls while maps are learned, what is consumed counts, a phase that is ended
goes on to the same result, other layouts learn the same, and the maps on the disk give the grown weights again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from growth_megatron.checkpoint.folder.manifest import GrowthRecord, read_manifest
from growth_megatron.checkpoint.huggingface.safetensors_file import packed
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.errors import EXIT_NEXT_LAYOUT, EXIT_OK, EXIT_STOPPED_EARLY, EXIT_USAGE, ConfigError
from growth_megatron.growth.configuration import load_config
from growth_megatron.growth.learned import MAPS_NAME, read_maps
from growth_megatron.growth.verify import verify_checkpoints
from growth_megatron.train.learning import FOLDER
from growth_megatron.train.plan import plan_run
from tests.command_line import run_command
from tests.conftest import WIDE, write_growing_config
from tests.growth.in_memory import everything
from tests.ranks import run_ranks

BASE_STEPS, LEARN_STEPS, ENDS_AT, SAVES = 8, 10, 6, 4
LEARN = {
    "steps": LEARN_STEPS,
    "schedule": {"learning_rate": 0.01, "warmup_steps": 2},
    "save_interval_steps": SAVES,
    "global_batch_size": 4,
}


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned_stages")
    content = yaml.safe_load(write_growing_config(folder, prepared_corpus).read_text())
    content["checkpoint"] = {"keep_last": 100}
    content["stages"] = [
        {"name": "base", "model": {"num_layers": 2}, "training": {"steps": BASE_STEPS}},
        {
            "name": "wide",
            "model": WIDE,
            "training": {"steps": 3, "micro_batch_size": 2},
            "growth": {"operator": "learn", "learn": LEARN},
        },
    ]
    path = folder / "learned.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def codes(config: Path) -> dict[str, Any]:
    runs = {
        name: [f"run.directory={config.parent / name}"]
        for name in ("whole", "killed", "damaged", "stopped", "diverged")
    }
    arguments = {"config": str(config), "runs": runs, "step": ENDS_AT}
    found: dict[str, Any] = run_ranks("tests.train.learning_workers:ended_and_gone_on", 1, arguments)[0]
    assert found["whole"] == EXIT_OK
    return found


@pytest.fixture(scope="module")
def whole(config: Path, codes: dict[str, Any]) -> Path:
    """The uninterrupted run on one rank."""
    return config.parent / "whole"


def _grown(run: Path) -> Path:
    return run / "checkpoints" / f"step_{BASE_STEPS:08d}_grown"


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def _losses(run: Path) -> list[tuple[Any, ...]]:
    learned = [(line["phase_step"], line["loss"], line["grad_norm"]) for line in _records(run, "learn")]
    return [*learned, *((line["step"], line["loss"], line["grad_norm"]) for line in _records(run, "train"))]


def test_the_loss_falls_while_maps_are_learned_and_training_goes_on_from_there(whole: Path) -> None:
    (grown,) = [line["message"] for line in _records(whole, "event") if line["event"] == "grow"]
    before, after = (float(part) for part in grown.partition("validation loss ")[2].partition(",")[0].split(" -> "))
    (record,) = _records(whole, "growth")
    assert after < before - 0.1
    assert record["validation_loss_after"] == pytest.approx(after, abs=1e-4), "what is written is not what was learned"
    assert record["optimizer_state"] == "reset"
    assert [line["phase_step"] for line in _records(whole, "learn")] == list(range(1, LEARN_STEPS + 1))
    assert [line["step"] for line in _records(whole, "train")] == list(range(1, BASE_STEPS + 4))


def test_samples_tokens_and_flops_of_the_phase_count_and_its_steps_do_not(config: Path, whole: Path) -> None:
    before, after = (read_manifest(path) for path in (_grown(whole).with_name(f"step_{BASE_STEPS:08d}"), _grown(whole)))
    assert (after.step, after.stage, after.stage_step) == (BASE_STEPS, 1, 0)
    assert after.consumed_samples - before.consumed_samples == 4 * LEARN_STEPS
    assert after.consumed_tokens - before.consumed_tokens == 4 * 32 * LEARN_STEPS
    plan = plan_run(load_config(config).config, 1)
    learning = plan.stages[1].learning
    assert learning is not None
    assert after.flops - before.flops == pytest.approx(learning.flops)
    assert 0 < learning.map_flops < learning.flops
    last = read_manifest(whole / "latest")
    assert last.consumed_tokens == plan.tokens
    assert last.flops == pytest.approx(plan.flops)
    assert last.flops_6nd == pytest.approx(plan.flops_6nd)


def test_a_phase_that_was_killed_or_stopped_goes_on_to_the_same_result(
    config: Path, codes: dict[str, Any], whole: Path
) -> None:
    assert codes["killed"] == "died"
    assert codes["stopped"] == EXIT_STOPPED_EARLY
    for name in ("killed", "damaged", "stopped", "diverged"):
        run = config.parent / name
        assert codes[f"{name} again"] == EXIT_OK
        assert _losses(run) == _losses(whole), name
        assert (_grown(run) / MAPS_NAME).read_bytes() == (_grown(whole) / MAPS_NAME).read_bytes()
        assert not (run / FOLDER).exists(), "what was kept of the phase is left behind"
    resumed = {
        name: [line["message"] for line in _records(config.parent / name, "event") if line["event"] == "learn"]
        for name in ("killed", "damaged", "stopped")
    }
    assert f"steps 0 to {LEARN_STEPS}" in resumed["damaged"][-1]
    events = {line["event"]: line["message"] for line in _records(config.parent / "damaged", "event")}
    assert "is damaged and not used" in events["damaged"]
    assert f"steps {SAVES} to {LEARN_STEPS}" in resumed["killed"][-1]
    assert f"steps {ENDS_AT + 1} to {LEARN_STEPS}" in resumed["stopped"][-1]  # the ranks agree in the next step


def test_a_gradient_that_is_not_finite_ends_the_phase_with_advice(codes: dict[str, Any]) -> None:
    assert f"the gradient norm is nan at step {ENDS_AT} of learning the maps of stage wide" in codes["diverged"]
    assert "with a lower stages.wide.growth.learn.schedule.learning_rate" in codes["diverged"]


def test_another_world_size_takes_over_before_the_phase_and_learns_the_same(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name != f"step_{BASE_STEPS:08d}":
            shutil.rmtree(checkpoint)
    layout = ["stages.wide.parallel={tensor_parallel_size: 2, sequence_parallel: true}"]
    overrides = {"config": str(config), "overrides": [f"run.directory={run}", *layout]}
    assert run_command("train", str(config), *overrides["overrides"]).code == EXIT_NEXT_LAYOUT
    assert not _grown(run).exists()
    assert "stage wide needs 2 ranks, here are 1" in _records(run, "event")[-1]["message"]
    said = run_ranks("tests.train.learning_workers:faulty_then_sound", 2, {**overrides, "step": ENDS_AT})
    faulty = (
        f"ranks [1] have other maps than rank 0 after step {2 * SAVES} of learning: a device or its memory is faulty"
    )
    assert all(faulty in text for text in said)
    assert (
        f"steps {SAVES} to {LEARN_STEPS}"
        in [line for line in _records(run, "event") if line["event"] == "learn"][-1]["message"]
    ), "what differed was saved"
    for (_, here, _), (_, there, _) in zip(_losses(run), _losses(whole), strict=True):
        assert abs(here - there) <= 1e-5
    ours, alone = (read_maps(_grown(path))[0] for path in (run, whole))
    assert max((ours[name] - alone[name]).abs().max().item() for name in alone) <= 1e-5


def test_the_grown_checkpoint_is_what_source_and_maps_give_and_other_maps_are_noticed(
    whole: Path, tmp_path: Path
) -> None:
    checks = {check.subject: check for check in verify_checkpoints(_grown(whole), full=True)}
    assert {name: checks[name].outcome for name in ("files", "plan", "tensors", "optimizer")} == dict.fromkeys(
        ("files", "plan", "tensors", "optimizer"), "OK"
    )
    maps, sha256 = read_maps(_grown(whole))
    assert read_manifest(_grown(whole)).lineage[-1].maps_sha256 == sha256
    # A growth whose record and files are sound, but whose weights are those of other maps.
    changed = {**maps, "ffn": maps["ffn"] + 1e-4 * torch.eye(*maps["ffn"].shape)}
    other = tmp_path / "other.safetensors"
    other.write_bytes(packed(changed))
    source, sizes = str(_grown(whole).with_name(f"step_{BASE_STEPS:08d}")), [f"{k}={v}" for k, v in WIDE.items()]
    target = tmp_path / "target"
    arguments = ["--operator", "learn", "--seed", "3", "--set", *sizes]
    assert run_command("grow", source, str(target), *arguments, "--maps", str(other)).code == EXIT_OK
    assert all(check.outcome != "FAILED" for check in verify_checkpoints(target))
    (target / MAPS_NAME).write_bytes((_grown(whole) / MAPS_NAME).read_bytes())
    verified = run_command("verify", str(target), "--full")
    assert verified.code != EXIT_OK
    assert MAPS_NAME in verified.printed


def test_maps_serve_a_second_growth_and_without_any_the_way_to_them_is_named(whole: Path, tmp_path: Path) -> None:
    source, sizes = str(_grown(whole).with_name(f"step_{BASE_STEPS:08d}")), [f"{k}={v}" for k, v in WIDE.items()]
    arguments = ["grow", source, str(tmp_path / "again"), "--operator", "learn", "--set", *sizes]
    refused = run_command(*arguments)
    assert refused.code == EXIT_USAGE
    assert (
        "learn needs maps, which a run learns: give the growth to a stage (growth: {operator: learn})"
        in refused.printed
    )
    assert "with --maps" in refused.printed
    done = run_command(*arguments, "--maps", str(_grown(whole)))
    assert done.code == EXIT_OK
    assert (
        "learned maps of the source's"
        in run_command(*arguments[:2], *arguments[3:], "--maps", str(_grown(whole)), "--plan").printed
    )
    first, second = (everything(DistCheckpoint(path)) for path in (_grown(whole), tmp_path / "again"))
    for key, values in first.items():
        torch.testing.assert_close(second[key], values, rtol=2e-7, atol=1e-12)
    folder = run_command(*arguments[:2], f"hf:{tmp_path / 'folder'}", *arguments[3:], "--maps", str(_grown(whole)))
    assert folder.code == EXIT_OK
    assert GrowthRecord.model_validate_json((tmp_path / "folder" / "growth_record.json").read_bytes()).maps_sha256
    checked = run_command("verify", f"hf:{tmp_path / 'folder'}", "--full")
    assert checked.code == EXIT_OK
    assert "equal the plan's" in checked.printed
    wrong = run_command(
        *arguments[:2], str(tmp_path / "wrong"), *arguments[3:-1], "ffn_hidden_size=112", "--maps", str(_grown(whole))
    )
    assert "the maps are of another growth: ffn is (128, 96), not (112, 96)" in wrong.printed
    stacked = [
        "grow",
        source,
        str(tmp_path / "stacked"),
        "--operator",
        "stack",
        "--set",
        "num_layers=4",
        "--maps",
        source,
    ]
    assert "maps are given, and stack has none" in run_command(*stacked).printed


def test_what_cannot_be_learned_is_refused_before_a_run_starts(config: Path) -> None:
    problems = {
        "stages.wide.model.head_dim=32": "learn mixes whole heads, so that rotary pairs keep their frequency; keep 16",
        "stages.wide.growth.optimizer_state=carry": "learn has reset moments, here it is carry",
        "stages.wide.growth.noise=0.2": "learn starts from random mixtures as it is; remove it",
        "stages.wide.growth.operator=stack+learn": "learn has maps for depth and width at once; write learn alone",
        "stages.wide.growth.operator=split": "is about learned maps, and split has none; remove it, or use the",
    }
    for override, says in problems.items():
        with pytest.raises(ConfigError) as caught:
            load_config(config, [override])
        assert says in str(caught.value), override
    batch = "stages.wide.growth.learn.global_batch_size=3"
    with pytest.raises(ConfigError, match=r"growth\.learn\.global_batch_size 3 is not a multiple"):
        plan_run(load_config(config, [batch]).config, 1)
    assert GrowthConfig(operator="learn").learn is None


def test_each_rank_keeps_as_much_of_the_source_as_planned() -> None:
    cases = [
        {"layout": {"tensor_parallel_size": 2}},
        {"layout": {"pipeline_parallel_size": 2}, "model": {"tie_embeddings": True}},
        {"layout": {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}, "grown": {"num_layers": 4}},
        {"layout": {"pipeline_parallel_size": 2}, "grown": {"hidden_size": 60, "head_dim": 12}},
    ]
    for of_rank in run_ranks("tests.train.learning_workers:measured", 2, {"cases": cases}):
        for case, found in zip(cases, of_rank, strict=True):
            for part in ("base", "maps"):
                assert found[part][1] == pytest.approx(found[part][0], rel=0.01), (case, part)


def test_the_plan_s_figures_are_those_measured() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"model": {"tie_embeddings": True}},
        {"grown": {"num_layers": 4}},
        {"grown": {"hidden_size": 60, "head_dim": 12, "ffn_hidden_size": 70}},
        {"grown": {"num_attention_heads": 8}},
    ]
    for case, found in zip(
        cases, run_ranks("tests.train.learning_workers:measured", 1, {"cases": cases})[0], strict=True
    ):
        measured, planned = found["flops"]
        assert planned == pytest.approx(measured, rel=0.1), case
        for part in ("base", "maps"):
            assert found[part][1] == pytest.approx(found[part][0], rel=0.01), (case, part)
        measured, planned = (sum(found[part][i] for part in ("base", "maps", "temporary")) for i in (0, 1))
        assert planned == pytest.approx(measured, rel=0.1), case
