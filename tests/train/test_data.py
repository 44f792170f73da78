"""A stage may bring data, a sequence length and a batch of its own; its samples then begin with the first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.data.dataset import build_train_dataset
from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.counters import Counters
from growth_megatron.train.metrics import read_metrics
from tests.command_line import run_command
from tests.conftest import write_growing_config
from tests.train.test_stages import PP2, TP2, _copy_until, _losses, _train

LENGTH, BATCH = 24, 4  # of the grown stage; the base has 32 and 8


def _config(folder: Path, prepared_corpus: Path, **stage: Any) -> Path:
    path = write_growing_config(folder, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    train, validation = ([{"path": str(prepared_corpus / name)}] for name in ("train", "validation"))
    content["stages"][1] |= {"data": {"train": validation, "validation": train}, **stage}
    content["stages"][1]["model"]["sequence_length"] = LENGTH
    content["stages"][1]["training"]["global_batch_size"] = BATCH
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _config(tmp_path_factory.mktemp("changing"), prepared_corpus)


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on one rank."""
    run = tmp_path_factory.mktemp("reference") / "whole"
    assert _train(1, config, [f"run.directory={run}"]) == [0]
    return run


def test_a_stage_with_other_data_reads_them_from_their_first_sample(reference: Path) -> None:
    base, end = (read_manifest(reference / "checkpoints" / f"step_{step:08d}") for step in (6, 10))
    assert (base.consumed_samples, end.consumed_samples) == (6 * 8, 4 * BATCH)
    assert end.consumed_tokens == 6 * 8 * 32 + 4 * BATCH * LENGTH
    assert base.data_fingerprint is not None
    assert end.data_fingerprint is not None
    assert end.data_fingerprint["train"] == base.data_fingerprint["validation"]
    assert end.data_fingerprint["sequence_length"] == LENGTH


def test_the_samples_are_those_of_the_new_data(config: Path, reference: Path, tmp_path: Path) -> None:
    stage = load_config(config).config.stages[1]
    stream = build_train_dataset(stage.data, LENGTH, 3, tmp_path)
    assert len(stream[0]["tokens"]) == LENGTH
    data = [line["message"] for line in read_metrics(reference) if line.get("event") == "data"]
    assert re.search(r"^data of base: .*/train 100.*\ndata of grown: .*/validation 100", data[0])


def test_a_run_that_changes_data_and_length_resumes_bitwise_at_its_layout(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    steps = (4, 6, 8)  # 6 is the stage's end: the growth is done again
    for step in steps:
        _copy_until(reference, tmp_path / str(step), step)
    assert _train(1, config, *([f"run.directory={tmp_path / str(step)}"] for step in steps)) == [0] * len(steps)
    for step in steps:
        assert _losses(tmp_path / str(step)) == _losses(reference)


def test_a_run_that_changes_data_and_length_is_the_same_within_1e_5_at_other_layouts(
    config: Path, reference: Path, tmp_path: Path
) -> None:
    _copy_until(reference, tmp_path / "from_8", 8)
    runs = [
        [f"run.directory={tmp_path / 'tp2'}", *TP2],
        [f"run.directory={tmp_path / 'pp2'}", *PP2],
        [f"run.directory={tmp_path / 'from_8'}"],
    ]
    assert _train(2, config, *runs) == [0, 0, 0]
    expected = _losses(reference)
    for name in ("tp2", "pp2", "from_8"):
        losses = _losses(tmp_path / name)
        assert losses.keys() == expected.keys()
        assert max(abs(losses[step] - expected[step]) for step in expected) <= 1e-5, name


def test_a_stage_that_changes_its_validation_alone_goes_on_in_its_samples(
    prepared_corpus: Path, tmp_path: Path
) -> None:
    path = _config(tmp_path, prepared_corpus, data={"validation": [], "validation_fraction": 0})
    same = ["stages.grown.model.sequence_length=32", "stages.grown.training.global_batch_size=8"]
    assert run_command("train", str(path), *same).code == EXIT_OK
    assert read_manifest(tmp_path / "run" / "latest").consumed_samples == 10 * 8


def test_data_that_a_later_stage_lacks_are_missed_before_the_first_step(prepared_corpus: Path, tmp_path: Path) -> None:
    path = _config(tmp_path, prepared_corpus, data={"train": [{"path": str(tmp_path / "none")}]})
    refused = run_command("train", str(path))
    assert refused.code == EXIT_USAGE
    assert str(tmp_path / "none") in refused.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not read_metrics(tmp_path / "run")


def test_samples_begin_anew_where_a_stage_reads_others_alone(config: Path) -> None:
    base, grown = load_config(config).config.stages
    end = Counters(step=6, stage=0, stage_step=6, consumed_samples=48, skipped_samples=8)
    assert (end.entering(grown, base).next_sample, end.entering(grown, base).step) == (0, 6)
    assert end.entering(base, base) == end
