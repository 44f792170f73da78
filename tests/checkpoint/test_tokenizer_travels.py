"""A model's tokenizer and special ids go with it: into a checkpoint, through training and growth, into every export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.manifest import read_manifest, validate_checkpoint
from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.checkpoint.huggingface_models import edit_json, write_llama
from tests.command_line import run_command
from tests.conftest import VOCABULARY
from tests.data.json_tokenizers import write_json_tokenizer

pytest.importorskip("transformers")
IDS = {"bos_token_id": 297, "eos_token_id": [298, 296], "pad_token_id": 0}
FILES = ("tokenizer.json", "tokenizer_config.json")
MODEL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of Hugging Face's with a tokenizer.json and special ids of its own."""
    write_llama(tmp_path / "hf", MODEL)
    edit_json(tmp_path / "hf" / "config.json", **IDS)
    (tmp_path / "hf" / "generation_config.json").unlink()
    return write_json_tokenizer(tmp_path / "hf")


def _assert_exported(folder: Path, model_files: dict[str, bytes]) -> None:
    assert {name: (folder / name).read_bytes() for name in FILES} == model_files
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        assert {key: content.get(key) for key in IDS} == IDS, name


def test_from_import_through_training_and_growth_to_export(model: Path, tmp_path: Path, capsys: Any) -> None:
    files = {name: (model / name).read_bytes() for name in FILES}
    start, deep, wide, text = (tmp_path / name for name in ("start", "deep", "wide", "text.txt"))
    assert main(["import-hf", str(model), str(start)]) == EXIT_OK
    assert {*FILES, "generation_config.json"} <= read_manifest(start).files.keys()
    shutil.rmtree(model)
    text.write_text("growth of a small model into one that is larger " * 60)
    assert main(["prepare-data", str(text), "--tokenizer", str(start), "--output", f"{start}_data"]) == EXIT_OK
    options = ["training.steps=1", "training.global_batch_size=2", "schedule.warmup_steps=0", "evaluation.samples=2"]
    options += ["data.validation_fraction=0"]
    outcome = run_command("train", str(start / "train.yaml"), *options)
    assert outcome.code == EXIT_OK, outcome.printed
    saved = tmp_path / "start_run" / "latest"
    assert main(["grow", str(saved), str(deep), "--set", "num_layers=4"]) == EXIT_OK  # by links
    assert main(["grow", str(deep), str(wide), "--set", "hidden_size=128"]) == EXIT_OK  # written
    shutil.rmtree(start)
    for checkpoint in (saved, deep, wide):
        assert validate_checkpoint(checkpoint, full=True) is None
        capsys.readouterr()
        target = tmp_path / "exported" / checkpoint.name
        assert main(["export-hf", str(checkpoint), str(target), "--verify"]) == EXIT_OK
        assert "the same ids for" in capsys.readouterr().out
        _assert_exported(target, files)
    assert main(["grow", str(saved), f"hf:{tmp_path / 'direct'}", "--set", "num_layers=4"]) == EXIT_OK
    _assert_exported(tmp_path / "direct", files)


def test_a_run_without_data_tokenizer_keeps_that_of_its_checkpoint(
    model: Path, prepared_corpus: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    assert main(["grow", f"hf:{model}", str(start), "--set", "num_layers=4"]) == EXIT_OK
    options = ["training.steps=1", "training.global_batch_size=2", "schedule.warmup_steps=0", "data.tokenizer=null"]
    data = f"data.train.0.path={prepared_corpus / 'train'}"
    outcome = run_command("train", str(start / "train.yaml"), *options, data, "evaluation.samples=2")
    assert outcome.code == EXIT_OK, outcome.printed
    kept, saved = read_manifest(start).files, read_manifest(tmp_path / "start_run" / "latest").files
    for name in (*FILES, "generation_config.json"):
        assert saved[name] == kept[name]


def test_a_sentencepiece_model_is_in_every_checkpoint_of_its_run(
    growing_config: Path, prepared_corpus: Path, tmp_path: Path
) -> None:
    outcome = run_command("train", str(growing_config))
    assert outcome.code == EXIT_OK, outcome.printed
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        assert (checkpoint / "tokenizer.model").read_bytes() == (prepared_corpus / "tokenizer.model").read_bytes()
        assert "tokenizer.model" in read_manifest(checkpoint).files
    content = (tmp_path / "run" / "latest" / "config.yaml").read_text()
    assert str(prepared_corpus / "tokenizer.model") in content
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == EXIT_OK
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_grow_takes_another_tokenizer_for_a_hugging_face_folder_alone(model: Path, tmp_path: Path, capsys: Any) -> None:
    other = write_json_tokenizer(tmp_path / "other", 290)
    grow = ["grow", f"hf:{model}", f"hf:{tmp_path / 'grown'}", "--set", "num_layers=4", "--tokenizer"]
    assert main([*grow, str(other)]) == EXIT_OK
    assert (tmp_path / "grown" / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (288, 289)
    grow[2] = str(tmp_path / "checkpoint")
    assert main([*grow, str(other)]) == EXIT_USAGE
    assert "name one as hf:TARGET" in capsys.readouterr().err
    grow[2] = f"hf:{tmp_path / 'again'}"
    assert main([*grow, str(tmp_path / "nowhere")]) == EXIT_USAGE
    assert not (tmp_path / "again").exists()
