"""What two configurations say of whether their losses may be set side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growth_megatron.config.run_schema import RunConfig
from growth_megatron.growth.configuration import load_config
from growth_megatron.report.comparable import differences
from growth_megatron.report.compare import compare, read_run, render_comparison
from tests.conftest import write_growing_config


def _config(folder: Path, *overrides: str) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return load_config(write_growing_config(folder, Path("corpus")), list(overrides)).config


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.validation.0.path=corpus/other", "warning: the held-out text of a is not that of b (data.validation"),
        ("evaluation.samples=16", "(evaluation.samples 16 against 8): their held-out losses cannot be compared"),
        ("model.sequence_length=16", "(model.sequence_length 16 against 32)"),
        ("data.tokenizer=other.model", "(data.tokenizer other.model against corpus/tokenizer.model)"),
        ("stages.grown.model.num_layers=6", "note: a ends as another model than b: layers 4 -> 6"),
        ("schedule.learning_rate=0.001", "have different: schedule.learning_rate 0.001 against 0.003"),
        (
            "stages.grown.training.steps=7",
            "note: what else the last stages of a and b have different: training.steps 7",
        ),
        ("data.train.0.path=corpus/more", "data.train corpus/more against corpus/train"),
        ("optimizer.beta2=0.99", "optimizer.beta2 0.99 against 0.95"),
    ],
)
def test_each_setting_on_which_the_loss_depends_is_told(tmp_path: Path, override: str, said: str) -> None:
    found = differences("a", _config(tmp_path, override), "b", _config(tmp_path))
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    "override",
    ["run.seed=9", "training.micro_batch_size=1", "logging.interval_steps=5", "stages.base.training.steps=5",
     "parallel.tensor_parallel_size=2", "stages.grown.growth.operator=interpolate"],
)  # fmt: skip
def test_seed_layout_and_what_is_compared_are_no_differences(tmp_path: Path, override: str) -> None:
    assert differences("a", _config(tmp_path, override), "b", _config(tmp_path)) == []


def test_a_share_of_the_training_text_held_out_depends_on_that_text(tmp_path: Path) -> None:
    own, other = (_config(tmp_path, "data.validation=[]", f"data.validation_fraction={share}") for share in (0.1, 0.2))
    (said,) = differences("a", own, "b", other)
    assert "data.validation_fraction 0.1 against 0.2" in said


def test_compare_says_it_below_its_sentences_and_nothing_where_a_configuration_is_not_there(tmp_path: Path) -> None:
    runs = []
    for name, rate in (("grown", 0.003), ("scratch", 0.004)):
        folder = tmp_path / name
        folder.mkdir()
        write_growing_config(folder, Path("corpus"))
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("learning_rate: 0.003", f"learning_rate: {rate}"))
        shared = {"kind": "validation", "stage": "grown", "flops_6nd": 1e9}
        lines = [
            {**shared, "step": step, "consumed_tokens": step, "flops": 1e9 * step, "validation_loss": 5 - 0.1 * step}
            for step in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(read_run(folder))
    said = "have different: schedule.learning_rate 0.003 against 0.004"
    figures = compare({"stack": runs[:1]}, runs[1:])
    assert said in figures["differences"]["stack"][0]
    assert said in render_comparison(figures).splitlines()[-1]
    (runs[0].directory / "config.yaml").unlink()
    assert compare({"stack": [read_run(runs[0].directory)]}, runs[1:])["differences"]["stack"] == []
