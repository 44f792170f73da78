"""Checks of prepared files, and the fingerprint that goes with a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from growth_megatron.config.schema import DataConfig
from growth_megatron.data import prepared
from growth_megatron.data.fingerprint import check_fingerprint, fingerprint, fingerprint_differences
from growth_megatron.data.prepared import check_data, largest_sampled_token, open_indexed, read_description, regions
from growth_megatron.data.tokenizer import Tokenizer, train_tokenizer
from growth_megatron.errors import DataError

Prepare = Callable[[int, int], str]


@pytest.fixture
def copy(prepare: Prepare, tmp_path: Path) -> str:
    """A prepared dataset to be damaged."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(prepare(12, 5) + suffix, tmp_path / f"data{suffix}")
    return str(tmp_path / "data")


def config(prefix: str, tokenizer: Tokenizer, **keywords) -> DataConfig:
    return DataConfig.model_validate({"tokenizer": str(tokenizer.path), "train": [{"path": prefix}], **keywords})


def test_good_data_pass(blended: DataConfig, tokenizer: Tokenizer) -> None:
    check_data(blended, tokenizer.vocab_size)
    check_data(blended, 10 * tokenizer.vocab_size)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file_names_path_and_command(copy: str, tokenizer: Tokenizer, suffix: str) -> None:
    Path(copy + suffix).unlink()
    with pytest.raises(DataError, match=rf"data\{suffix} does not exist.*growth-megatron prepare-data"):
        check_data(config(copy, tokenizer), tokenizer.vocab_size)


def test_validation_files_are_checked_too(copy: str, prepare: Prepare, tokenizer: Tokenizer) -> None:
    Path(copy + ".bin").unlink()
    with pytest.raises(DataError, match="does not exist"):
        check_data(config(prepare(12, 5), tokenizer, validation=[{"path": copy}]), tokenizer.vocab_size)


def test_damaged_files(copy: str) -> None:
    idx, data = Path(copy + ".idx").read_bytes(), Path(copy + ".bin").read_bytes()
    for content, message in [
        (idx[:20], "not a Megatron index"),
        (b"x" * 200, "not a Megatron index"),
        (idx[:-8], "truncated"),
        (idx[:17] + b"\x07" + idx[18:], "not token ids"),
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


def test_data_without_our_description_are_judged_by_their_tokens(copy: str, tokenizer: Tokenizer) -> None:
    Path(copy + ".json").unlink()
    check_data(config(copy, tokenizer), 320)
    assert largest_sampled_token(copy) == max(int(row.max()) for row in open_indexed_rows(copy))
    values = numpy.fromfile(copy + ".bin", dtype=numpy.uint16)
    values[-1] = 4000
    values.tofile(copy + ".bin")
    with pytest.raises(DataError, match="holds token 4000, the model's vocab_size is 320"):
        check_data(config(copy, tokenizer), 320)


def open_indexed_rows(prefix: str) -> list[numpy.ndarray]:
    dataset = open_indexed(prefix)
    return [row.copy() for row in dataset[0 : len(dataset)]]


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


def test_fingerprint_is_stable_and_fits_json(blended: DataConfig) -> None:
    saved = json.loads(json.dumps(fingerprint(blended, 32, 1)))
    check_fingerprint(saved, fingerprint(blended, 32, 1))


def test_moved_files_are_the_same_data(copy: str, prepare: Prepare, tokenizer: Tokenizer) -> None:
    here, there = (fingerprint(config(prefix, tokenizer), 32, 1) for prefix in (prepare(12, 5), copy))
    assert here != there
    check_fingerprint(here, there)


def test_every_change_of_the_data_is_named(blended: DataConfig, copy: str, tokenizer: Tokenizer) -> None:
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
    assert {name.split(".")[1] for name in named(more)} == {"train[1]"}
    data = bytearray(Path(copy + ".bin").read_bytes())
    data[100] ^= 1
    Path(copy + ".bin").write_bytes(data)
    assert named(fingerprint(base, 32, 1)) == ["data.train[0].bin_sha256"]
    with pytest.raises(DataError, match=r"not those the checkpoint was trained on:\n  data\.train\[0\]\.bin_sha256.*"):
        check_fingerprint(saved, fingerprint(base, 32, 1))
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight: 1\.5 in the checkpoint, absent now"):
        check_fingerprint(fingerprint(blended, 32, 1), fingerprint(base, 32, 1))
