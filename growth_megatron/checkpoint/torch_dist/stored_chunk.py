"""Regions of a tensor straight out of a file that torch.save wrote, without loading the rest of it.

Owns: where a tensor's elements lie in torch.save's zip archive, and copying a region of them into memory.
Does not own: which file and bytes hold a tensor, and what to say of damage (``checkpoint.torch_dist.reader``):
whatever is not plain here raises ``NotPlainError``, and the caller takes torch.load.

The archive is not unpacked: its records are stored as they are, so a region is some ranges of the file, read by preadv
into place. Nothing is mapped, so a file cut short meanwhile is an error and no signal. The pickle that describes the
tensor goes through an unpickler that calls nothing but a recorder.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from typing_extensions import override

_SCRATCH_BYTES = 1 << 20
_DIRECT_BYTES = 1 << 16
_LARGEST_GAP_BYTES = 1 << 15
_LARGEST_PICKLE_BYTES = 1 << 16
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class NotPlainError(Exception):
    """The bytes are not one plain tensor as torch.save writes it: of another kind, or damaged."""


@dataclass(frozen=True)
class StoredChunk:
    """Where a tensor lies: ``start`` is the byte of its first element in the file, ``stride`` is in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def is_constant(self) -> bool:
        """Whether one stored element stands for all."""
        return math.prod(self.shape) > 1 and not any(
            stride for size, stride in zip(self.shape, self.stride, strict=True) if size > 1
        )


@dataclass(frozen=True)
class _Axis:
    """One axis of a region in the file: elements from one index to the next, indices read, and their number in all."""

    stride: int
    count: int
    size: int


def locate_chunk(path: Path, offset: int, length: int) -> StoredChunk:
    """The tensor that torch.save wrote into ``length`` bytes from ``offset`` of a file.

    Raises:
        NotPlainError: it cannot be read piecewise; torch.load may know more.
        OSError: the file cannot be read.
    """
    with io.BufferedReader(FileSlice(path, offset, length)) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                records = {record.filename: record for record in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise NotPlainError(str(error)) from None
        root = next(iter(records), "").partition("/")[0]
        if sys.byteorder != "little" or _small(file, records, f"{root}/byteorder", length) not in (None, b"little"):
            raise NotPlainError("of another byte order")
        described = _described(_small(file, records, f"{root}/data.pkl", length))
        record = records.get(f"{root}/data/{described.storage.key}")
        if record is None:
            raise NotPlainError("without data")
        start = _start(file, record, length)
        dtype, shape, stride = described.storage.dtype, described.shape, described.stride
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and (described.offset + last + 1) * dtype.itemsize > record.file_size:
            raise NotPlainError("with less data than its shape needs")
    return StoredChunk(dtype, shape, stride, offset + start + described.offset * dtype.itemsize)


def read_element(path: Path, stored: StoredChunk) -> torch.Tensor:
    """The first element, of shape ()."""
    out = torch.empty((), dtype=stored.dtype)
    with open(path, "rb", buffering=0) as file:
        _fill(file.fileno(), stored.start, out)
    return out


def read_region(path: Path, stored: StoredChunk, region: tuple[slice, ...], out: torch.Tensor) -> None:
    """Copy ``region`` of a stored tensor into ``out``, which has its shape and type and any strides.

    Besides ``out`` itself at most ``_SCRATCH_BYTES`` are held.

    Raises:
        NotPlainError: the type is not that of ``out``, elements overlap, or the file ends early.
    """
    if stored.dtype != out.dtype:
        raise NotPlainError(f"of {stored.dtype}, not {out.dtype}")
    if not out.numel():
        return
    kept = [number for number, size in enumerate(stored.shape) if size > 1]
    kept.sort(key=lambda number: stored.stride[number], reverse=True)
    axes = [_Axis(stored.stride[n], region[n].stop - region[n].start, stored.shape[n]) for n in kept]
    inner_extent = 1
    for axis in reversed(axes):
        if axis.stride < inner_extent:
            raise NotPlainError("with elements that overlap")
        inner_extent = axis.stride * axis.size
    first = sum(part.start * stride for part, stride in zip(region, stored.stride, strict=True))
    placed = out.permute([*(n for n in range(out.dim()) if n not in kept), *kept])
    placed = placed.reshape(placed.shape[out.dim() - len(kept) :])  # the axes dropped have length 1: a view
    with open(path, "rb", buffering=0) as file:
        _copy(file.fileno(), stored.start + first * stored.dtype.itemsize, axes, placed)


def _copy(descriptor: int, start: int, axes: list[_Axis], out: torch.Tensor) -> None:
    """Copy elements whose axes in the file go from the slowest to the fastest, as those of ``out`` do."""
    dense, run = len(axes), 1
    while dense and axes[dense - 1].stride == run:
        dense -= 1
        run *= axes[dense].count
        if axes[dense].count < axes[dense].size:
            break
    if dense == 0:
        _fill(descriptor, start, out)
        return
    item = out.itemsize
    rows, outer = axes[dense - 1], axes[: dense - 1]
    apart = run * item >= _DIRECT_BYTES or (rows.stride - run) * item > _LARGEST_GAP_BYTES
    at_once = 1 if apart else max(1, _SCRATCH_BYTES // (rows.stride * item))
    strides = (rows.stride, *(axis.stride for axis in axes[dense:]))
    for index in itertools.product(*(range(axis.count) for axis in outer)):
        there = out[index]  # [rows, ...]
        position = start + sum(i * axis.stride for i, axis in zip(index, outer, strict=True)) * item
        for row in range(0, rows.count, at_once):
            some = there[row : row + at_once]
            here = position + row * rows.stride * item
            if len(some) == 1:
                _fill(descriptor, here, some)
            else:
                scratch = torch.empty((len(some) - 1) * rows.stride + run, dtype=out.dtype)
                _fill(descriptor, here, scratch)
                some.copy_(scratch.as_strided(some.shape, strides))


def _fill(descriptor: int, position: int, out: torch.Tensor) -> None:
    """Read consecutive elements of the file into ``out``, in the order of its indices."""
    if not out.is_contiguous():
        if out.nbytes > _SCRATCH_BYTES:
            per_index = out.nbytes // len(out)
            for index, part in enumerate(out):
                _fill(descriptor, position + index * per_index, part)
        else:
            scratch = torch.empty(out.shape, dtype=out.dtype)
            _fill(descriptor, position, scratch)
            out.copy_(scratch)
        return
    # as_strided: one element counts as contiguous whatever its stride is
    view = memoryview(cast(Any, out.as_strided((out.numel(),), (1,)).view(torch.uint8).numpy()))
    while view:
        count = os.preadv(descriptor, [view], position)
        if not count:
            raise NotPlainError("cut short")
        view, position = view[count:], position + count


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str


class _Described:
    """What the pickle of a tensor says; stands in for ``torch._utils._rebuild_tensor_v2``."""

    def __init__(
        self, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
    ) -> None:
        lengths = (*shape, *stride, offset)
        if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in lengths):
            raise NotPlainError("not described as torch.save does")
        if len(shape) != len(stride) or metadata is not None:
            raise NotPlainError("not described as torch.save does")
        self.storage, self.offset = storage, int(offset)
        self.shape, self.stride = tuple(shape), tuple(stride)


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Described
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        raise NotPlainError(f"refers to {module}.{name}")

    def persistent_load(self, identity: Any) -> Any:
        kind, dtype, key, _, _ = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise NotPlainError("not described as torch.save does")
        return _Storage(dtype, key)


def _described(pickled: bytes | None) -> _Described:
    try:
        described = _TensorUnpickler(io.BytesIO(pickled or b"")).load()
    except NotPlainError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise NotPlainError(f"{type(error).__name__}: {error}") from None
    if not isinstance(described, _Described):
        raise NotPlainError(f"a {type(described).__name__}")
    return described


def _small(file: IO[bytes], records: dict[str, zipfile.ZipInfo], name: str, length: int) -> bytes | None:
    """Content of a small record, None where there is none. Sums are not compared: torch may leave them out."""
    record = records.get(name)
    if record is None:
        return None
    if record.file_size > _LARGEST_PICKLE_BYTES:
        raise NotPlainError(f"{name} of {record.file_size} bytes")
    file.seek(_start(file, record, length))
    return file.read(record.file_size)


def _start(file: IO[bytes], record: zipfile.ZipInfo, length: int) -> int:
    """First byte of a record's content, which must lie in the archive as it is."""
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise NotPlainError(f"{record.filename} has no header")
    name_length, extra_length = map(int, _LOCAL_HEADER.unpack(header)[1:])
    start = record.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    stored_as_is = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
    if not stored_as_is or record.flag_bits & 1 or start + record.file_size > length:
        raise NotPlainError(f"{record.filename} is compressed, or cut short")
    return start


class FileSlice(io.RawIOBase):
    """Some bytes in the middle of a file, as a file: a chunk is read without a second copy of it in memory."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        self._offset, self._length, self._position = offset, length, 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + position)
        return self._position

    @override
    def tell(self) -> int:
        return self._position

    @override
    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(view[:wanted]) or 0
        self._position += count
        return count

    @override
    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
