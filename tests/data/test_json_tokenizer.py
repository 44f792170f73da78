"""Hugging Face tokenizers: the ids are those of transformers, and data are prepared with them as with SentencePiece."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from growth_megatron.config.schema import DataConfig
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.prepare import prepare_data
from growth_megatron.data.prepared import check_data, open_indexed
from growth_megatron.data.tokenizer import Tokenizer, tokenizer_sha256
from growth_megatron.errors import DataError
from tests.data.json_tokenizers import write_json_tokenizer

pytest.importorskip("tokenizers")
TEXTS = [
    "growth of the union\n\nof states",
    "",
    " \n \n",
    "naïve — 中文 \U0001f600",
    "a </s> <|end_of_text|> b",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_json_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_ids_are_those_of_transformers_without_added_ones(folder: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = open_tokenizer(folder / name), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False, truncation=False).input_ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (297, 298, 299)


def test_whether_a_text_begins_with_bos_is_as_in_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = open_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.begins_with_bos
    assert [ours.bos_id, *ours.encode("growth")] == theirs("growth", truncation=False).input_ids
    assert not tokenizer.begins_with_bos


def test_a_folder_with_a_sentencepiece_model_alone_is_that_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    assert type(open_tokenizer(tmp_path)) is Tokenizer
    assert tokenizer_sha256(tmp_path) == tokenizer.sha256


def test_what_ends_a_text_is_found_in_any_of_the_files_or_asked_for(folder: Path, tmp_path: Path) -> None:
    for name, content in (
        ("special_tokens_map.json", '{"eos_token": "<|end_of_text|>"}'),
        ("generation_config.json", '{"eos_token_id": [298, 297]}'),
        ("config.json", '{"eos_token_id": 298}'),
        ("damaged.json", ""),  # a usual name is enough
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        (tmp_path / name / name).write_text(content)
        assert open_tokenizer(tmp_path / name).eos_id == 298
    other = write_json_tokenizer(tmp_path / "other", end="<stop>")
    assert open_tokenizer(other).eos_id == 298
    (other / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match='put a tokenizer_config.json with "eos_token" beside it'):
        open_tokenizer(other)
    (other / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert open_tokenizer(other).eos_id == 298


def test_a_damaged_or_missing_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no tokenizer.json or tokenizer.model; give"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="is not an intact tokenizer.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(DataError, match="does not exist; give"):
        open_tokenizer(tmp_path / "nowhere.json")


def test_data_are_prepared_with_it_by_any_number_of_workers_and_checked(
    folder: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for workers in (1, 2):
        out = prepare_data([corpus], folder, tmp_path / str(workers), workers=workers, progress_stream=io.StringIO())
    (described,) = out.outputs.values()
    assert described.vocab_size == 299
    assert (tmp_path / "1.bin").read_bytes() == (tmp_path / "2.bin").read_bytes()
    assert all(document[-1] == 298 for document in open_indexed(tmp_path / "1"))
    data = DataConfig.model_validate({"tokenizer": str(folder), "train": [{"path": str(tmp_path / "1")}]})
    check_data(data, 299)
    check_data(data.model_copy(update={"tokenizer": None}), 299)
    check_data(data.model_copy(update={"tokenizer": str(folder / "tokenizer.json")}), 299)
    with pytest.raises(DataError, match="has 299 pieces, the model's vocab_size is 298"):
        check_data(data, 298)
    with pytest.raises(DataError, match="was prepared with another tokenizer"):
        check_data(data.model_copy(update={"tokenizer": str(tokenizer.path)}), 400)
