"""Checks of prepared files, and the fingerprint that goes with a run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from growth_megatron.config.schema import DataConfig
from growth_megatron.data import contents as module_contents
from growth_megatron.data import fingerprint as fingerprints
from growth_megatron.data import prepared
from growth_megatron.data.contents import check_contents, contents
from growth_megatron.data.dataset import InVocabulary
from growth_megatron.data.description import read_description
from growth_megatron.data.fingerprint import check_fingerprint, fingerprint_differences
from growth_megatron.data.prepared import check_data, open_indexed, regions
from growth_megatron.data.tokenizer import Tokenizer, train_tokenizer
from growth_megatron.errors import DataError

Prepare = Callable[[int, int], str]
Fingerprint = Callable[[DataConfig, int, int], dict]


@pytest.fixture
def copy(prepare: Prepare, tmp_path: Path) -> str:
    """A prepared dataset to be damaged."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prepare(12, 5) + suffix, tmp_path / f"data{suffix}")
    return str(tmp_path / "data")


@pytest.fixture
def fingerprint(tmp_path: Path) -> Fingerprint:
    return lambda data, length, seed: fingerprints.fingerprint(data, length, seed, tmp_path / "cache")


def config(prefix: str, tokenizer: Tokenizer, **keywords) -> DataConfig:
    return DataConfig.model_validate({"tokenizer": str(tokenizer.path), "train": [{"path": prefix}], **keywords})


def test_good_data_pass(blended: DataConfig, tokenizer: Tokenizer) -> None:
    check_data(blended, tokenizer.vocab_size)
    check_data(blended, 10 * tokenizer.vocab_size)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_names_path_and_command(copy: str, tokenizer: Tokenizer, suffix: str) -> None:
    Path(copy + suffix).unlink()
    with pytest.raises(DataError, match=rf"no such dataset file: .*data\{suffix}; .*growth-megatron prepare-data"):
        check_data(config(copy, tokenizer), tokenizer.vocab_size)


def test_validation_files_are_checked_too(copy: str, prepare: Prepare, tokenizer: Tokenizer) -> None:
    Path(copy + ".bin").unlink()
    with pytest.raises(DataError, match="no such dataset file"):
        check_data(config(prepare(12, 5), tokenizer, validation=[{"path": copy}]), tokenizer.vocab_size)


def test_damaged_files(copy: str) -> None:
    idx, data = Path(copy + ".idx").read_bytes(), Path(copy + ".bin").read_bytes()
    pointers = 34 + 12 * 4  # where the pointers of the 12 documents begin
    for content, message in [
        (idx[:20], "not a Megatron index"),
        (b"x" * 200, "not a Megatron index"),
        (idx[:-8], "truncated"),
        (idx[:17] + b"\x07" + idx[18:], "not token ids"),
        (idx[:9] + b"\x02" + idx[10:], "version 2, this library reads 1"),
        (idx + bytes(8), "damaged: it has"),
        (idx[:26] + bytes(8) + idx[34 : -13 * 8], "its documents do not fit"),
        (idx[:-8] + bytes(8), "its documents do not fit"),
        (idx[:38] + b"\xff" * 4 + idx[42:], "length or pointer"),
        (idx[:pointers] + b"\x02" + idx[pointers + 1 :], "length or pointer"),
        (idx[: pointers + 8] + b"\xff" * 8 + idx[pointers + 16 :], "length or pointer"),
    ]:
        Path(copy + ".idx").write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_indexed(copy)
    Path(copy + ".idx").write_bytes(idx)
    for content, message in [(data[:-2], "bytes where its .idx says"), (b"", "holds no documents")]:
        Path(copy + ".bin").write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_indexed(copy)


def test_vocabulary_of_the_data_must_fit_the_model(copy: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"tokenizer .* has 320 pieces, the model's vocab_size is 300.*vocab_size to 320"
    ):
        check_data(config(copy, tokenizer), 300)
    description = json.loads(Path(copy + ".json").read_text())
    Path(copy + ".json").write_text(json.dumps({**description, "vocab_size": 50_000}))
    with pytest.raises(DataError, match=r"vocabulary of 50000, the model's vocab_size is 320"):
        check_data(config(copy, tokenizer), 320)


def test_data_of_another_tokenizer(copy: str, corpus: Path, tmp_path: Path) -> None:
    other = train_tokenizer([corpus], tmp_path / "other.model", 310)
    with pytest.raises(DataError, match="another tokenizer"):
        check_data(config(copy, other), 320)


@pytest.mark.parametrize("with_description", [True, False])
def test_ids_that_the_model_does_not_know_are_found_wherever_they_stand(
    copy: str, tokenizer: Tokenizer, tmp_path: Path, with_description: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("growth_megatron.data.contents.BLOCK_BYTES", 64)
    if not with_description:
        Path(copy + ".json").unlink()
    data = config(copy, tokenizer)
    check_data(data, 320)
    check_contents(data.train, 320, tmp_path / "cache")
    values = numpy.fromfile(copy + ".bin", dtype=numpy.uint16)
    largest = int(values.max())
    assert contents(copy, tmp_path / "cache").largest_token == largest
    with pytest.raises(DataError, match=f"holds token {largest}, the model's vocab_size is {largest}"):
        check_contents(data.train, largest, tmp_path / "cache")
    values[len(values) // 3] = 4000
    values.tofile(copy + ".bin")
    wanted = "not have the checksum that" if with_description else "holds token 4000, the model's vocab_size is 320"
    with pytest.raises(DataError, match=wanted):
        check_contents(data.train, 320, tmp_path / "cache")


def test_ids_below_zero_are_found(copy: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    Path(copy + ".json").unlink()
    builder = IndexedDatasetBuilder(copy + ".bin", dtype=numpy.int32)
    builder.add_document(numpy.array([3, -1, 2]), [3])
    builder.finalize(copy + ".idx")
    with pytest.raises(DataError, match="holds token -1"):
        check_contents(config(copy, tokenizer).train, 320, tmp_path)


def test_what_was_prepared_is_recorded(copy: str) -> None:
    found = read_description(copy)
    assert found is not None
    assert found.bin_sha256 == hashlib.sha256(Path(copy + ".bin").read_bytes()).hexdigest()
    assert found.largest_token == int(numpy.fromfile(copy + ".bin", dtype=numpy.uint16).max())


def test_files_are_read_whole_once_and_again_when_they_change(
    copy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[str] = []
    scan = module_contents._scan
    monkeypatch.setattr(module_contents, "_scan", lambda prefix: scans.append("") or scan(prefix))  # type: ignore[func-returns-value]
    first = contents(copy, tmp_path / "cache")
    assert contents(copy, tmp_path / "cache") == first
    assert len(scans) == 1
    os.utime(copy + ".bin", ns=(1, 1))
    assert contents(copy, tmp_path / "cache") == first
    assert len(scans) == 2


@pytest.mark.parametrize(("name", "value"), [("tokens", 320), ("labels", 320), ("labels", -1)])
def test_a_sample_with_an_unknown_id_is_refused_when_it_is_read(name: str, value: int) -> None:
    good = {"tokens": torch.tensor([1, 319]), "labels": torch.tensor([0, 2])}
    bad = {**good, name: torch.tensor([1, value])}
    samples = InVocabulary([good, bad], 320)
    assert samples[0] is good
    with pytest.raises(DataError, match=rf"sample 1 of the data holds token {value}, the model's vocab_size is 320"):
        samples[1]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 99}'])
def test_damaged_description(copy: str, content: str) -> None:
    Path(copy + ".json").write_text(content)
    with pytest.raises(DataError, match="prepare the data again"):
        read_description(copy)


def test_regions_of_a_large_file_hold_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "REGIONS", 4)
    monkeypatch.setattr(prepared, "REGION_BYTES", 16)
    content = bytes(range(203))
    (tmp_path / "a").write_bytes(content)
    parts = list(regions(tmp_path / "a", 64))
    assert len(parts) == 5
    assert parts[0] == content[:16]
    assert parts[-1] == content[-8:]
    assert all(part in content for part in parts)
    assert b"".join(regions(tmp_path / "a", 300)) == content


def test_fingerprint_is_stable_and_fits_json(blended: DataConfig, fingerprint: Fingerprint) -> None:
    saved = json.loads(json.dumps(fingerprint(blended, 32, 1)))
    check_fingerprint(saved, fingerprint(blended, 32, 1))


def test_moved_files_are_the_same_data(
    copy: str, prepare: Prepare, tokenizer: Tokenizer, fingerprint: Fingerprint
) -> None:
    here, there = (fingerprint(config(prefix, tokenizer), 32, 1) for prefix in (prepare(12, 5), copy))
    assert here != there
    check_fingerprint(here, there)


def test_every_change_of_the_data_is_named(
    blended: DataConfig, copy: str, tokenizer: Tokenizer, fingerprint: Fingerprint
) -> None:
    base = config(copy, tokenizer)
    saved = fingerprint(base, 32, 1)

    def named(current: dict) -> list[str]:
        return [line.split(":")[0] for line in fingerprint_differences(saved, current)]

    assert named(fingerprint(base, 64, 1)) == ["data.sequence_length"]
    assert named(fingerprint(base, 32, 2)) == ["data.seed"]
    assert named(fingerprint(config(copy, tokenizer, validation_fraction=0.1), 32, 1)) == ["data.validation_fraction"]
    assert named(fingerprint(config(copy, tokenizer, train=[{"path": copy, "weight": 2}]), 32, 1)) == [
        "data.train[0].weight"
    ]
    more = fingerprint(config(copy, tokenizer, train=[{"path": copy}, {"path": copy}]), 32, 1)
    assert {name.split(".")[1] for name in named(more)} == {"train[0]", "train[1]"}  # by its tokens
    data = bytearray(Path(copy + ".bin").read_bytes())
    data[100] ^= 1
    Path(copy + ".bin").write_bytes(data)
    Path(copy + ".json").unlink()
    assert named(fingerprint(base, 32, 1)) == ["data.train[0].bin_sha256", "data.train[0].bin_content_sha256"]
    with pytest.raises(DataError, match=r"not those the checkpoint was trained on:\n  data\.train\[0\]\.bin_sha256.*"):
        check_fingerprint(saved, fingerprint(base, 32, 1))
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight: 1\.5 in the checkpoint, absent now"):
        check_fingerprint(fingerprint(blended, 32, 1), fingerprint(base, 32, 1))


def test_a_change_far_from_the_ends_of_a_large_file_is_seen(
    copy: str, tokenizer: Tokenizer, fingerprint: Fingerprint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "regions", lambda path, *whole: [path.read_bytes()[:100]])
    Path(copy + ".json").unlink()
    saved = fingerprint(config(copy, tokenizer), 32, 1)
    data = bytearray(Path(copy + ".bin").read_bytes())
    data[300] ^= 1
    Path(copy + ".bin").write_bytes(data)
    with pytest.raises(DataError, match=r"data\.train\[0\]\.bin_content_sha256"):
        check_fingerprint(saved, fingerprint(config(copy, tokenizer), 32, 1))


def test_a_checkpoint_of_an_earlier_version_is_judged_by_what_it_holds(
    copy: str, tokenizer: Tokenizer, fingerprint: Fingerprint
) -> None:
    now = fingerprint(config(copy, tokenizer), 32, 1)
    names = ("bin_content_sha256", "idx_content_sha256")
    then = {key: value for key, value in now["train"][0].items() if key not in names}
    saved = {**now, "version": 1, "train": [then]}
    check_fingerprint(saved, now)
    saved["train"] = [{**then, "bin_sha256": "0" * 64}]
    with pytest.raises(DataError, match="bin_sha256"):
        check_fingerprint(saved, now)
