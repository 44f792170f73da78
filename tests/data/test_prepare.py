"""Text to .bin/.idx: the same bytes at any number of workers, complete or not there at all."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from growth_megatron.data.corpus import list_sources
from growth_megatron.data.description import read_description
from growth_megatron.data.encode import make_tasks
from growth_megatron.data.prepare import merge_data, prepare_data
from growth_megatron.data.records import Fields
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import DataError
from tests.data.conftest import make_documents, write_jsonl

SUFFIXES = (".bin", ".idx", ".json")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Text files, lines and a compressed file, more than one task of each."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, text in enumerate(make_documents(8, seed=11, words=3000)):
        (folder / f"a{number}.txt").write_text(text * 20)
    write_jsonl(folder / "b.jsonl", make_documents(300, seed=12, words=3000))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "c", make_documents(50, 13)).read_bytes()))
    return folder


def run(inputs: Path, tokenizer: Tokenizer, output: Path, workers: int = 1, **keywords):
    return prepare_data([inputs], tokenizer.path, output, workers, progress_stream=io.StringIO(), **keywords)


def test_documents_come_back_in_order_each_ended_by_eos(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_documents(7, seed=9)
    source = write_jsonl(tmp_path / "a.jsonl", [*texts[:3], "  \n", *texts[3:]])
    prepared = run(source, tokenizer, tmp_path / "out" / "a.b")
    dataset = IndexedDataset(str(tmp_path / "out" / "a.b"))
    assert [tokenizer.decode(row[:-1]) for row in dataset[0:7]] == texts
    assert all(row[-1] == tokenizer.eos_id for row in dataset[0:7])
    assert dataset.index.dtype == numpy.uint16
    assert dataset.document_indices.tolist() == list(range(8))
    description = prepared.outputs[tmp_path / "out" / "a.b"]
    assert (description.documents, description.empty_documents) == (7, 1)
    assert description.tokens == int(dataset.sequence_lengths.sum())
    assert description.text_bytes == sum(len(text.encode()) for text in texts)
    assert description.tokenizer_sha256 == tokenizer.sha256
    found = read_description(tmp_path / "out" / "a.b")
    assert found is not None
    assert [list(entry) for entry in found.sources] == [["a.jsonl", source.stat().st_size]]


def test_output_is_the_same_at_any_number_of_workers(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert len(list(make_tasks(list_sources([mixed])))) >= 4
    for workers in (1, 2):
        run(mixed, tokenizer, tmp_path / f"w{workers}", workers, validation_every=10)
    for part in ("", "_validation"):
        for suffix in SUFFIXES:
            one, two = (tmp_path / f"w{workers}{part}{suffix}" for workers in (1, 2))
            assert one.read_bytes() == two.read_bytes()


def test_every_nth_document_is_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = make_documents(10, seed=9)
    prepared = run(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "a", validation_every=3)
    train, held_out = (IndexedDataset(str(prefix)) for prefix in prepared.outputs)
    assert [tokenizer.decode(row[:-1]) for row in held_out[0:3]] == texts[2::3]
    assert [tokenizer.decode(row[:-1]) for row in train[0:7]] == [t for i, t in enumerate(texts) if i % 3 != 2]


def test_an_error_in_a_worker_leaves_nothing_behind(mixed: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (mixed / "z.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"z\.txt is not UTF-8"):
        run(mixed, tokenizer, tmp_path / "out" / "a", workers=2)
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_output_is_kept_unless_told_otherwise(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run(corpus, tokenizer, tmp_path / "a")
    before = (tmp_path / "a.bin").read_bytes()
    other = write_jsonl(tmp_path / "b.jsonl", make_documents(3, seed=8))
    with pytest.raises(DataError, match=r"a\.bin exists already.*--overwrite"):
        run(other, tokenizer, tmp_path / "a")
    assert (tmp_path / "a.bin").read_bytes() == before
    run(other, tokenizer, tmp_path / "a", overwrite=True)
    assert len(IndexedDataset(str(tmp_path / "a"))) == 3


def test_empty_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(DataError, match="corpus is empty"):
        run(tmp_path / "a.txt", tokenizer, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_splits_and_workers_that_cannot_be(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_documents(3, seed=8))
    with pytest.raises(DataError, match="between 2 and 3"):
        run(source, tokenizer, tmp_path / "a", validation_every=4)
    with pytest.raises(DataError, match="use 2 or more"):
        run(source, tokenizer, tmp_path / "a", validation_every=1)
    with pytest.raises(DataError, match="--workers 0"):
        run(source, tokenizer, tmp_path / "a", workers=0)


def test_output_that_cannot_be_written(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        run(corpus, tokenizer, tmp_path / "file" / "a")


def test_a_field_other_than_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "the people"}) + "\n")
    run(tmp_path / "a.jsonl", tokenizer, tmp_path / "a", fields=Fields("body"))
    dataset = IndexedDataset(str(tmp_path / "a"))  # held: its rows are views that die with it
    assert tokenizer.decode(dataset[0][:-1]) == "the people"


def test_progress_is_plain_lines_away_from_a_terminal(
    mixed: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growth_megatron.config.progress_bar.LINE_INTERVAL_S", 0.0)
    stream = io.StringIO()
    prepare_data([mixed], tokenizer.path, tmp_path / "a", 1, progress_stream=stream)
    lines = stream.getvalue().splitlines()
    assert "documents," in lines[0]
    assert "iB/s" in lines[0]
    assert "(100 %)" in lines[-1]
    assert lines[-1].endswith(", 0 s left")


def test_progress_is_a_bar_on_a_terminal(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    prepare_data([corpus], tokenizer.path, tmp_path / "a", 1, progress_stream=stream)
    assert "100%" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Five files of lines."""
    folder = tmp_path / "several"
    folder.mkdir()
    for number in range(5):
        write_jsonl(folder / f"{number}.jsonl", make_documents(4, seed=number))
    return folder


def test_shards_hold_every_document_once_and_merge(several: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number in (1, 2):
        run(several, tokenizer, tmp_path / "a", shard=(number, 2))
    run(several, tokenizer, tmp_path / "whole")
    shards = [tmp_path / "a_1of2", tmp_path / "a_2of2"]
    assert [len(IndexedDataset(str(prefix))) for prefix in shards] == [12, 8]
    merged = merge_data(shards, tmp_path / "merged").outputs[tmp_path / "merged"]
    whole, description = IndexedDataset(str(tmp_path / "whole")), read_description(tmp_path / "whole")
    found = IndexedDataset(str(tmp_path / "merged"))
    order = [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 4, 5, 6, 7, 12, 13, 14, 15]  # files 0, 2, 4, then 1, 3
    assert [row.tolist() for row in found[0:20]] == [whole[number].tolist() for number in order]
    assert found.document_indices.tolist() == whole.document_indices.tolist()
    assert description is not None
    assert (merged.tokens, merged.text_bytes) == (description.tokens, description.text_bytes)
    assert merged.bin_sha256 == hashlib.sha256((tmp_path / "merged.bin").read_bytes()).hexdigest()


def test_a_shard_that_is_there_is_left_alone_and_one_of_other_text_is_refused(
    several: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    run(several, tokenizer, tmp_path / "a", shard=(1, 2))
    before = (tmp_path / "a_1of2.bin").stat().st_mtime_ns
    assert run(several, tokenizer, tmp_path / "a", shard=(1, 2)).seconds == 0
    assert (tmp_path / "a_1of2.bin").stat().st_mtime_ns == before
    write_jsonl(several / "0.jsonl", make_documents(9, seed=8))
    with pytest.raises(DataError, match="exists already"):
        run(several, tokenizer, tmp_path / "a", shard=(1, 2))


def test_shards_that_cannot_be(several: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--shard 3/2 .*count them from 1"):
        run(several, tokenizer, tmp_path / "a", shard=(3, 2))
    with pytest.raises(DataError, match="use at most 5 shards"):
        run(several, tokenizer, tmp_path / "a", shard=(1, 6))


def test_a_damaged_part_is_not_merged(several: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    run(several, tokenizer, tmp_path / "a")
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[7] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match="does not have the checksum"):
        merge_data([tmp_path / "a"], tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))
