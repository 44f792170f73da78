"""``evaluation.tasks``: figures of the model as it acts at that step, at any layout; training does not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.command_line import run_command
from tests.conftest import write_growing_config
from tests.evaluate.small_tasks import write_tasks
from tests.ranks import run_ranks

pytest.importorskip("lm_eval")

NAMES = ["small_choice", "small_pages"]
MID_RAMP = 4
LAYOUTS = {
    "tensor": ["parallel={tensor_parallel_size: 2, sequence_parallel: true}"],
    "pipeline": ["parallel={pipeline_parallel_size: 2, virtual_pipeline_parallel_size: 2}"],
    "data": ["parallel.overlap_param_gather=true"],
}


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of four layers, then four of eight, behind masks that open until their end."""
    folder = tmp_path_factory.mktemp("tasks_while_training")
    path = write_growing_config(folder, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    deep = {"num_layers": 8, "ffn_hidden_size": 128}
    growth = {"operator": "masked", "ramp": {"depth": [0, 4], "ffn": [0, 4]}}
    content["stages"] = [
        {"name": "base", "model": {"num_layers": 4}, "training": {"steps": 2}},
        {"name": "deep", "model": deep, "training": {"steps": 4}, "growth": growth},
    ]
    include_path = str(write_tasks(folder / "tasks"))
    content["evaluation"] |= {"tasks": NAMES, "tasks_interval_steps": 2, "include_path": include_path}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """On one rank; and ``plain`` beside it, without the tasks."""
    alone, plain = (f"run.directory={config.parent / name}" for name in ("alone", "plain"))
    train(1, config, [[alone], [plain, "evaluation.tasks=[]"]])
    return config.parent / "alone"


def train(ranks: int, config: Path, runs: list[list[str]]) -> None:
    arguments = {"runs": [{"config": str(config), "overrides": overrides} for overrides in runs]}
    assert run_ranks("tests.evaluate.workers:train_with_tasks", ranks, arguments)[0] == [0] * len(runs)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_training_goes_on_bitwise_as_without_it(run: Path) -> None:
    plain = run.with_name("plain")
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("validation", "validation_loss")):
        found, expected = ([line[key] for line in records(folder, kind)] for folder in (run, plain))
        assert found == expected
        assert len(found) > 2
    assert records(plain, "evaluation") == []
    assert [line["step"] for line in records(run, "evaluation")] == [2, 4, 6]


def test_the_figures_are_those_of_the_checkpoint_of_that_step_also_behind_masks(run: Path) -> None:
    cases = [{"checkpoint": str(run / "checkpoints" / f"step_{step:08d}")} for step in (2, MID_RAMP, 6)]
    tasks = str(run.with_name("tasks"))
    found = run_ranks("tests.evaluate.workers:evaluate_all", 1, {"cases": cases, "tasks": tasks, "names": NAMES})[0]
    for line, answers in zip(records(run, "evaluation"), found, strict=True):
        for task, figures in line["results"].items():
            expected = {metric: answers[task]["figures"][f"{metric},none"] for metric in figures}
            assert figures == pytest.approx(expected, rel=1e-5), (line["step"], task)
    perplexities = [line["results"]["small_pages"]["word_perplexity"] for line in records(run, "evaluation")]
    assert len(set(perplexities)) == 3, "all steps are alike: nothing was compared"


def test_every_layout_gives_the_figures_of_one_rank(config: Path, run: Path) -> None:
    others = [[f"run.directory={run.with_name(name)}", *overrides] for name, overrides in LAYOUTS.items()]
    train(2, config, others)
    expected = records(run, "evaluation")
    for name in LAYOUTS:
        for line, wanted in zip(records(run.with_name(name), "evaluation"), expected, strict=True):
            for task, figures in wanted["results"].items():
                # the weights of the layouts differ by rounding
                assert line["results"][task] == pytest.approx(figures, rel=1e-3), (name, line["step"], task)


def test_a_checkpoint_with_another_bit_is_neither_evaluated_nor_sampled(run: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree((run / "latest").resolve(), checkpoint)
    assert run_command("sample", str(checkpoint), "We", "--max-tokens", "1").code == EXIT_OK
    file = next(checkpoint.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for arguments in (["sample", str(checkpoint), "We"], ["evaluate", str(checkpoint), "--tasks", "arc_easy"]):
        refused = run_command(*arguments)
        assert refused.code != EXIT_OK
        assert f"{file} does not match its checksum" in refused.printed


def test_what_is_wrong_is_said_before_the_first_step(config: Path, tmp_path: Path) -> None:
    run, nowhere = f"run.directory={tmp_path / 'run'}", tmp_path / "nowhere"
    for override, words in (
        (f"evaluation.include_path={nowhere}", f"include path {nowhere} is no folder; give one"),
        ("data.tokenizer=null", "evaluation.tasks need a tokenizer; name it as data.tokenizer, or leave the tasks out"),
    ):
        refused = run_command("train", str(config), run, override)
        assert (refused.code, words in refused.err) == (EXIT_USAGE, True), refused.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    remedy = run_command("train", str(config), run, "data.tokenizer=null", "evaluation.tasks=[]")
    assert remedy.code == EXIT_OK, remedy.err
