"""Checkpoints as sources of global tensors, read without a model and without a process group.

Owns: the ``TensorSource`` protocol, and ``DistCheckpoint``, which reads any region of any tensor of a torch_dist
checkpoint straight from its data files.
Does not own: writing, and loading into a live model (``checkpoint.torch_dist.live_model``).

Nothing here unpickles freely: ``.metadata`` (a pickle by design of torch DCP) goes through an unpickler that knows the
classes of that file and no others, everything else through ``weights_only=True``.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from growth_megatron.checkpoint.folder.files import inside
from growth_megatron.checkpoint.torch_dist.stored_chunk import (
    FileSlice,
    NotPlainError,
    locate_chunk,
    read_element,
    read_region,
)
from growth_megatron.config.schema import MAX_LAYERS
from growth_megatron.errors import CheckpointError, DamagedError
from growth_megatron.model.architecture import LAYER_PREFIX
from growth_megatron.model.tensors import Region, TensorSpec, check_region, constant, whole

METADATA_NAME = ".metadata"
COMMON_NAME = "common.pt"
DATA_SUFFIX = ".distcp"
"""Ending of the data files, and of no other file: a growth links them, and writes the others anew."""

_DCP = "torch.distributed.checkpoint."
_METADATA_CLASSES = {
    f"{_DCP}metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}planner": {"BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    # Placeholders that megatron-core 0.14 and 0.15 left in the file.
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
_LOCATIONS_KEPT = 4096
_MAX_BYTES = 1 << 62

_LAYER_KEY = re.compile(r"decoder\.layers\.\d+\.")


@dataclass(frozen=True)
class _Stored:
    """Where a shown tensor lies: a stored key, and which layer of it if layers are its first axis."""

    key: str
    entry: TensorStorageMetadata
    layer: int | None = None


@dataclass(frozen=True)
class _Overlap:
    """The part of a region that one stored chunk holds: a region of the chunk, and where it goes."""

    index: MetadataIndex
    sizes: torch.Size
    here: Region
    there: Region


class DistCheckpoint:
    """A torch_dist checkpoint as a ``TensorSource``, with one key per layer whichever way it was written.

    megatron-core's default form stacks the layers of a tensor along a first axis, under a key without the layer's
    number; such a tensor shows here as one tensor per layer, like the ``non_homogeneous_layers`` form has it.

    Raises:
        CheckpointError: from the constructor, if ``.metadata`` is missing, damaged or holds foreign classes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata = read_metadata(self.path)
        self._located = functools.lru_cache(_LOCATIONS_KEPT)(locate_chunk)
        self._tensors: dict[str, _Stored] = {}
        for key, stored in self.metadata.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata):
                continue
            if is_stacked(key):
                for layer in range(stored.size[0]):
                    shown = key.replace(LAYER_PREFIX, f"{LAYER_PREFIX}{layer}.", 1)
                    self._tensors[shown] = _Stored(key, stored, layer)
            else:
                self._tensors[key] = _Stored(key, stored)

    def keys(self) -> list[str]:
        """All tensors, one key a layer."""
        return list(self._tensors)

    def object_keys(self) -> list[str]:
        """Names of the stored byte objects, as stored."""
        stored = self.metadata.state_dict_metadata
        return [key for key, value in stored.items() if isinstance(value, BytesStorageMetadata)]

    @property
    def is_stacked(self) -> bool:
        """Whether the layers of a tensor are stored along its first axis."""
        return any(stored.layer is not None for stored in self._tensors.values())

    def data_files(self, keys: Iterable[str] | None = None) -> list[str]:
        """Relative names of the files that hold its tensors, or those of ``keys``."""
        tensors = {self._locate(key).key for key in (self._tensors if keys is None else keys)}
        infos = [info for index, info in self.metadata.storage_data.items() if index.fqn in tensors]
        return sorted({info.relative_path for info in infos})

    def spec(self, key: str) -> TensorSpec:
        """Global shape and stored type. Raises CheckpointError for a tensor that is not there."""
        stored = self._locate(key)
        shape = tuple(stored.entry.size) if stored.layer is None else tuple(stored.entry.size[1:])
        return TensorSpec(shape, stored.entry.properties.dtype)

    def read(self, key: str, region: Region | None = None) -> torch.Tensor:
        """``region`` of a tensor (default: all), of that shape, read straight into place; threads may read at once.

        A region in which one stored element stands for all (moments that were reset) comes as such: with stride 0.

        Raises:
            CheckpointError: no such tensor, a region outside it, or data that is missing or damaged.
        """
        spec = self.spec(key)
        region = whole(spec.shape) if region is None else region
        check_region(key, spec.shape, region)
        stored = self._locate(key)
        within = region if stored.layer is None else (slice(stored.layer, stored.layer + 1), *region)
        sizes = [part.stop - part.start for part in within]
        chunks = stored.entry.chunks
        overlaps = [overlap for chunk in chunks if (overlap := _overlap(stored.key, chunk, within)) is not None]
        if sum(math.prod(part.stop - part.start for part in overlap.here) for overlap in overlaps) != math.prod(sizes):
            raise DamagedError(f"{self.path}: {key} is stored with holes or overlaps; the checkpoint is damaged")
        element = self._constant(overlaps, spec.dtype)
        if element is not None:
            return constant(element, sizes if stored.layer is None else sizes[1:])
        try:
            out = torch.empty(sizes, dtype=spec.dtype)
        except RuntimeError:
            raise CheckpointError(f"{self.path}: {key} of {sizes} does not fit in memory; is it damaged?") from None
        for overlap in overlaps:
            self._read_overlap(overlap, out[overlap.there])
        return out if stored.layer is None else out[0]

    def read_object(self, key: str) -> bytes:
        """A stored byte object, as it lies in the file."""
        if not isinstance(self.metadata.state_dict_metadata.get(key), BytesStorageMetadata):
            raise CheckpointError(f"{self.path} holds no object {key}")
        info = self._storage(MetadataIndex(key))
        with self._open(info) as file:
            return file.read()

    def _locate(self, key: str) -> _Stored:
        try:
            return self._tensors[key]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor {key}; its keys: growth-megatron inspect") from None

    def _storage(self, index: MetadataIndex) -> _StorageInfo:
        info: _StorageInfo | None = self.metadata.storage_data.get(index)
        if info is None:
            raise CheckpointError(f"{self.path}: {METADATA_NAME} does not say where {index.fqn} {index.offset} lies")
        return info

    def _open(self, info: _StorageInfo) -> IO[bytes]:
        path = self.path / info.relative_path
        try:
            return io.BufferedReader(FileSlice(path, info.offset, info.length))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None

    def _constant(self, overlaps: list[_Overlap], dtype: torch.dtype) -> torch.Tensor | None:
        """The element that is stored for all of ``overlaps``, of shape (); None where there is no such element."""
        first: torch.Tensor | None = None
        for overlap in overlaps:
            info = self._storage(overlap.index)
            path = self.path / info.relative_path
            try:
                stored = self._located(path, info.offset, info.length)
                if not stored.is_constant or stored.dtype != dtype or stored.shape != tuple(overlap.sizes):
                    return None
                element = read_element(path, stored)
            except (NotPlainError, OSError):
                return None
            if first is None:
                first = element
            elif not torch.equal(first[None].view(torch.uint8), element[None].view(torch.uint8)):
                return None
        return first

    def _read_overlap(self, overlap: _Overlap, out: torch.Tensor) -> None:
        info = self._storage(overlap.index)
        path = self.path / info.relative_path
        try:
            stored = self._located(path, info.offset, info.length)
            if stored.shape != tuple(overlap.sizes):
                raise NotPlainError(f"of {stored.shape}")
            read_region(path, stored, overlap.here, out)
        except (NotPlainError, OSError):  # torch.load reads other kinds, and says what is wrong with damaged ones
            out.copy_(self._chunk(overlap)[overlap.here])

    def _chunk(self, overlap: _Overlap) -> torch.Tensor:
        """A whole stored chunk."""
        key, sizes = overlap.index.fqn, overlap.sizes
        info = self._storage(overlap.index)
        try:
            with self._open(info) as file:
                data = torch.load(file, map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # torch.load of damaged bytes can fail in any way
            raise DamagedError(
                f"{self.path / info.relative_path}: {key} at byte {info.offset} is damaged ({damage(error)})"
            ) from None
        if not isinstance(data, torch.Tensor) or data.shape != sizes:
            raise DamagedError(f"{self.path / info.relative_path}: {key} at byte {info.offset} is not of {sizes}")
        return data.detach()


def _overlap(key: str, chunk: ChunkStorageMetadata, within: Region) -> _Overlap | None:
    """The part of a region that a stored chunk holds, if any."""
    here, there = [], []
    for part, offset, size in zip(within, chunk.offsets, chunk.sizes, strict=True):
        start, stop = max(part.start, offset), min(part.stop, offset + size)
        if stop <= start:
            return None
        here.append(slice(start - offset, stop - offset))
        there.append(slice(start - part.start, stop - part.start))
    return _Overlap(MetadataIndex(key, chunk.offsets), chunk.sizes, tuple(here), tuple(there))


def is_stacked(key: str) -> bool:
    """Whether a stored key is of megatron-core's form with the layers along the first axis."""
    return LAYER_PREFIX in key and _LAYER_KEY.search(key) is None


def read_metadata(checkpoint: Path) -> Metadata:
    """torch DCP's ``.metadata`` of a checkpoint, by an unpickler that knows only the classes of that file.

    Raises:
        CheckpointError: missing.
        DamagedError: damaged, or naming anything else.
    """
    path = checkpoint / METADATA_NAME
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if isinstance(metadata, Metadata):
            _check_metadata(metadata)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} is missing; {checkpoint} is not a torch_dist checkpoint") from None
    except CheckpointError as error:
        raise DamagedError(f"{path} {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DamagedError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not isinstance(metadata, Metadata):
        raise DamagedError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    return metadata


def _check_metadata(metadata: Metadata) -> None:
    """Raises if something in it is not as torch DCP writes it, is no name of a data file, or is beyond all sizes."""
    for info in metadata.storage_data.values():
        if not (0 <= int(info.offset) < _MAX_BYTES and 0 <= int(info.length) < _MAX_BYTES):
            raise ValueError(f"it names {info.length} bytes from {info.offset}, where no file has any")
    for name in {info.relative_path for info in metadata.storage_data.values()}:
        if not inside(name).endswith(DATA_SUFFIX):
            raise ValueError(f"it names {name!r}, which is no data file (*{DATA_SUFFIX}); do not trust it")
    for key, entry in metadata.state_dict_metadata.items():
        offsets = [None] if isinstance(entry, BytesStorageMetadata) else [chunk.offsets for chunk in entry.chunks]
        if any(MetadataIndex(key, offset) not in metadata.storage_data for offset in offsets):
            raise ValueError(f"it does not say where {key} lies")
        if isinstance(entry, BytesStorageMetadata):
            continue
        axes = {len(entry.size), *(len(sizes) for chunk in entry.chunks for sizes in (chunk.offsets, chunk.sizes))}
        dtype = entry.properties.dtype
        if len(axes) > 1 or not isinstance(entry.size, torch.Size) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"it does not describe {key} as a tensor")
        if dtype.is_complex:
            raise ValueError(f"it says that {key} is complex")
        if is_stacked(key) and entry.size[0] > MAX_LAYERS:
            raise ValueError(f"it says that {key} has {entry.size[0]} layers; allowed: {MAX_LAYERS}")


def read_common(checkpoint: Path) -> dict[str, Any]:
    """``common.pt``: what is not sharded, such as the optimizer's step and parameter groups.

    Raises:
        CheckpointError: missing.
        DamagedError: damaged, or holding classes outside megatron-core's list of safe ones.
    """
    path = checkpoint / COMMON_NAME
    try:
        try:
            common = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            # Megatron-LM puts its arguments in; importing the list of their classes takes seconds.
            from megatron.core.safe_globals import SAFE_GLOBALS

            with torch.serialization.safe_globals(SAFE_GLOBALS):
                common = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {checkpoint} is not a complete checkpoint") from None
    except Exception as error:  # torch.load of damaged bytes can fail in any way
        raise DamagedError(f"{path} cannot be loaded safely ({damage(error)})") from None
    if not isinstance(common, dict):
        raise DamagedError(f"{path} holds a {type(common).__name__}, not a dictionary")
    return common


def damage(error: BaseException) -> str:
    """What torch.load found wrong, in a line and without torch's advice to trust the file."""
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)", str(error))
        return f"refers to {found[1]}; do not trust it" if found else "is nothing that torch.save writes of data"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            value = getattr(torch, name, None)
            if name == "Size" or isinstance(value, torch.dtype | torch.layout | torch.memory_format):
                return value
        elif name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"refers to {module}.{name}, which is no checkpoint metadata; do not trust it")
