"""manifest.json: what a checkpoint is, and proof that it is whole.

Owns: the manifest's fields, reading and writing it strictly, checksums, validation of a checkpoint folder.
Does not own: when it is written (last, by ``checkpoint.folder.commit``), the tensors (``checkpoint.torch_dist``).

Files are checksummed with SHA-256 from the standard library: with the SHA instructions of current CPUs it runs at
1.7 GB/s a core, close to CRC-32 (2.2) and well above BLAKE2b (0.6), and unlike CRC-32 it also identifies a content.
hashlib releases the GIL, so files are checksummed in parallel by threads.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from growth_megatron import __version__
from growth_megatron.checkpoint.folder.files import PARTIAL_SUFFIX, FileOperations, inside
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.config.section import NonNegativeFloat, NonNegativeInt
from growth_megatron.errors import CheckpointError

MANIFEST_NAME = "manifest.json"
TRAIN_FILE_NAME = "train.yaml"
"""How to go on from a checkpoint made by hand: a person may change it, so it is no part of it."""
FORMAT_VERSION: Literal[1] = 1
REQUIRED_FILES = (".metadata", "common.pt", "metadata.json")
"""megatron-core's own files, without which a checkpoint cannot be loaded."""

_BLOCK_BYTES = 1 << 20
_OWN_SUM = "manifest_sha256"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    """One file of a checkpoint."""

    size_bytes: NonNegativeInt
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Multipliers(_Strict):
    """Factors on the configured optimizer settings of one parameter.

    A weight that is ``a`` times its source, in c copies, follows it under lr' = a lr, wd' = wd / a, eps' = eps / (a c).
    """

    learning_rate: float = 1.0
    weight_decay: float = 1.0
    epsilon: float = 1.0


class GrowthRecord(_Strict):
    """One growth in the history of a checkpoint."""

    operator: str
    options: dict[str, Any] = {}
    layers: tuple[NonNegativeInt, ...] | None = Field(None, description="source layer of each target layer")
    optimizer_state: str = Field(description="what became of the moments: reset, carry, ...")
    step: NonNegativeInt = Field(description="global step of the growth")
    source: str = Field(description="path of the source checkpoint, as it was then")
    source_manifest_sha256: str
    source_geometry: ModelConfig
    target_geometry: ModelConfig
    seed: NonNegativeInt
    library_version: str
    validation_loss_before: float | None = None
    validation_loss_after: float | None = None
    maps_sha256: str | None = Field(None, description="of the file of learned maps, which the checkpoint holds")


class BranchRecord(_Strict):
    """Where a run began that left another one: with stages or data of its own."""

    step: NonNegativeInt
    stage: NonNegativeInt
    stage_step: NonNegativeInt
    consumed_samples: NonNegativeInt
    source: str = Field(description="path of the checkpoint, as it was then")
    source_manifest_sha256: str
    mode: Literal["continue", "branch"]
    data: Literal["same", "new"]
    data_fingerprint: dict[str, Any] | None = Field(description="of the data until then")


class Manifest(_Strict):
    """What a checkpoint holds and where its run stood."""

    format_version: Literal[1] = FORMAT_VERSION
    library_version: str
    step: NonNegativeInt = Field(description="optimizer steps over the whole run")
    stage: NonNegativeInt
    stage_step: NonNegativeInt
    consumed_samples: NonNegativeInt
    consumed_tokens: NonNegativeInt
    flops: NonNegativeFloat = Field(description="cumulative over the run")
    flops_6nd: NonNegativeFloat | None = Field(None, description="6 N D, likewise; earlier versions lack it")
    skipped_samples: NonNegativeInt = Field(0, description="of the stream, passed over by rollbacks, never trained on")
    skipped_steps: NonNegativeInt = Field(0, description="steps whose update was left out")
    loss_mean: float = Field(0.0, description="running mean of the stage's losses, which tells a spike")
    loss_deviation: float = Field(0.0, description="running mean of their distance from it")
    geometry: ModelConfig
    layout: ParallelConfig = Field(description="the layout it was saved at; any other can load it")
    world_size: NonNegativeInt
    data_fingerprint: dict[str, Any] | None = None
    config_hash: str | None = None
    has_optimizer_state: bool = True
    files: dict[Annotated[str, AfterValidator(inside)], FileEntry] = {}
    multipliers: dict[str, Multipliers] = Field(
        {}, description="by model key with the layer number written *; absent: 1. What a carried width growth asks for"
    )
    lineage: tuple[GrowthRecord, ...] = ()
    branches: tuple[BranchRecord, ...] = ()
    validation_loss: float | None = Field(None, description="nats per token, where a validation was made at this step")

    @property
    def total_bytes(self) -> int:
        """Size of all files that the manifest answers for."""
        return sum(entry.size_bytes for entry in self.files.values())


def library_version() -> str:
    """Version of this library, as manifests and growth records name it."""
    return __version__


def write_manifest(folder: Path, manifest: Manifest, files: FileOperations | None = None) -> str:
    """Write ``manifest.json`` atomically and durably; returns the checkpoint's identity."""
    fields = manifest.model_dump(mode="json")
    fields[_OWN_SUM] = _sum_of_fields(fields)
    text = json.dumps(fields, indent=1, ensure_ascii=False) + "\n"
    (files or FileOperations()).replace(folder / MANIFEST_NAME, text.encode())
    return str(fields[_OWN_SUM])


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises: as ``read_identified_manifest``."""
    return read_identified_manifest(folder)[0]


def read_identified_manifest(folder: Path) -> tuple[Manifest, str]:
    """The manifest of a checkpoint folder, and the checkpoint's identity.

    The identity is the sum over the fields as they were written, which stands in the file: a later version of this
    library, to which a manifest has more fields, finds the same one.

    Raises:
        CheckpointError: missing, unreadable, not JSON, of another format version, altered, or with wrong fields.
    """
    path = folder / MANIFEST_NAME
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path} is missing: {folder} is no checkpoint of this library, or its save did not finish"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        version = fields.get("format_version") if isinstance(fields, dict) else None
        raise CheckpointError(f"{path} has format version {version!r}; this library reads version {FORMAT_VERSION}")
    own_sum = fields.pop(_OWN_SUM, None)
    if own_sum != _sum_of_fields(fields):
        raise CheckpointError(f"{path} does not match its own checksum; it is damaged or was edited")
    try:
        return Manifest.model_validate_json(json.dumps(fields)), str(own_sum)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from None


def validate_checkpoint(folder: Path, full: bool = False) -> str | None:
    """Why a checkpoint cannot be trusted, or None if it can.

    Checks that the manifest is sound and that every file is there with its size; ``full`` also sums the contents.
    """
    if not folder.is_dir():
        return "not a folder"
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return str(error)
    return file_problem(folder, manifest, full)


def file_problem(folder: Path, manifest: Manifest, full: bool = False) -> str | None:
    """As ``validate_checkpoint``, of a folder whose manifest has been read."""
    for name in REQUIRED_FILES:
        if name not in manifest.files:
            return f"{name} is not in the manifest"
    for name, entry in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            return f"{name} is missing ({error.strerror})"
        if size != entry.size_bytes:
            return f"{name} has {size} bytes, the manifest says {entry.size_bytes}"
    if full:
        return _first_wrong_sum(folder, manifest)
    return None


def _first_wrong_sum(folder: Path, manifest: Manifest) -> str | None:
    try:
        sums = checksum_files(folder, manifest.files)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    for name, entry in manifest.files.items():
        if sums[name].sha256 != entry.sha256:
            return f"{name} does not match its checksum; its content changed after it was saved"
    return None


def list_files(folder: Path) -> list[str]:
    """Relative names of all files of a checkpoint that a manifest answers for, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    own = (MANIFEST_NAME, TRAIN_FILE_NAME)
    return sorted(name for name in names if name not in own and not name.endswith(PARTIAL_SUFFIX))


def checksum_files(folder: Path, names: Iterable[str], threads: int = 8) -> dict[str, FileEntry]:
    """Size and checksum of some files of a folder, checksummed in parallel.

    On many nodes each can sum the files it wrote, and the union goes to ``checkpoint.folder.commit``.
    """
    ordered = list(names)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        return dict(zip(ordered, pool.map(lambda name: checksum(folder / name), ordered), strict=True))


def checksum(path: Path, stop: threading.Event | None = None) -> FileEntry:
    """Size and checksum of a file; of what has been read when ``stop`` is set."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb", buffering=0) as file:
        while not (stop and stop.is_set()) and (block := file.read(_BLOCK_BYTES)):
            digest.update(block)
            size += len(block)
    return FileEntry(size_bytes=size, sha256=digest.hexdigest())


def _sum_of_fields(fields: dict[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
