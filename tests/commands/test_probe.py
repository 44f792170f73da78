"""A probe is the beginning of the stage that goes on; what is done is not done again; what cannot be is said first."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.commands.probe_configs import probe_config, read_candidates
from growth_megatron.errors import EXIT_OK, EXIT_USAGE, ConfigError, GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.metrics import read_metrics
from growth_megatron.train.schedule import learning_rate
from tests.command_line import Outcome, run_command
from tests.conftest import write_growing_config

STACK = {"model": {"num_layers": 4}, "growth": {"operator": "stack", "optimizer_state": "carry"}}
WIDE = {"model": {"hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4}, "growth": {}}


@pytest.fixture(scope="module")
def base(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``config.yaml`` and ``run``: 8 steps of 2 layers, saved every second."""
    folder = tmp_path_factory.mktemp("base")
    path = write_growing_config(folder, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["stages"] = [{"name": "base", "model": {"num_layers": 2}, "training": {"steps": 8}}]
    path.write_text(yaml.safe_dump(content))
    assert run_command("train", str(path)).code == EXIT_OK
    return folder


def _file(folder: Path, candidates: dict[str, Any]) -> Path:
    (folder / "growths.yaml").write_text(yaml.safe_dump(candidates, sort_keys=False))
    return folder / "growths.yaml"


def _probe(base: Path, folder: Path, steps: int, *more: str) -> Outcome:
    return run_command(
        "probe", f"{base / 'run'}@4", "--candidates", str(folder / "growths.yaml"), "--steps", str(steps), "--output",
        str(folder / "out"), *more,
    )  # fmt: skip


def _losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run) if record["kind"] == "train"}


def test_a_probe_ranks_is_resumed_and_its_best_goes_on_as_if_it_had_never_been_a_probe(
    base: Path, tmp_path: Path
) -> None:
    _file(tmp_path, {"stack": STACK, "none": None})
    first = _probe(base, tmp_path, 3)
    assert first.code == EXIT_OK, first.printed
    assert "candidate 2 of 2, none: 2 layers x 64, 3 steps" in first.out
    runs = {name: tmp_path / "out" / name for name in ("stack", "none")}
    assert set(_losses(runs["none"])) == {5, 6, 7}
    assert _losses(runs["none"])[5] == _losses(base / "run")[5]  # the very batch that the run went on with
    was = [(run / "metrics.jsonl").read_bytes() for run in runs.values()]
    again = _probe(base, tmp_path, 3)
    assert again.code == EXIT_OK, again.printed
    assert again.out.count("already done") == 2
    assert [(run / "metrics.jsonl").read_bytes() for run in runs.values()] == was
    (command,) = re.findall(r"growth-megatron (train .*)$", again.out, re.MULTILINE)
    best = yaml.safe_load((tmp_path / "out" / "train.yaml").read_text())
    assert run_command(*shlex.split(command)).code == EXIT_OK
    best_run = Path(best["run"]["directory"])
    assert read_manifest(best_run / "latest").stage_step == 8
    whole = dict(best, run={**best["run"], "directory": str(tmp_path / "whole")}, logging={"interval_steps": 1})
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(whole))
    assert run_command("train", str(tmp_path / "whole.yaml")).code == EXIT_OK
    assert _losses(best_run) == _losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["--steps", "8"], "which has 8 steps; give fewer, or make the stage longer: --set training.steps=32"),
        (["--steps", "1"], "shorten it for all candidates: --set schedule.warmup_steps=1"),
        (["--steps", "3", "--set", "schedule.rate=1"], "schedule.rate"),
        (["--steps", "3", "--output", "{used}"], "was begun with other settings"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    base: Path, tmp_path: Path, settings: list[str], words: str
) -> None:
    _file(tmp_path, {"stack": STACK})
    (tmp_path / "used" / "stack").mkdir(parents=True)
    settings = [text.format(used=tmp_path / "used") for text in settings]
    outcome = _probe(base, tmp_path, 3, *settings)
    assert outcome.code == EXIT_USAGE, outcome.printed
    assert words in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ({"a": {"grwoth": {}}}, "a.grwoth is no section of a stage; did you mean growth?"),
        ({"a": [1]}, "a must be sections"),
        ({"a/b": {}}, "cannot be a stage's name"),
        ({"shallow": {"model": {"num_layers": 1}, "growth": {"operator": "stack"}}}, "candidate shallow: "),
        ({"deep": {"model": {"num_layers": 4}}}, "deep changes the model (layers 2 -> 4) but has no growth"),
    ],
)
def test_a_candidate_that_cannot_be_is_named(base: Path, tmp_path: Path, candidates: Any, words: str) -> None:
    _file(tmp_path, candidates)
    origin = find_origin(f"{base / 'run'}@4")

    def configure() -> None:
        for name, sections in read_candidates(tmp_path / "growths.yaml").items():
            probe_config(name, sections, origin, 3, (), tmp_path / "out")

    with pytest.raises(GrowthMegatronError, match=re.escape(words)):
        configure()


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_the_learning_rates_of_a_probe_are_those_of_the_whole_stages_first_steps(
    base: Path, tmp_path: Path, kind: str
) -> None:
    (sections,) = read_candidates(_file(tmp_path, {"wide": WIDE})).values()
    settings = [f"schedule.kind={kind}", "training.steps=40"]
    config = probe_config("wide", sections, find_origin(f"{base / 'run'}@4"), 20, settings, tmp_path / "out")
    (tmp_path / "probe.yaml").write_text(config.probe)
    (whole,), (part,) = config.loaded.config.stages, load_config(tmp_path / "probe.yaml").config.stages
    assert (whole.num_steps, part.num_steps) == (40, 20)
    assert (part.model.hidden_size, part.model.head_dim, part.model.num_layers) == (128, 16, 2)
    for step in range(20):
        assert learning_rate(part.schedule, step, 20) == learning_rate(whole.schedule, step, 40)
    if kind == "wsd":
        with pytest.raises(ConfigError, match="give at most 36"):
            probe_config("wide", sections, find_origin(f"{base / 'run'}@4"), 37, settings, tmp_path / "out")
