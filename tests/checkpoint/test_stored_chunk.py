"""Regions read straight out of torch.save's files: any layout, bounded memory, torch.load where a file is not plain."""

from __future__ import annotations

import collections
import itertools
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.checkpoint.torch_dist import reader as source_module
from growth_megatron.checkpoint.torch_dist import stored_chunk
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.checkpoint.torch_dist.stored_chunk import NotPlainError, StoredChunk, locate_chunk, read_region
from growth_megatron.errors import CheckpointError
from growth_megatron.model.tensors import (
    FIRST_MOMENT_PREFIX,
    MASTER_PREFIX,
    SECOND_MOMENT_PREFIX,
    TensorSpec,
    WithFreshOptimizer,
    read_state,
    whole,
)
from tests.checkpoint.written import geometry, model_tensors, write_checkpoint, write_distributed

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 120, shape, generator=generator).to(dtype)


LAYOUTS = {
    "contiguous": lambda d: values(9, 5, 4, dtype=d),
    "one axis": lambda d: values(11, dtype=d),
    "no axis": lambda d: values(dtype=d),
    "transposed": lambda d: values(4, 9, dtype=d).t(),
    "permuted": lambda d: values(4, 3, 5, dtype=d).permute(2, 0, 1),
    "part of a larger storage": lambda d: values(12, 8, dtype=d)[2:9, 3:6],
    "every other row": lambda d: values(12, 8, dtype=d)[::2],
    "one row": lambda d: values(1, 8, dtype=d),
    "one column": lambda d: values(8, 1, dtype=d),
    "constant": lambda d: torch.ones(1, dtype=d).expand(6, 5),
    "constant rows": lambda d: values(5, dtype=d).expand(6, 5),
    "empty": lambda d: values(0, 5, dtype=d),
}


def saved(tensor: Any, path: Path, before: bytes = b"x" * 37) -> tuple[Path, int, int]:
    """Path, offset and length of a tensor saved in the middle of a file."""
    torch.save(tensor, path)
    content = path.read_bytes()
    path.write_bytes(before + content + b"y" * 100)
    return path, len(before), len(content)


def read(path: Path, stored: StoredChunk, region: tuple[slice, ...]) -> torch.Tensor:
    out = torch.empty([part.stop - part.start for part in region], dtype=stored.dtype)
    read_region(path, stored, region, out)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_saved(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](dtype)
    place = saved(tensor, tmp_path / "file")
    stored = locate_chunk(*place)
    assert stored.shape == tuple(tensor.shape)
    assert stored.stride == tensor.stride()
    assert stored.is_constant == (layout == "constant")
    if layout in ("constant", "constant rows"):
        with pytest.raises(NotPlainError, match="overlap"):
            read(place[0], stored, whole(stored.shape))
    else:
        assert torch.equal(read(place[0], stored, whole(stored.shape)), tensor)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_region_of_any_layout_into_any_layout(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """With scratch memory of a few elements, so that every way of cutting up a read is taken."""
    name = data.draw(st.sampled_from([name for name in LAYOUTS if not name.startswith("constant")]))
    tensor = LAYOUTS[name](torch.float32)
    path, offset, length = saved(tensor, tmp_path_factory.mktemp("chunk") / "file")
    region = []
    for size in tensor.shape:
        start = data.draw(st.integers(0, size))
        region.append(slice(start, data.draw(st.integers(start, size))))
    expected = tensor[tuple(region)]
    order = data.draw(st.permutations(range(tensor.dim())))
    out = torch.full([expected.shape[n] for n in order], -1.0).permute([order.index(n) for n in range(tensor.dim())])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_chunk, "_SCRATCH_BYTES", data.draw(st.sampled_from([4, 40, 1 << 20])))
        patch.setattr(stored_chunk, "_DIRECT_BYTES", data.draw(st.sampled_from([4, 24, 1 << 16])))
        patch.setattr(stored_chunk, "_LARGEST_GAP_BYTES", data.draw(st.sampled_from([0, 1 << 15])))
        read_region(path, locate_chunk(path, offset, length), tuple(region), out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_a_destination_of_another_layout_than_the_file_s_is_filled_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    tensor = LAYOUTS[layout](torch.float32)
    path, offset, length = saved(tensor, tmp_path / "file")
    monkeypatch.setattr(stored_chunk, "_SCRATCH_BYTES", 8)
    for order in itertools.permutations(range(3)):
        out = torch.full([tensor.shape[n] for n in order], -1.0).permute([order.index(n) for n in range(3)])
        read_region(path, locate_chunk(path, offset, length), whole(tuple(tensor.shape)), out)
        assert torch.equal(out, tensor), order


@pytest.fixture
def no_torch_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(source_module.torch, "load", refused)


@pytest.mark.usefixtures("no_torch_load")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_saves_is_read_without_torch_load(tmp_path: Path, dtype: torch.dtype) -> None:
    """Otherwise every test of values here would pass with the slow way alone."""
    tensor = values(40, 6, dtype=dtype)
    write_distributed(tmp_path, {"a": tensor}, parts=3)
    assert torch.equal(DistCheckpoint(tmp_path).read("a"), tensor)
    assert torch.equal(DistCheckpoint(tmp_path).read("a", (slice(3, 30), slice(2, 4))), tensor[3:30, 2:4])


def rss_anon_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def peak_of(action: Any) -> int:
    """Anonymous memory that ``action`` adds at most, sampled at every read of a file."""
    before, peak, preadv = rss_anon_bytes(), 0, os.preadv

    def watched(*arguments: Any) -> int:
        nonlocal peak
        count = preadv(*arguments)
        peak = max(peak, rss_anon_bytes() - before)
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", watched)
        action()
    return max(peak, rss_anon_bytes() - before)


def test_a_few_rows_or_columns_of_a_large_chunk_cost_no_more_memory_than_they_hold(tmp_path: Path) -> None:
    rows, columns = 6400, 4096  # 100 MiB
    torch.save(torch.arange(rows)[:, None] * 1.0 + torch.zeros(columns), tmp_path / "large")
    length = (tmp_path / "large").stat().st_size
    stored = locate_chunk(tmp_path / "large", 0, length)
    read(tmp_path / "large", stored, (slice(0, 1), slice(0, 1)))  # what is imported or set up at the first read
    part = (slice(rows - 9, rows), slice(0, columns))
    assert peak_of(lambda: read(tmp_path / "large", stored, part)) < 10 << 20
    strip = (slice(0, rows), slice(columns - 3, columns))
    assert peak_of(lambda: read(tmp_path / "large", stored, strip)) < 10 << 20
    got = read(tmp_path / "large", stored, strip)
    assert torch.equal(got, torch.arange(rows)[:, None].expand(rows, 3).float())
    # the measurement sees what a whole load costs
    assert peak_of(lambda: read(tmp_path / "large", stored, whole(stored.shape))) > 90 << 20


def test_the_pickle_of_a_chunk_calls_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for trap in (Trap(), collections.OrderedDict(a=Trap()), [torch.zeros(2)], torch.nn.Parameter(torch.zeros(2))):
        with pytest.raises(NotPlainError):
            locate_chunk(*saved(trap, tmp_path / "file"))
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_claims_more_than_its_data_is_not_read(tmp_path: Path) -> None:
    path, offset, length = saved(torch.zeros(4, 4), tmp_path / "file")
    content = path.read_bytes()
    for found, instead in ((b"K\x04K\x04\x86", b"K\x04K\x05\x86"), (b"K\x04K\x01\x86", b"K\x7fK\x01\x86")):
        assert content.count(found) == 1  # the shape and the stride in the pickle
        path.write_bytes(content.replace(found, instead))
        with pytest.raises(NotPlainError, match="less data"):
            locate_chunk(path, offset, length)


def located_and_read(path: Path, length: int) -> torch.Tensor:
    stored = locate_chunk(path, 0, length)
    return read(path, stored, whole(stored.shape))


def test_kinds_that_are_not_plain_are_loaded_by_torch(tmp_path: Path) -> None:
    """The old format of torch.save, a compressed archive, a parameter, rows that are one row."""
    tensor = values(6, 5)
    for kind in ("legacy", "compressed", "parameter", "constant rows"):
        folder = tmp_path / kind
        write_distributed(folder, {"a": tensor})
        checkpoint = DistCheckpoint(folder)
        expected = tensor[1].expand(6, 5) if kind == "constant rows" else tensor
        content = torch.nn.Parameter(tensor) if kind == "parameter" else expected
        torch.save(content, folder / "__0_0.distcp", _use_new_zipfile_serialization=kind != "legacy")
        if kind == "compressed":
            with zipfile.ZipFile(folder / "__0_0.distcp") as stored:
                records = {name: stored.read(name) for name in stored.namelist()}
            with zipfile.ZipFile(folder / "__0_0.distcp", "w", zipfile.ZIP_DEFLATED) as packed:
                for name, data in records.items():
                    packed.writestr(name, data)
        (info,) = checkpoint.metadata.storage_data.values()
        info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size
        with pytest.raises(NotPlainError):
            located_and_read(folder / "__0_0.distcp", info.length)
        assert torch.equal(checkpoint.read("a", (slice(2, 5), slice(1, 4))), expected[2:5, 1:4])


def outcome_of_reading(checkpoint: DistCheckpoint, tensor: torch.Tensor) -> str:
    try:
        got = checkpoint.read("a")
    except CheckpointError as error:
        return "refused" if "__0_0.distcp: a at byte 0 is" in str(error) else str(error)
    return "right" if torch.equal(got, tensor) else "wrong"


def test_damage_anywhere_in_a_chunk_s_description_is_an_error_or_the_right_values(tmp_path: Path) -> None:
    tensor = values(30, 7)
    write_distributed(tmp_path, {"a": tensor})
    path = tmp_path / "__0_0.distcp"
    content = path.read_bytes()
    data = content.index(tensor.numpy().tobytes())
    described = [*range(data), *range(data + tensor.nbytes, len(content))]
    outcomes: collections.Counter[str] = collections.Counter()
    for position in described[::3]:
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :])
        outcomes[outcome_of_reading(DistCheckpoint(tmp_path), tensor)] += 1
    assert outcomes.keys() <= {"refused", "right", "wrong"}
    assert outcomes["refused"] > 50
    # An altered description can be a sound one of other values; what the file's checksum is for.
    assert outcomes["wrong"] <= 0.05 * sum(outcomes.values()), outcomes


@pytest.mark.parametrize("after_locating", [False, True])
def test_a_truncated_chunk_is_an_error_at_every_length(tmp_path: Path, after_locating: bool) -> None:
    tensor = values(300, 7)
    write_distributed(tmp_path, {"a": tensor})
    size = (tmp_path / "__0_0.distcp").stat().st_size
    checkpoint = DistCheckpoint(tmp_path)
    if after_locating:
        assert torch.equal(checkpoint.read("a"), tensor)
    # Once it is known where the data lie, the end of the archive is not needed any more.
    for length in (*(() if after_locating else (size - 1, size - 700)), size // 2, 100, 1, 0):
        os.truncate(tmp_path / "__0_0.distcp", length)
        with pytest.raises(CheckpointError, match=r"__0_0.distcp: a at byte 0 is damaged"):
            checkpoint.read("a")


def test_zeros_of_stride_zero_come_back_as_such(tmp_path: Path) -> None:
    zeros = torch.zeros(1).expand(60, 40)
    for number, part in enumerate((zeros, torch.ones(1).expand(60, 40), torch.full((1,), -0.0).expand(60, 40))):
        torch.save(part, tmp_path / f"part{number}")
    write_distributed(tmp_path / "c", {"a": torch.zeros(120, 40)}, parts=2)

    def store(*parts: int) -> DistCheckpoint:
        checkpoint = DistCheckpoint(tmp_path / "c")
        for info, part in zip(checkpoint.metadata.storage_data.values(), parts, strict=True):
            path = tmp_path / f"part{part}"
            (tmp_path / "c" / path.name).write_bytes(path.read_bytes())
            info.relative_path, info.offset, info.length = path.name, 0, path.stat().st_size
        return checkpoint

    got = store(0, 0).read("a", (slice(10, 100), slice(3, 30)))
    assert got.shape == (90, 27)
    assert got.stride() == (0, 0)
    assert not got.any()
    mixed = store(0, 1).read("a")
    assert mixed.is_contiguous()
    assert torch.equal(mixed, torch.cat([zeros, zeros + 1]))
    signs = store(0, 2).read("a")  # equal, but not the same bits
    assert signs.is_contiguous()
    assert torch.equal(signs.signbit(), torch.cat([zeros, zeros + 1]).bool())
    assert store(1, 1).read("a", (slice(59, 61), slice(0, 1))).tolist() == [[1.0], [1.0]]


def test_many_threads_read_one_checkpoint(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path, geometry(3), stacked=True, parts=2)
    checkpoint = DistCheckpoint(tmp_path)
    keys = [key for key in tensors for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: torch.equal(checkpoint.read(key), tensors[key]), keys))


class InMemory:
    """A source that counts what it computes."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.reads = tensors, 0

    def keys(self) -> list[str]:
        return list(self.tensors)

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(tuple(self.tensors[key].shape), self.tensors[key].dtype)

    def read(self, key: str, region: tuple[slice, ...]) -> torch.Tensor:
        self.reads += 1
        return self.tensors[key][region]


def test_fresh_optimizer_state_is_the_weight_and_zeros_that_cost_nothing() -> None:
    weights = model_tensors(geometry(2), optimizer=False)
    inner = InMemory(weights)
    source = WithFreshOptimizer(inner)
    assert set(source.keys()) == set(model_tensors(geometry(2)))
    for key, weight in weights.items():
        everything = whole(tuple(weight.shape))
        again, master = read_state(source, key, everything, ("", MASTER_PREFIX))
        assert torch.equal(again, weight)
        assert master.dtype == torch.float32
        assert torch.equal(master, weight.float())
        assert source.spec(key) == TensorSpec(tuple(weight.shape), torch.bfloat16)
        for prefix in (FIRST_MOMENT_PREFIX, SECOND_MOMENT_PREFIX):
            moment = source.read(prefix + key, everything)
            assert (
                source.spec(prefix + key)
                == TensorSpec(tuple(weight.shape), torch.float32)
                == TensorSpec(tuple(moment.shape), moment.dtype)
            )
            assert not moment.any()
            assert moment.untyped_storage().nbytes() == 4
    assert inner.reads == len(weights)  # the master of the same rows is made from the weights at hand


def test_a_master_is_of_its_own_rows_and_its_own_memory() -> None:
    key, weight = "a", values(10, 4)
    source = WithFreshOptimizer(InMemory({key: weight, "b": weight + 1}))
    rows = (slice(2, 5), slice(0, 4))
    source.read(key, rows)
    assert torch.equal(source.read(MASTER_PREFIX + key, (slice(3, 6), slice(0, 4))), weight[3:6])
    source.read(key, rows)
    assert torch.equal(source.read(MASTER_PREFIX + "b", rows), weight[2:5] + 1)
    source.read(key, rows)
    master = source.read(MASTER_PREFIX + key, rows)
    master.zero_()
    assert torch.equal(source.read(key, rows), values(10, 4)[2:5])


def test_a_source_with_optimizer_state_gets_no_fresh_one() -> None:
    with pytest.raises(CheckpointError, match="has optimizer state already"):
        WithFreshOptimizer(InMemory(model_tensors(geometry(2))))


def test_a_region_outside_is_refused_for_fresh_moments_too() -> None:
    source = WithFreshOptimizer(InMemory({"a": values(4, 4)}))
    with pytest.raises(CheckpointError, match="is not within it"):
        source.read(FIRST_MOMENT_PREFIX + "a", (slice(0, 5), slice(0, 4)))


def test_locations_are_kept_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distributed(tmp_path, {"a": values(40, 3)}, parts=8)
    calls = []

    def counted(*arguments: Any) -> StoredChunk:
        calls.append(arguments)
        return locate_chunk(*arguments)

    monkeypatch.setattr(source_module, "locate_chunk", counted)
    monkeypatch.setattr(source_module, "_LOCATIONS_KEPT", 8)
    checkpoint = DistCheckpoint(tmp_path)
    for _ in range(5):
        checkpoint.read("a")
    assert len(calls) == 8
    assert pickle.dumps(checkpoint.metadata)  # reading left nothing of its own there
