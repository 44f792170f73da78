"""Shares of a blend follow the datasets' sizes, and what a run draws is said before it begins."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.__main__ import main
from growth_megatron.config.schema import DataConfig
from growth_megatron.data.dataset import build_train_dataset, build_validation_dataset
from growth_megatron.data.mixture import describe_draws, draws, draws_of_stages, stored_tokens
from growth_megatron.data.prepared import open_indexed
from growth_megatron.errors import EXIT_OK, DataError
from growth_megatron.growth.configuration import load_config
from tests.command_line import run_command
from tests.workers import stage_of

Prepare = Callable[[int, int], str]


def _blend(prepare: Prepare, **more: Any) -> DataConfig:
    """Of about 6 to 1."""
    return DataConfig.model_validate({"train": [{"path": prepare(60, 2)}, {"path": prepare(10, 3)}], **more})


def test_without_weights_all_datasets_come_to_their_end_together(prepare: Prepare, tmp_path: Path) -> None:
    data = _blend(prepare)
    stream = build_train_dataset(data, 32, 1, tmp_path)
    samples = sum(stream.samples_per_epoch)
    seen = Counter(stream.locate(index).dataset for index in range(samples))
    assert [seen[0], seen[1]] == pytest.approx(stream.samples_per_epoch, abs=3)
    equal = data.model_copy(update={"train": tuple(e.model_copy(update={"weight": 1.0}) for e in data.train)})
    repeated = build_train_dataset(equal, 32, 1, tmp_path)  # negative control: what weights of 1 do
    assert max(repeated.locate(index).epoch for index in range(samples)) >= 2


def test_validation_follows_the_sizes_too(prepare: Prepare, tmp_path: Path) -> None:
    data = DataConfig.model_validate(
        {"train": [{"path": prepare(25, 4)}], "validation": [{"path": prepare(60, 2)}, {"path": prepare(10, 3)}]}
    )
    found = build_validation_dataset(data, 32, 70, tmp_path)
    assert found is not None
    assert Counter(number for number, _ in found._places)[0] == pytest.approx(60, abs=3)


def test_tokens_are_those_of_the_index(prepare: Prepare, tmp_path: Path) -> None:
    assert stored_tokens(prepare(60, 2)) == open_indexed(prepare(60, 2)).sequence_lengths.sum()
    with pytest.raises(DataError, match="are not there, or no dataset; see prepare-data"):
        stored_tokens(tmp_path / "nothing")


def test_draws_add_up(prepare: Prepare) -> None:
    data = _blend(prepare, validation_fraction=0.1)
    large, small = draws(data, 100_000)
    assert large.share + small.share == pytest.approx(1)
    assert large.epochs == pytest.approx(small.epochs, rel=1e-3)
    assert sum(draw.tokens * draw.epochs for draw in (large, small)) == pytest.approx(100_000)
    stage = stage_of({}).model_copy(update={"data": data})
    tokens = stage.num_steps * stage.tokens_per_step
    assert describe_draws([stage], [100 * tokens]).endswith("; more than one epoch repeats text")
    assert "repeats" not in describe_draws([stage], [tokens])


def test_draws_of_stages_that_read_the_same_are_one(prepare: Prepare) -> None:
    stage = stage_of({}).model_copy(update={"data": _blend(prepare)})
    longer = stage.model_copy(update={"model": stage.model.model_copy(update={"sequence_length": 64}), "name": "c"})
    (names, drawn), (others, more) = draws_of_stages(
        [stage, stage.model_copy(update={"name": "b"}), longer], [1000, 500, 1500]
    )
    assert (names, others) == (["test", "b"], ["c"])
    assert [draw.epochs for draw in drawn] == pytest.approx([draw.epochs for draw in more])
    assert describe_draws([stage, longer], [1000, 1000]).splitlines()[1].startswith("data of c: ")


def test_plan_and_the_start_of_a_run_say_what_is_drawn(
    growing_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(growing_config.read_text())
    content["stages"] = [{"name": "base", "model": {"num_layers": 1}, "training": {"steps": 1}, "schedule": {}}]
    content["schedule"]["warmup_steps"] = 0
    growing_config.write_text(yaml.safe_dump(content))
    prefix = content["data"]["train"][0]["path"]
    text = describe_draws(load_config(growing_config).config.stages, [8 * 32])
    assert text.startswith(f"data: {prefix} 100.0% (")
    assert main(["plan", str(growing_config)]) == EXIT_OK
    assert text in capsys.readouterr().out
    assert main(["plan", str(growing_config), "--json"]) == EXIT_OK
    (planned,) = json.loads(capsys.readouterr().out)["data"]
    assert planned["epochs"] == 8 * 32 / stored_tokens(prefix)
    outcome = run_command("train", str(growing_config))
    assert outcome.code == EXIT_OK, outcome.printed
    assert text in outcome.out
    assert main(["plan", str(growing_config), "data.train.0.path=gone"]) == EXIT_OK
    assert "not known yet: gone.bin and gone.idx are not there" in capsys.readouterr().out
