"""A run whose base has no layers: embedding, norm and output are trained, then layers come beneath them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.errors import EXIT_OK, ConfigError
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.metrics import read_metrics
from tests.command_line import run_command
from tests.conftest import write_growing_config
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps without layers, 4 of two new layers behind a mask, 2 of four."""
    path = write_growing_config(tmp_path_factory.mktemp("no_layers"), prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["stages"] = [
        {"name": "none", "model": {"num_layers": 0}, "training": {"steps": 4}},
        {
            "name": "two",
            "model": {"num_layers": 2},
            "growth": {"operator": "masked", "ramp": {"depth": [0, 3]}},
            "training": {"steps": 4},
        },
        {"name": "four", "model": {"num_layers": 4}, "growth": {"operator": "stack"}, "training": {"steps": 2}},
    ]
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """On one rank."""
    assert run_command("train", str(config)).code == EXIT_OK
    return config.parent / "run"


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]


def test_a_model_without_layers_learns_and_new_layers_behind_a_mask_keep_its_loss(run: Path) -> None:
    losses = _losses(run)
    assert losses[3] < losses[0] - 0.2
    masked, _ = [record for record in read_metrics(run) if record["kind"] == "growth"]
    assert masked["validation_loss_after"] == pytest.approx(masked["validation_loss_before"], rel=2e-6)
    grown = run / "checkpoints" / "step_00000004_grown"
    assert read_manifest(grown).lineage[-1].layers == ()
    assert run_command("verify", str(grown), "--full").code == EXIT_OK
    assert "none in the source" in run_command("grow", str(grown.with_name("step_00000004")), *_RANDOM, "--plan").out


_RANDOM = ["--operator", "random", "--set", "num_layers=2"]


def test_at_other_layouts_it_trains_alike(config: Path, run: Path, tmp_path: Path) -> None:
    layouts = {
        "tensor": ["parallel={tensor_parallel_size: 2, sequence_parallel: true}"],
        "data": [],
        "pipeline later": [
            "stages.two.parallel.pipeline_parallel_size=2",
            "stages.four.parallel.pipeline_parallel_size=2",
        ],
    }
    runs = [
        {"config": str(config), "overrides": [f"run.directory={tmp_path / name}", *more]}
        for name, more in layouts.items()
    ]
    assert run_ranks("tests.workers:train_all", 2, {"runs": runs})[0] == [0] * len(runs)
    for name in layouts:
        assert _losses(tmp_path / name) == pytest.approx(_losses(run), abs=1e-5), name


def test_it_goes_to_a_folder_and_grows_there(run: Path, tmp_path: Path) -> None:
    base, folder = run / "checkpoints" / "step_00000004", tmp_path / "folder"
    assert run_command("export-hf", str(base), str(folder), "--verify").code == EXIT_OK
    assert run_command("grow", f"hf:{folder}", f"hf:{tmp_path / 'grown'}", *_RANDOM).code == EXIT_OK
    assert run_command("verify", f"hf:{tmp_path / 'grown'}", "--full").code == EXIT_OK
    assert run_command("grow", str(base), str(tmp_path / "wide"), "--set", "hidden_size=128").code == EXIT_OK
    assert run_command("verify", str(tmp_path / "wide"), "--full").code == EXIT_OK


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "stages.two.growth={operator: stack, ramp: null}",
            "stack makes new layers out of old ones, and the source has none",
        ),
        (
            "stages.two.growth={operator: zero, ramp: null}",
            "zero makes new layers out of old ones, and the source has none",
        ),
        (
            "stages.two.growth={operator: learn, ramp: null}",
            "learn makes new layers out of old ones, and the source has none",
        ),
        ("stages.two.growth.layers=[0, 0]", "the source has none to name; leave the list out"),
        ("stages.two.model.hidden_size=128", "grow its depth first, by random or masked"),
        ("stages.none.parallel.pipeline_parallel_size=2", "2 ranks would divide the layers, and num_layers is 0"),
    ],
)
def test_what_needs_layers_is_refused_with_what_does_not(config: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(config, [override])
