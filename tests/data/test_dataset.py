"""The token stream: the same whatever ran before, however long, at any data-parallel size."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from growth_megatron.config.schema import DataConfig
from growth_megatron.data import index_cache
from growth_megatron.data.dataset import (
    Stream,
    ValidationSet,
    build_train_dataset,
    build_validation_dataset,
)
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import DataError
from tests.pool import TIMEOUT_S

LENGTH = 32
Prepare = Callable[[int, int], str]


def token_stream_hash(source: Any, start: int, stop: int) -> str:
    """Of the tokens of samples ``start`` to ``stop``."""
    return hashlib.sha256(b"".join(source[i]["tokens"].numpy().tobytes() for i in range(start, stop))).hexdigest()


class Numbers:
    """A dataset of ``count`` samples that say where they come from."""

    def __init__(self, name: int, count: int) -> None:
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert 0 <= index < self.count
        return {"tokens": torch.tensor([self.name, index])}


def single(prefix: str, tokenizer: Tokenizer, **keywords) -> DataConfig:
    return DataConfig.model_validate({"tokenizer": str(tokenizer.path), "train": [{"path": prefix}], **keywords})


def test_a_sample_is_a_shifted_pair_without_any_mask(blended: DataConfig, tmp_path: Path) -> None:
    sample = build_train_dataset(blended, LENGTH, 1, tmp_path)[5]
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in sample.items()} == {
        "tokens": ((LENGTH,), torch.int64),
        "labels": ((LENGTH,), torch.int64),
        "loss_mask": ((LENGTH,), torch.float32),
        "position_ids": ((LENGTH,), torch.int64),
    }
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["loss_mask"].all()
    assert sample["position_ids"].tolist() == list(range(LENGTH))


def test_an_epoch_holds_every_token_once(prepare: Prepare, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = prepare(40, 2)
    stream = build_train_dataset(single(prefix, tokenizer), LENGTH, 3, tmp_path)
    (size,) = stream.samples_per_epoch
    dataset = IndexedDataset(prefix)
    assert size == (int(dataset.sequence_lengths.sum()) - 1) // LENGTH
    for epoch in range(3):
        seen = Counter(token for i in range(size) for token in stream[epoch * size + i]["tokens"].tolist())
        everything = Counter(numpy.concatenate(dataset[0 : len(dataset)]).tolist())
        missing = everything - seen
        assert not seen - everything
        assert missing.total() < LENGTH + 1  # the rest that fills no sample
    first, second = ([stream.locate(epoch * size + i).sample for i in range(size)] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(size))


def test_stream_does_not_depend_on_what_was_read_before(blended: DataConfig, tmp_path: Path) -> None:
    """A restart, a longer run and another stage all see the same samples; another seed does not."""
    whole = token_stream_hash(build_train_dataset(blended, LENGTH, 7, tmp_path / "a"), 0, 400)
    again = build_train_dataset(blended, LENGTH, 7, tmp_path / "b")
    backwards = {index: again[index]["tokens"] for index in range(399, -1, -1)}

    class Replay:
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"tokens": backwards[index]}

    assert token_stream_hash(Replay(), 0, 400) == whole
    resumed = build_train_dataset(blended, LENGTH, 7, tmp_path / "a")
    assert token_stream_hash(resumed, 200, 400) == token_stream_hash(again, 200, 400)
    assert token_stream_hash(build_train_dataset(blended, LENGTH, 8, tmp_path / "a"), 0, 400) != whole


def test_stream_does_not_depend_on_where_the_files_lie(prepare: Prepare, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = prepare(40, 2)
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prefix + suffix, tmp_path / f"moved{suffix}")
    here = build_train_dataset(single(prefix, tokenizer), LENGTH, 7, tmp_path / "a")
    there = build_train_dataset(single(str(tmp_path / "moved"), tokenizer), LENGTH, 7, tmp_path / "b")
    assert token_stream_hash(here, 0, 50) == token_stream_hash(there, 0, 50)


def test_every_dataset_of_a_blend_is_visited_epoch_by_epoch() -> None:
    stream = Stream([Numbers(0, 10), Numbers(1, 3), Numbers(2, 7)], [5, 2, 1], seed=1)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for index in range(800):
        dataset, sample = stream[index]["tokens"].tolist()
        seen[dataset].append(sample)
        assert stream.locate(index).epoch == (len(seen[dataset]) - 1) // len(stream.datasets[dataset])
    assert [len(samples) for samples in seen.values()] == [500, 200, 100]
    for dataset, samples in seen.items():
        size = len(stream.datasets[dataset])
        for start in range(0, len(samples) - size + 1, size):
            assert sorted(samples[start : start + size]) == list(range(size))
    with pytest.raises(IndexError):
        stream.locate(-1)


def test_validation_takes_no_sample_twice_and_drops_what_is_used_up() -> None:
    datasets = [Numbers(0, 4), Numbers(1, 50), Numbers(2, 9)]
    full = ValidationSet(datasets, [10, 1, 1], 0, 1000)
    places = [tuple(full[index]["tokens"].tolist()) for index in range(len(full))]
    assert len(full) == len(set(places)) == 63
    assert Counter(name for name, _ in places[:6])[0] == 4
    short = ValidationSet(datasets, [10, 1, 1], 0, 20)
    assert [tuple(short[index]["tokens"].tolist()) for index in range(len(short))] == places[:20]


def test_fixed_validation_set(blended: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = build_validation_dataset(blended, LENGTH, 16, tmp_path / "a")
    second = build_validation_dataset(blended, LENGTH, 16, tmp_path / "b")
    assert first is not None
    assert second is not None
    assert len(first) == 16
    assert token_stream_hash(first, 0, 16) == token_stream_hash(second, 0, 16)
    with caplog.at_level(logging.WARNING):
        all_of_it = build_validation_dataset(blended, LENGTH, 10_000, tmp_path / "a")
    assert all_of_it is not None
    assert 16 < len(all_of_it) < 10_000
    assert f"evaluation.samples is 10000, the validation data hold {len(all_of_it)}" in caplog.text


def test_held_out_documents_are_never_trained_on(prepare: Prepare, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = single(prepare(40, 2), tokenizer, validation_fraction=0.2)
    stream = build_train_dataset(data, 128, 1, tmp_path)
    held_out = build_validation_dataset(data, 128, 1000, tmp_path)
    assert held_out is not None

    def documents(samples: Stream | ValidationSet, count: int) -> set[str]:
        text = (tokenizer.decode(samples[index]["tokens"].tolist()) for index in range(count))
        return {number for sample in text for number in re.findall(r"document 2-(\d+)\n", sample)}

    train, validation = documents(stream, stream.samples_per_epoch[0]), documents(held_out, len(held_out))
    assert train.isdisjoint(validation)
    # A title that two samples share is seen in neither, so not all of 32 and 8 are found.
    assert len(train) > 24
    assert 4 < len(validation) <= 8


def test_without_validation_there_is_none(prepare: Prepare, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert build_validation_dataset(single(prepare(12, 5), tokenizer), LENGTH, 4, tmp_path) is None


def test_less_than_one_sample(prepare: Prepare, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = single(prepare(12, 5), tokenizer)
    with pytest.raises(DataError, match=r"fewer than the 100001 of one sample.*sequence_length"):
        build_train_dataset(data, 100_000, 1, tmp_path)


def test_index_of_changed_files_is_not_reused(prepare: Prepare, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = tmp_path / "data"
    for suffix in (".bin", ".idx"):
        shutil.copy(prepare(40, 2) + suffix, f"{prefix}{suffix}")
    before = build_train_dataset(single(str(prefix), tokenizer), LENGTH, 1, tmp_path / "cache").samples_per_epoch
    for suffix in (".bin", ".idx"):
        shutil.copy(prepare(25, 4) + suffix, f"{prefix}{suffix}")
    after = build_train_dataset(single(str(prefix), tokenizer), LENGTH, 1, tmp_path / "cache").samples_per_epoch
    assert after != before


def build_in_a_process(data: DataConfig, cache: str, gate, results) -> None:
    gate.wait()
    results.put(token_stream_hash(build_train_dataset(data, LENGTH, 1, cache), 0, 20))


def test_several_processes_build_one_index(blended: DataConfig, tmp_path: Path) -> None:
    """No process group: ranks of several hosts that share a file system race for the same folder."""
    context = multiprocessing.get_context("fork")
    gate, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=build_in_a_process, args=(blended, str(tmp_path), gate, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    hashes = {results.get(timeout=TIMEOUT_S) for _ in processes}
    for process in processes:
        process.join()
    assert len(hashes) == 1
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == len(blended.train)
    assert not list(tmp_path.glob("*.partial"))


def test_losing_the_race_keeps_the_winners_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks two processes may build at once."""
    monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))

    def build() -> dict[str, numpy.ndarray]:
        if not (tmp_path / "key").exists():
            index_cache.cached_arrays(tmp_path, "key", lambda: {"a": numpy.arange(3)})
        return {"a": numpy.arange(3)}

    assert index_cache.cached_arrays(tmp_path, "key", build)["a"].tolist() == [0, 1, 2]
    assert not list(tmp_path.glob(".*.partial"))


def test_cache_that_cannot_be_used_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_directory"):
        index_cache.cached_arrays(tmp_path / "file", "key", dict)
    index_cache.cached_arrays(tmp_path, "key", lambda: {"a": numpy.arange(3)})
    (tmp_path / "key" / "a.npy").write_bytes(b"damaged")
    with pytest.raises(DataError, match="remove that folder if it is damaged"):
        index_cache.cached_arrays(tmp_path, "key", dict)
