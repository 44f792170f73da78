"""The manifest is read strictly, and validation finds every kind of damage it is there to find."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.checkpoint.folder.manifest import (
    GrowthRecord,
    checksum_files,
    list_files,
    read_identified_manifest,
    read_manifest,
    validate_checkpoint,
    write_manifest,
)
from growth_megatron.errors import CheckpointError
from tests.checkpoint.written import geometry, manifest_of, write_checkpoint


def _record() -> GrowthRecord:
    return GrowthRecord(
        operator="stack",
        options={"note": "a", "factors": [1, 2.5]},
        layers=(0, 1, 0, 1),
        optimizer_state="reset",
        step=100,
        source="runs/a",
        source_manifest_sha256="0" * 64,
        source_geometry=geometry(2),
        target_geometry=geometry(4),
        seed=3,
        library_version="0.1",
    )


@settings(deadline=None)
@given(flops=st.floats(0, 1e30), step=st.integers(0, 2**40), loss=st.floats(allow_nan=False) | st.none())
def test_a_manifest_comes_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, flops: float, step: int, loss: float | None
) -> None:
    folder = tmp_path_factory.mktemp("m")
    lineage = (_record(), _record().model_copy(update={"validation_loss_before": loss}))
    manifest = manifest_of(geometry(4), step, flops=flops, lineage=lineage)
    identity = write_manifest(folder, manifest)
    assert read_identified_manifest(folder) == (manifest, identity)


def test_the_identity_covers_every_field(tmp_path: Path) -> None:
    manifest = manifest_of(geometry(2))
    others = [
        manifest.model_copy(update={"step": 101}),
        manifest.model_copy(update={"lineage": (_record(),)}),
        manifest.model_copy(update={"geometry": geometry(3)}),
    ]
    assert len({write_manifest(tmp_path, each) for each in (manifest, *others)}) == 4


def test_fields_that_came_later_do_not_change_the_identity(tmp_path: Path) -> None:
    """As a manifest of an earlier version has it: without a field, or with null where a default is filled in now."""
    write_manifest(tmp_path, manifest_of(geometry(2), lineage=(_record(),)))

    def as_before(fields: dict[str, Any]) -> None:
        del fields["validation_loss"]
        fields["geometry"]["head_dim"] = None

    _rewrite(tmp_path, as_before)
    manifest, identity = read_identified_manifest(tmp_path)
    assert identity == json.loads((tmp_path / "manifest.json").read_text())["manifest_sha256"]
    assert (manifest.validation_loss, manifest.geometry.head_dim) == (None, 2)
    assert write_manifest(tmp_path, manifest) != identity


def _rewrite(folder: Path, change: Callable[[dict[str, object]], None], sign: bool = True) -> None:
    fields = json.loads((folder / "manifest.json").read_text())
    change(fields)
    if sign:
        fields.pop("manifest_sha256")
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        fields["manifest_sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda fields: fields.update(extra=1), "extra: Extra inputs"),
        (lambda fields: fields.update(step="100"), "step: Input should be a valid integer"),
        (lambda fields: fields.update(step=-1), "step: Input should be greater"),
        (lambda fields: fields.pop("geometry"), "geometry: Field required"),
        (lambda fields: fields.update(format_version=2), "format version 2; this library reads version 1"),
    ],
)
def test_wrong_fields_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, object]], None], says: str
) -> None:
    write_manifest(tmp_path, manifest_of(geometry(2)))
    _rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=says):
        read_manifest(tmp_path)


def test_an_edited_manifest_is_noticed(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest_of(geometry(2)))
    _rewrite(tmp_path, lambda fields: fields.update(step=99), sign=False)
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        read_manifest(tmp_path)


def test_every_truncation_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest_of(geometry(2)))
    content = (tmp_path / "manifest.json").read_bytes()
    for length in range(len(content.rstrip())):
        (tmp_path / "manifest.json").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_manifest(tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "step_00000100", geometry(2))
    return tmp_path / "step_00000100"


def test_a_whole_checkpoint_is_valid(checkpoint: Path) -> None:
    assert validate_checkpoint(checkpoint) is None
    assert validate_checkpoint(checkpoint, full=True) is None


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json"])
def test_a_missing_or_shortened_file_is_found_cheaply(checkpoint: Path, name: str) -> None:
    size = (checkpoint / name).stat().st_size
    os.truncate(checkpoint / name, size - 1)
    assert validate_checkpoint(checkpoint) == f"{name} has {size - 1} bytes, the manifest says {size}"
    (checkpoint / name).unlink()
    assert str(validate_checkpoint(checkpoint)).startswith(f"{name} is missing")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "metadata.json"])
def test_a_flipped_bit_is_found_by_the_full_check_only(checkpoint: Path, name: str) -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)
    assert validate_checkpoint(checkpoint) is None
    assert str(validate_checkpoint(checkpoint, full=True)).startswith(f"{name} does not match its checksum")


def test_a_checkpoint_without_a_manifest_or_megatrons_files_is_not_valid(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    files = {name: entry for name, entry in manifest.files.items() if name != ".metadata"}
    write_manifest(checkpoint, manifest.model_copy(update={"files": files}))
    assert validate_checkpoint(checkpoint) == ".metadata is not in the manifest"
    (checkpoint / "manifest.json").unlink()
    assert "did not finish" in str(validate_checkpoint(checkpoint))
    assert validate_checkpoint(checkpoint / "nothing") == "not a folder"


def test_checksums_are_those_of_the_contents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    contents = {"a": b"", "b": b"x" * 3_000_000, "sub/c": b"y"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".manifest.json.partial").write_bytes(b"left over")
    assert list_files(tmp_path) == ["a", "b", "sub/c"]
    sums = checksum_files(tmp_path, list_files(tmp_path))
    for name, content in contents.items():
        assert sums[name].size_bytes == len(content)
        assert sums[name].sha256 == hashlib.sha256(content).hexdigest()
