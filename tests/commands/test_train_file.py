"""``train.yaml`` beside a checkpoint made by hand: what is printed goes on with training, as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.manifest import read_manifest, validate_checkpoint
from growth_megatron.checkpoint.huggingface.safetensors_file import packed
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.errors import EXIT_OK
from growth_megatron.growth.learned import initial_maps
from growth_megatron.growth.operators import names_by_side
from growth_megatron.growth.plan import plan_growth
from tests.command_line import run_command
from tests.conftest import VOCABULARY, write_growing_config
from tests.ranks import torchrun

DEEPER, WIDER = ["num_layers=4"], ["hidden_size=128", "num_attention_heads=8", "num_query_groups=4"]
SETTINGS = {"both": [*DEEPER, *WIDER], "depth": DEEPER, "width": WIDER}
GROWTHS = {name: SETTINGS[side] for side, names in names_by_side().items() for name in names}
GROWTHS |= {"identity+split": [*DEEPER, *WIDER, "ffn_hidden_size=192", "shares=uneven"]}
GROWTHS["masked"] = [*GROWTHS["masked"], "ramp={depth: [0, 3], heads: [0, 3], hidden: [1, 2]}"]
ONE_STEP = ["training.steps=1", "schedule.warmup_steps=1"]


@pytest.fixture(scope="module")
def run(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages."""
    folder = tmp_path_factory.mktemp("staged")
    path = write_growing_config(folder, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    for stage, rate in zip(content["stages"], (0.002, 0.004), strict=True):
        stage |= {"training": {"steps": 2}, "schedule": {"learning_rate": rate}}
    path.write_text(yaml.safe_dump(content))
    assert run_command("train", str(path)).code == EXIT_OK
    return folder / "run"


def command_in(printed: str) -> list[str]:
    """The command that a text says to go on with."""
    (line,) = re.findall(r"go on with: (.*)$", printed, re.MULTILINE)
    return shlex.split(line)


def _go_on(printed: str, *more: str) -> None:
    program, *arguments = command_in(printed)
    assert program == "growth-megatron"
    outcome = run_command(*arguments, *more)
    assert outcome.code == EXIT_OK, outcome.printed
    assert "run complete" in outcome.out


def _first_maps(run: Path, path: Path) -> Path:
    """A file of the maps with which learning would begin."""
    base, grown = (read_manifest(run / "checkpoints" / f"step_{step:08d}").geometry for step in (2, 4))
    wider = {"hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4}
    plan = plan_growth(base, grown.model_copy(update=wider), GrowthConfig(operator="learn"), 0)
    path.write_bytes(packed(initial_maps(plan)))
    return path


@pytest.mark.parametrize("operator", GROWTHS)
def test_the_printed_command_trains_what_an_operator_grew(
    run: Path, tmp_path: Path, capsys: Any, operator: str
) -> None:
    target, source = tmp_path / "a grown one", run / "checkpoints" / "step_00000002"
    how = ["--operator", operator, "--set", *GROWTHS[operator]]
    if operator == "learn":
        how += ["--maps", str(_first_maps(run, tmp_path / "maps.safetensors"))]
    assert main(["grow", str(source), str(target), *how]) == EXIT_OK
    _go_on(capsys.readouterr().out)
    trained = read_manifest(tmp_path / "a grown one_run" / "latest")
    steps = 3 if operator == "masked" else 2  # until its masks are open
    assert (trained.step, trained.stage_step) == (2 + steps, steps)
    assert trained.geometry == read_manifest(target).geometry


def test_settings_are_those_of_the_stage_and_change_as_the_person_likes(run: Path, tmp_path: Path, capsys: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["grow", str(run), str(first), "--set", "num_layers=8"]) == EXIT_OK
    content = yaml.safe_load((first / "train.yaml").read_text())
    assert content["schedule"]["learning_rate"] == 0.004
    content["training"]["steps"] = 5
    (first / "train.yaml").write_text(yaml.safe_dump(content))
    assert validate_checkpoint(first, full=True) is None
    assert main(["grow", str(first), str(second), "--set", "num_layers=16"]) == EXIT_OK
    assert yaml.safe_load((second / "train.yaml").read_text())["training"]["steps"] == 5
    (tmp_path / "second_run").mkdir()
    capsys.readouterr()
    assert main(["grow", str(first), str(second), "--set", "num_layers=16", "--overwrite"]) == EXIT_OK
    _go_on(capsys.readouterr().out, *ONE_STEP)
    assert read_manifest(tmp_path / "second_run2" / "latest").step == 5


def test_a_layout_goes_along_where_it_fits(run: Path, tmp_path: Path, capsys: Any) -> None:
    source, fitting, other = tmp_path / "source", tmp_path / "fitting", tmp_path / "other"
    assert main(["grow", str(run), str(source), "--set", "num_layers=6"]) == EXIT_OK
    content = yaml.safe_load((source / "train.yaml").read_text())
    content["parallel"] |= {"pipeline_parallel_size": 2, "data_parallel_size": 4}
    (source / "train.yaml").write_text(yaml.safe_dump(content))
    capsys.readouterr()
    assert main(["grow", str(source), str(fitting), "--set", "num_layers=8"]) == EXIT_OK
    command = command_in(capsys.readouterr().out)
    assert command == ["torchrun", *torchrun(2)[3:5], "-m", "growth_megatron", "train", str(fitting / "train.yaml")]
    assert main(["grow", str(source), str(other), "--set", "num_layers=9"]) == EXIT_OK
    _go_on(capsys.readouterr().out, *ONE_STEP)


def test_an_imported_model_trains_once_its_data_are_named(prepared_corpus: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    from tests.checkpoint.huggingface_models import write_llama

    model = {"vocab_size": VOCABULARY, "hidden_size": 64, "max_position_embeddings": 8192, "tie_word_embeddings": True}
    write_llama(tmp_path / "hf", {**model, "intermediate_size": 96, "head_dim": 24, "rms_norm_eps": 1e-6})
    imported, grown = tmp_path / "imported", tmp_path / "grown"
    assert main(["import-hf", str(tmp_path / "hf"), str(imported)]) == EXIT_OK
    printed = capsys.readouterr().out
    assert f"name its data ({imported}_data is a guess)" in printed
    data = f"data.train.0.path={prepared_corpus / 'train'}"
    assert yaml.safe_load((imported / "train.yaml").read_text())["model"]["sequence_length"] == 4096
    short = [*ONE_STEP, "model.sequence_length=32", "evaluation.samples=8"]
    _go_on(printed, data, *short)
    geometry = read_manifest(imported).geometry
    assert read_manifest(tmp_path / "imported_run" / "latest").geometry == geometry.model_copy(
        update={"sequence_length": 32}
    )
    assert main(["export-hf", str(tmp_path / "imported_run"), str(tmp_path / "exported")]) == EXIT_OK
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["max_position_embeddings"] == 8192
    capsys.readouterr()
    assert main(["grow", f"hf:{tmp_path / 'hf'}", str(grown), "--set", "num_layers=4"]) == EXIT_OK
    _go_on(capsys.readouterr().out, data, *short)
