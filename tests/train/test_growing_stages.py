"""Runs whose stages grow in width and depth: the loss goes on where it was, a kill in a growth changes nothing, the
layout may change with the growth, and what grows says what it does.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.errors import ConfigError
from growth_megatron.growth.configuration import load_config
from growth_megatron.growth.verify import verify_checkpoints
from tests.command_line import run_commands
from tests.conftest import write_growing_config
from tests.pool import ROOT, TIMEOUT_S, environment
from tests.ranks import run_ranks, torchrun

FIRST, SECOND = 4, 8
"""Steps of the two growths."""

TOLERANCE = 1e-4
"""Relative difference of the validation losses around a growth that keeps the function, in fp32."""

WIDE = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 192,
}
WIDER = {**WIDE, "num_layers": 6, "hidden_size": 160, "num_attention_heads": 12, "head_dim": 16, "ffn_hidden_size": 256}
SPLIT = {"operator": "identity+split", "optimizer_state": "carry", "multipliers": True}
DEATHS = [0.1, 0.35, 0.6, 0.9]
CHANGING = ["stages.wide.parallel={tensor_parallel_size: 2}", "stages.wider.parallel={pipeline_parallel_size: 2}"]


def _stages() -> list[dict[str, Any]]:
    return [
        {"name": "base", "model": {"num_layers": 2}, "training": {"steps": FIRST}},
        {"name": "wide", "model": WIDE, "training": {"steps": SECOND - FIRST}, "growth": SPLIT},
        {
            "name": "wider",
            "model": WIDER,
            "training": {"steps": 3},
            "schedule": {"learning_rate": 0.0005},  # the new parameters and the reset moments want a lower one
            "growth": {"operator": "zero"},
        },
    ]


def _write_config(folder: Path, prepared_corpus: Path, **sections: Any) -> Path:
    content = yaml.safe_load(write_growing_config(folder, prepared_corpus).read_text())
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**content, "stages": _stages(), **sections}, sort_keys=False))
    return path


@dataclass(frozen=True)
class Alone:
    """What one rank trained: the runs ``whole``, ``random`` and ``on_two``, and copies ``whole_N`` that died."""

    folder: Path
    codes: list[int]
    left: list[list[str]]


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_config(tmp_path_factory.mktemp("growing_stages"), prepared_corpus)


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Everything that runs on one rank, in one process."""
    folder = tmp_path_factory.mktemp("alone")
    runs = [
        [f"run.directory={folder / 'whole'}"],
        [f"run.directory={folder / 'random'}", "stages.wider.growth.operator=random"],
        [f"run.directory={folder / 'on_two'}", *CHANGING],
    ]
    arguments = {"config": str(config), "runs": runs, "step": FIRST, "deaths": DEATHS}
    (outcome,) = run_ranks("tests.train.growing_workers:train_and_die", 1, arguments)
    return Alone(folder, **outcome)


@pytest.fixture(scope="module")
def reference(alone: Alone) -> Path:
    """The uninterrupted run on one rank."""
    return alone.folder / "whole"


def _records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def _losses(run: Path) -> dict[int, float]:
    records = _records(run, "train")
    assert len({record["step"] for record in records}) == len(records), "a step is recorded twice"
    return {record["step"]: record["loss"] for record in records}


def _jumps(run: Path) -> list[float]:
    """Relative change of the validation loss at each growth."""
    return [abs(line["validation_loss_after"] / line["validation_loss_before"] - 1) for line in _records(run, "growth")]


def test_the_validation_loss_after_each_growth_is_the_one_before_it(reference: Path) -> None:
    jumps = _jumps(reference)
    assert len(jumps) == 2
    assert max(jumps) <= TOLERANCE
    losses = _losses(reference)
    assert list(losses) == list(range(1, SECOND + 4))
    assert all(math.isfinite(loss) for loss in losses.values())
    assert losses[SECOND + 3] < losses[SECOND] < losses[FIRST] < losses[1], "nothing is learned over the growths"


def test_negative_control_a_random_growth_moves_the_validation_loss(reference: Path) -> None:
    split, random = _jumps(reference.parent / "random")
    assert split <= TOLERANCE
    assert random > 10 * TOLERANCE


def test_the_metrics_and_the_lineage_say_the_operators(reference: Path) -> None:
    growths = _records(reference, "growth")
    assert [(line["step"], line["operator"], line["optimizer_state"]) for line in growths] == [
        (FIRST, "identity+split", "carry"),
        (SECOND, "zero", "reset"),
    ]
    assert [line["target_geometry"]["hidden_size"] for line in growths] == [128, 160]
    assert all(line["bytes_written"] > 10_000 for line in growths), "such growths are written, not linked"
    messages = [line["message"] for line in _records(reference, "event") if line["event"] == "grow"]
    how = r"grew by identity\+split, .*multipliers true.*, seed \d+: layers 2 -> 4, hidden 64 -> 128"
    assert re.search(how, messages[0])
    assert "grew by zero: layers 4 -> 6, hidden 128 -> 160" in messages[1]
    first, second = read_manifest(reference / "latest").lineage
    assert (first.operator, first.options, first.layers) == ("identity+split", {"multipliers": True}, (0, 0, 1, 1))
    assert (second.operator, second.optimizer_state, second.seed) == ("zero", "reset", 3)
    assert first.validation_loss_after == growths[0]["validation_loss_after"]


def test_every_grown_checkpoint_of_the_run_verifies(reference: Path) -> None:
    checks = list(verify_checkpoints(reference))
    assert {check.outcome for check in checks if "grown" in str(check.path)} == {"OK"}, checks


def test_a_run_that_dies_anywhere_in_a_growth_ends_with_the_same_losses(alone: Alone, reference: Path) -> None:
    unfinished = [[name for name in names if name.startswith(".tmp")] for names in alone.left]
    assert len(unfinished) == len(DEATHS), "a run did not die"
    for step in (FIRST, SECOND):
        assert unfinished.count([f".tmp_step_{step:08d}_grown"]) > 1, "and not in the middle of this growth"
    for number, death in enumerate(DEATHS):
        assert _losses(alone.folder / f"whole_{number}") == _losses(reference), death


def test_the_layout_changes_with_the_growth_also_when_a_rank_is_killed_in_it(
    config: Path, alone: Alone, reference: Path, tmp_path: Path
) -> None:
    """DP2, then TP2, then PP2 in one process group; the same with a kill; and from one rank to two."""
    whole, killed, on_two = tmp_path / "whole", tmp_path / "whole_killed", alone.folder / "on_two"
    first = {"config": str(config), "overrides": CHANGING, "whole": str(whole), "killed": str(killed), "step": FIRST}
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks("tests.train.growing_workers:whole_and_killed", 2, first)
    assert (killed / "checkpoints" / f".tmp_step_{FIRST:08d}_grown").is_dir()
    assert alone.codes == [0, 0, 76]
    assert json.loads((on_two / "next_layout.json").read_text())["world_size"] == 2
    runs = [{"config": str(config), "overrides": [*CHANGING, f"run.directory={run}"]} for run in (killed, on_two)]
    assert run_ranks("tests.workers:train_all", 2, {"runs": runs})[0] == [0, 0]

    losses, expected = _losses(whole), _losses(reference)
    assert _losses(killed) == losses
    for run in (whole, on_two):
        assert _losses(run).keys() == expected.keys()
        assert max(abs(loss - expected[step]) for step, loss in _losses(run).items()) <= 1e-5
        assert max(_jumps(run)) <= TOLERANCE
        assert read_manifest(run / "checkpoints" / f"step_{SECOND:08d}").layout.tensor_parallel_size == 2
        assert read_manifest(run / "latest").layout.pipeline_parallel_size == 2


def _values(checkpoint: Path) -> dict[str, torch.Tensor]:
    stored = DistCheckpoint(checkpoint)
    return {key: stored.read(key) for key in stored.keys()}


def test_a_checkpoint_grown_by_hand_by_any_number_of_ranks_trains_on_as_it_says(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    source, by_two, by_one = reference / "checkpoints" / f"step_{FIRST:08d}", tmp_path / "by_two", tmp_path / "by_one"
    settings = [f"{key}={value}" for key, value in WIDE.items()]
    options = ["--operator", "identity+split", "--optimizer-state", "carry", "--seed", "5"]
    options += ["--set", *settings, "shares=uneven", "cancelling_noise=1.0"]
    done = subprocess.run(
        torchrun(2, "-m", "growth_megatron", "grow", str(source), str(by_two), *options),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("grew ") == 1
    command = ["train", str(by_two / "train.yaml"), "training.steps=3"]
    assert f"go on with: growth-megatron {' '.join(command[:2])}\n" in done.stdout
    grown, trained = run_commands([["grow", str(source), str(by_one), *options], command])
    assert grown.code == 0, grown.err
    assert trained.code == 0, trained.out + trained.err
    content, other = (path.joinpath("train.yaml").read_text() for path in (by_two, by_one))
    assert content == other.replace(str(by_one), str(by_two))
    one, two = _values(by_one), _values(by_two)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert read_manifest(by_one).model_copy(update={"files": {}}) == read_manifest(by_two).model_copy(
        update={"files": {}}
    )
    assert list(_losses(tmp_path / "by_two_run")) == [FIRST + 1, FIRST + 2, FIRST + 3]
    before = _records(reference, "validation")[0]["validation_loss"]
    (growth,) = _records(tmp_path / "by_two_run", "growth")
    assert abs(growth["validation_loss_after"] / before - 1) <= TOLERANCE
    assert growth["operator"] == "identity+split"


IMPOSSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "head channels between multiples": ("model.head_dim: 24", {"model": {"head_dim": 24}}, "possible: 16 or 32"),
    "fewer hidden channels": ("model.hidden_size: 32", {"model": {"hidden_size": 32}}, "less than the source's 64"),
    "fewer groups": ("model.num_query_groups: 1", {"model": {"num_query_groups": 1}}, "than the source's 2"),
    "too few heads for the groups": (
        "model.num_attention_heads: 8", {"model": {"num_query_groups": 8}, "growth": {"operator": "zero"}},
        "at least 16 heads, or use split",
    ),
    "tiles that do not fit": (
        "model.ffn_hidden_size: 200", {"model": {"ffn_hidden_size": 200}, "growth": {"operator": "hypercloning"}},
        "nearest: 192 or 288",
    ),
    "the depth's operator alone": ("model.hidden_size: 128", {"growth": {"operator": "identity"}}, "so keep 64"),
    "the width's operator alone": ("model.num_layers: 4", {"growth": {"operator": "split"}}, "use stack+split"),
    "an unknown operator": ("growth.operator: splitt", {"growth": {"operator": "splitt"}}, "did you mean split?"),
    "multipliers of a reset": (
        "growth.multipliers: true", {"growth": {"multipliers": True}}, "needs optimizer_state carry",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "changes", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_growth_names_its_line_and_the_nearest_possible(
    wrong: str, changes: dict[str, Any], words: str, config: Path, tmp_path: Path
) -> None:
    content = yaml.safe_load(config.read_text())
    stage = content["stages"][1]
    stage["model"] |= changes.get("model", {})
    stage["growth"] = changes.get("growth", stage["growth"])
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    key, _, value = wrong.partition(": ")
    lines = path.read_text().splitlines()
    begin = lines.index("- name: wide")
    number = lines.index(f"    {key.partition('.')[2]}: {value}", begin) + 1
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    (line,) = (line for line in str(caught.value).splitlines() if f"stages.wide.{key}:" in line)
    assert line.startswith(f"{path}:{number}: ")
    assert words in line
