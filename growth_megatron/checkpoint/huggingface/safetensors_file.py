"""safetensors files, read by region and laid out for streaming.

Owns: the format: header, offsets, element types. Reading takes no more memory than the region plus a small buffer.
Does not own: which tensors a model has (``checkpoint.huggingface.layout``).

The format is 8 bytes of little-endian header length, a JSON header (name -> type, shape, offsets), then the values in C
order. Own code, because safetensors' ``safe_open`` maps the file: one cut short while it is open then ends the process
with SIGBUS instead of an error, and what was read stays resident (200 MiB after reading a file of 200 MiB by slices).
``pread`` keeps no position either, so that threads and forked processes share a file.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from growth_megatron.errors import CheckpointError
from growth_megatron.model.tensors import Region, TensorSpec

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types in which models are read and written here; all others are of quantised or integer tensors."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_BUFFER_BYTES = 1 << 22
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: its type as the format names it, its shape, and its first byte in the file."""

    type_name: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """One file, open for reading regions of its tensors.

    Raises:
        CheckpointError: from the constructor, if the header is damaged or says more than the file holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.size_bytes = os.fstat(self._descriptor).st_size
        self.header = self._read_header()
        self.tensors = self._parse_header()

    def read_rows(self, name: str, rows: slice, rest: Region, out: torch.Tensor) -> None:
        """Fill ``out``, ``[rows][sizes of rest]``, contiguous, of the stored type, with these rows and other axes."""
        stored = self.tensors[name]
        inner, dtype = stored.shape[1:], DTYPES[stored.type_name]
        row_bytes = math.prod(inner) * dtype.itemsize
        if all(part.start == 0 and part.stop == size for part, size in zip(rest, inner, strict=True)):
            self._fill(out, stored.offset + rows.start * row_bytes)
            return
        count = max(1, _BUFFER_BYTES // max(1, row_bytes))
        for start in range(rows.start, rows.stop, count):
            stop = min(start + count, rows.stop)
            buffer = torch.empty((stop - start, *inner), dtype=dtype)
            self._fill(buffer, stored.offset + start * row_bytes)
            out[start - rows.start : stop - rows.start].copy_(buffer[(slice(None), *rest)])

    def read_all(self) -> dict[str, torch.Tensor]:
        """All tensors of the file; for a small one."""
        found = {}
        for name, stored in self.tensors.items():
            found[name] = torch.empty(stored.shape, dtype=DTYPES[stored.type_name])
            self._fill(found[name], stored.offset)
        return found

    def _fill(self, out: torch.Tensor, offset: int) -> None:
        if not out.numel():
            return
        view = out.reshape(-1).view(torch.uint8).numpy().data
        while view:
            try:
                count = os.preadv(self._descriptor, [view], offset)
            except OSError as error:
                raise CheckpointError(f"{self.path} cannot be read at byte {offset}: {error.strerror}") from None
            if count == 0:
                raise CheckpointError(f"{self.path} ends at byte {offset}; it was cut short after it was opened")
            view, offset = view[count:], offset + count

    def _read_header(self) -> bytes:
        prefix = os.pread(self._descriptor, 8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(_MAX_HEADER_BYTES, self.size_bytes - 8):
            raise CheckpointError(f"{self.path} is not a safetensors file, or it is cut short; fetch it again")
        return os.pread(self._descriptor, length, 8)

    def _parse_header(self) -> dict[str, StoredTensor]:
        start = 8 + len(self.header)
        try:
            fields: dict[str, Any] = json.loads(self.header)
            fields.pop("__metadata__", None)
            tensors, position = {}, 0
            for name, entry in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
                shape = tuple(int(size) for size in entry["shape"])
                begin, end = (int(offset) for offset in entry["data_offsets"])
                if begin != position or end < begin or any(size < 0 for size in shape):
                    raise ValueError(f"{name} lies at {begin} to {end}, the tensor before it ends at {position}")
                position = end
                dtype = DTYPES.get(entry["dtype"])
                if dtype is not None and end - begin != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name} {shape} has {end - begin} bytes")
                if start + end > self.size_bytes:
                    raise CheckpointError(
                        f"{self.path} has {self.size_bytes} bytes but {name} ends at byte {start + end}; "
                        "it is cut short, fetch it again"
                    )
                tensors[name] = StoredTensor(str(entry["dtype"]), shape, start + begin)
            if rest := self.size_bytes - start - position:
                raise ValueError(f"{rest} bytes follow the last tensor")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path} has a damaged header ({error}); fetch it again") from None
        return tensors


@dataclass(frozen=True)
class FileLayout:
    """A file to be written: header, and the first byte of each tensor."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size_bytes: int


def lay_out(name: str, tensors: Mapping[str, TensorSpec]) -> FileLayout:
    """Where everything lies in the file ``name`` that holds ``tensors`` in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for key, spec in tensors.items():
        end = position + tensor_bytes(spec)
        entries[key] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        begins[key], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(name, header, {key: len(header) + begin for key, begin in begins.items()}, len(header) + position)


def packed(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A whole file of ``tensors``, on the CPU; for a small one."""
    layout = lay_out("", {name: TensorSpec(tuple(values.shape), values.dtype) for name, values in tensors.items()})
    values = (tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    return layout.header + b"".join(values)


def tensor_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor's values."""
    return math.prod(spec.shape) * spec.dtype.itemsize
