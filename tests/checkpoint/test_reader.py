"""DistCheckpoint reads any region of any tensor, in both stored forms, and trusts nothing it reads."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, read_common, read_metadata
from growth_megatron.errors import CheckpointError
from growth_megatron.model.tensors import TensorSpec
from tests.checkpoint.written import extra_states, geometry, model_tensors, write_checkpoint, write_distributed

QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
Stored = tuple[DistCheckpoint, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=[(False, 1), (False, 3), (True, 1), (True, 2)], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    stacked, parts = request.param
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = write_checkpoint(folder, geometry(3), stacked=stacked, parts=parts)
    return DistCheckpoint(folder), tensors


def test_keys_shapes_and_values_are_those_written_with_one_key_per_layer(stored: Stored) -> None:
    checkpoint, tensors = stored
    assert set(checkpoint.keys()) == set(tensors)
    for key, tensor in tensors.items():
        assert checkpoint.spec(key) == TensorSpec(tuple(tensor.shape), tensor.dtype)
        assert torch.equal(checkpoint.read(key), tensor)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_region_is_the_same_as_slicing_the_tensor(stored: Stored, data: st.DataObject) -> None:
    checkpoint, tensors = stored
    key = data.draw(st.sampled_from(sorted(tensors)))
    region = []
    for size in tensors[key].shape:
        start = data.draw(st.integers(0, size))
        region.append(slice(start, data.draw(st.integers(start, size))))
    assert torch.equal(checkpoint.read(key, tuple(region)), tensors[key][tuple(region)])


def test_a_region_does_not_keep_the_whole_chunk_in_memory(stored: Stored) -> None:
    part = stored[0].read(QKV, (slice(2, 3), slice(0, 8)))
    assert part.untyped_storage().nbytes() == part.nbytes


def test_objects_are_read_as_stored(stored: Stored) -> None:
    checkpoint, _ = stored
    assert {key: checkpoint.read_object(key) for key in checkpoint.object_keys()} == extra_states(geometry(3))


def test_a_region_outside_the_tensor_is_refused(stored: Stored) -> None:
    checkpoint, tensors = stored
    rows, columns = tensors[QKV].shape
    for region in [
        (slice(0, rows + 1), slice(0, columns)),
        (slice(-1, rows), slice(0, columns)),
        (slice(0, rows, 2), slice(0, columns)),
        (slice(None), slice(0, columns)),
        (slice(0, rows),),
    ]:
        with pytest.raises(CheckpointError, match="is not within it"):
            checkpoint.read(QKV, region)


def test_plain_torch_dcp_agrees(tmp_path: Path) -> None:
    """Both ways: files of torch DCP are read here, and the files written for these tests are read by torch DCP."""
    tensors = model_tensors(geometry(2))
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "dcp", no_dist=True)
    theirs = DistCheckpoint(tmp_path / "dcp")
    assert all(torch.equal(theirs.read(key), tensor) for key, tensor in tensors.items())
    write_distributed(tmp_path / "ours", tensors, parts=2)
    loaded = {key: torch.empty_like(tensor) for key, tensor in tensors.items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "ours", no_dist=True)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_a_missing_tensor_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a torch_dist checkpoint"):
        DistCheckpoint(tmp_path / "nothing")
    write_checkpoint(tmp_path / "a", geometry(2))
    with pytest.raises(CheckpointError, match="holds no tensor decoder.layers.2"):
        DistCheckpoint(tmp_path / "a").read("decoder.layers.2.mlp.linear_fc2.weight")
    with pytest.raises(CheckpointError, match="holds no object x"):
        DistCheckpoint(tmp_path / "a").read_object("x")


def test_half_of_the_metadata_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, geometry(2))
    content = (tmp_path / ".metadata").read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (tmp_path / ".metadata").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
            DistCheckpoint(tmp_path)


class _Trap:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, torch.load, getattr], ids=lambda f: f.__name__)
def test_metadata_that_calls_something_is_refused_and_not_run(tmp_path: Path, function: Any) -> None:
    marker = tmp_path / "ran"
    trap = _Trap(function, f"touch {marker}") if function is os.system else _Trap(function, str(marker), "x")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(trap))
    with pytest.raises(CheckpointError, match="do not trust it"):
        read_metadata(tmp_path)
    assert not marker.exists()


def test_metadata_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="holds a dict"):
        read_metadata(tmp_path)


def test_data_that_calls_something_is_refused_and_not_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, geometry(2))
    marker = tmp_path / "ran"
    checkpoint = DistCheckpoint(tmp_path)
    torch.save(_Trap(os.system, f"touch {marker}"), tmp_path / "trap")
    trap = (tmp_path / "trap").read_bytes()
    (tmp_path / "common.pt").write_bytes(trap)
    with pytest.raises(CheckpointError, match="cannot be loaded safely"):
        read_common(tmp_path)
    for name in ("__0_0.distcp", "__0_1.distcp"):
        (tmp_path / name).write_bytes(trap)
    for info in checkpoint.metadata.storage_data.values():
        info.offset, info.length = 0, len(trap)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read(QKV)
    assert not marker.exists()


def test_metadata_that_names_anything_but_data_files_within_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", geometry(2))
    metadata = read_metadata(tmp_path / "a")
    for name in ("../b/__0_0.distcp", "/b/__0_0.distcp", "common.pt", ""):
        for info in metadata.storage_data.values():
            info.relative_path = name
        (tmp_path / "a/.metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="do not trust it"):
            read_metadata(tmp_path / "a")


@pytest.mark.parametrize("layers", [2**14 + 1, 2**40])
def test_more_layers_than_any_model_has_are_refused_at_once(tmp_path: Path, layers: int) -> None:
    write_checkpoint(tmp_path, geometry(2), stacked=True)
    metadata = read_metadata(tmp_path)
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.size = torch.Size((layers, *entry.size[1:]))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=f"{layers} layers; allowed"):
        DistCheckpoint(tmp_path)


def test_a_truncated_or_missing_data_file_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, geometry(2))
    for name in ("__0_0.distcp", "__0_1.distcp"):
        os.truncate(tmp_path / name, 3000)
    with pytest.raises(CheckpointError, match=r"__0_\d.distcp: decoder.*at byte \d+ is damaged"):
        DistCheckpoint(tmp_path).read(QKV)
    for name in ("__0_0.distcp", "__0_1.distcp"):
        (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=r"__0_\d.distcp cannot be read"):
        DistCheckpoint(tmp_path).read(QKV)


def test_a_tensor_with_a_hole_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, geometry(2), parts=2)
    checkpoint = DistCheckpoint(tmp_path)
    stored: Any = checkpoint.metadata.state_dict_metadata[QKV]
    stored.chunks.pop()
    with pytest.raises(CheckpointError, match="holes"):
        checkpoint.read(QKV)


def test_common_state_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, geometry(2))
    assert read_common(tmp_path)["iteration"] == 100
    (tmp_path / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common.pt is missing"):
        read_common(tmp_path)
