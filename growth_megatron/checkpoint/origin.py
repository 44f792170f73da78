"""What a path means: a checkpoint of this library or a Hugging Face folder, found once and handed on as a value.

Owns: the search, and ``Origin``, all that growth, export, verification and inspection ask of a model on the disk.
Does not own: reading tensors (``checkpoint.torch_dist.reader``, ``checkpoint.huggingface.reader``), manifests.

A path may be a checkpoint, a link to one (``RUN/latest``), a run directory or its ``checkpoints`` folder; of a run the
newest valid checkpoint is meant. ``hf:DIR`` is a Hugging Face folder, where a path alone could be both.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from growth_megatron.checkpoint.folder.manifest import (
    MANIFEST_NAME,
    Manifest,
    file_problem,
    library_version,
    read_identified_manifest,
)
from growth_megatron.checkpoint.folder.run_directory import LATEST_NAME, CheckpointName, RunDirectory, Skipped, at_step
from growth_megatron.checkpoint.huggingface.config import CONFIG_NAME
from growth_megatron.checkpoint.huggingface.reader import HuggingFaceCheckpoint
from growth_megatron.checkpoint.huggingface.tokenizer import (
    COPIED_NAMES,
    IDS_NAME,
    MODEL_NAME,
    stored_tokenizer,
    tokenizer_files,
)
from growth_megatron.checkpoint.torch_dist.optimizer_groups import fresh_common
from growth_megatron.checkpoint.torch_dist.reader import (
    COMMON_NAME,
    DATA_SUFFIX,
    METADATA_NAME,
    DistCheckpoint,
    read_common,
)
from growth_megatron.checkpoint.torch_dist.writer import FORMAT_NAME
from growth_megatron.config.load import read_config
from growth_megatron.config.schema import ModelConfig, ParallelConfig
from growth_megatron.data.tokenizer import tokenizer_sha256
from growth_megatron.errors import CheckpointError, DamagedError, GrowthMegatronError, NothingValidError
from growth_megatron.model.architecture import stateless_objects
from growth_megatron.model.tensors import MOMENT_PREFIXES, TensorSource, WithFreshOptimizer

HUGGINGFACE_PREFIX = "hf:"


@dataclass(frozen=True)
class Origin(ABC):
    """A model on the disk, with all that goes on from it.

    Attributes:
        identity: another content has another one; what a growth records of its source.
        manifest: progress, geometry, layout and history; a Hugging Face folder's are those of a run's first step.
        tensors: as stored.
        skipped: newer checkpoints of the same run that were passed over.
    """

    path: Path
    identity: str
    manifest: Manifest
    tensors: TensorSource
    skipped: tuple[Skipped, ...] = ()

    is_of_a_run: ClassVar[bool]
    """Whether it has progress, a layout and a configuration of its own, or is weights alone."""

    @property
    def geometry(self) -> ModelConfig:
        """The model's."""
        return self.manifest.geometry

    @property
    def has_moments(self) -> bool:
        """Whether Adam's moments are there."""
        return any(key.startswith(MOMENT_PREFIXES) for key in self.tensors.keys())

    @property
    def linkable(self) -> DistCheckpoint | None:
        """The stored checkpoint whose data files another one may share by links; None where they are of no use."""
        return None

    @abstractmethod
    def problem(self, full: bool = False) -> str | None:
        """Why the files cannot be trusted, or None if they can; ``full`` sums their contents."""

    @abstractmethod
    def training_state(self) -> TensorSource:
        """The tensors that a training checkpoint made of this holds: with optimizer state, if need be fresh."""

    @abstractmethod
    def common(self) -> dict[str, Any]:
        """Content of ``common.pt``: the optimizer's parameter groups and step. The caller may change it."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Sizes in bytes by name of the files that hold it."""

    @abstractmethod
    def objects(self) -> dict[str, bytes]:
        """Byte objects by stored key."""

    @abstractmethod
    def extra_files(self) -> list[str]:
        """Names of the files that go on as they are, such as the run's configuration."""

    def extra_contents(self) -> dict[str, bytes]:
        """The same with their contents; of a Hugging Face folder its tokenizer."""
        return {name: (self.path / name).read_bytes() for name in self.extra_files()}

    @abstractmethod
    def tokenizer(self) -> tuple[Path | None, str]:
        """The tokenizer that belongs to the model, if it can go along; and what is said of it."""


@dataclass(frozen=True)
class CheckpointOrigin(Origin):
    """A checkpoint of this library."""

    is_of_a_run: ClassVar[bool] = True

    @override
    @property
    def linkable(self) -> DistCheckpoint | None:
        assert isinstance(self.tensors, DistCheckpoint)
        return self.tensors

    @override
    def problem(self, full: bool = False) -> str | None:
        return file_problem(self.path, self.manifest, full)

    @override
    def training_state(self) -> TensorSource:
        return self.tensors

    @override
    def common(self) -> dict[str, Any]:
        return read_common(self.path)

    @override
    def files(self) -> dict[str, int]:
        return {name: entry.size_bytes for name, entry in self.manifest.files.items()}

    @override
    def objects(self) -> dict[str, bytes]:
        assert isinstance(self.tensors, DistCheckpoint)
        return {key: self.tensors.read_object(key) for key in self.tensors.object_keys()}

    @override
    def extra_files(self) -> list[str]:
        rewritten = {METADATA_NAME, COMMON_NAME, FORMAT_NAME}
        return [name for name in self.manifest.files if name not in rewritten and not name.endswith(DATA_SUFFIX)]

    @override
    def tokenizer(self) -> tuple[Path | None, str]:
        path = self.path / "config.yaml"
        own = {*COPIED_NAMES, IDS_NAME} & self.manifest.files.keys()
        if not own and not path.is_file():
            return None, "none: the checkpoint has no config.yaml that names one"
        try:
            if own:
                kept = self.path / (MODEL_NAME if own == {MODEL_NAME} else "")
                tokenizer_files(kept, self.geometry)
                return kept, "none, but special ids" if own == {IDS_NAME} else "of the checkpoint"
            named = read_config(path).config.stages[0].data.tokenizer
            if named is None:
                return None, f"none: {path} names none"
            tokenizer = Path(named)
            if not tokenizer.exists():
                return None, f"none: {tokenizer}, named in {path}, is not there"
            trained_with = (self.manifest.data_fingerprint or {}).get("tokenizer_sha256")
            if trained_with not in (None, tokenizer_sha256(tokenizer)):
                return None, f"none: {tokenizer} is another file than the run was trained with"
            tokenizer_files(tokenizer, self.geometry)
        except GrowthMegatronError as error:
            return None, f"none: {error}"
        return tokenizer, str(tokenizer)


@dataclass(frozen=True)
class HuggingFaceOrigin(Origin):
    """A Hugging Face folder: weights, config.json, a tokenizer."""

    is_of_a_run: ClassVar[bool] = False

    @override
    def problem(self, full: bool = False) -> str | None:
        return None  # the reader refuses what is not whole

    @override
    def training_state(self) -> TensorSource:
        return WithFreshOptimizer(self.tensors)

    @override
    def common(self) -> dict[str, Any]:
        return fresh_common()

    @override
    def files(self) -> dict[str, int]:
        return {file.name: file.stat().st_size for file in sorted(self.path.glob("*.safetensors"))}

    @override
    def objects(self) -> dict[str, bytes]:
        return fresh_objects(self.geometry)

    @override
    def extra_files(self) -> list[str]:
        return []

    @override
    def extra_contents(self) -> dict[str, bytes]:
        return stored_tokenizer(self.path)

    @override
    def tokenizer(self) -> tuple[Path | None, str]:
        return self.path, "as in the source"


def find_origin(text: str | Path, *, metadata_alone: bool = False) -> Origin:
    """What ``text`` means: a checkpoint, a run (its newest), RUN@STEP, or a Hugging Face folder.

    Args:
        metadata_alone: whether data files may be absent or damaged, since nothing will be read from them.

    Raises:
        CheckpointError: it could be both or is neither, or what it means is not whole.
        NothingValidError: a run whose checkpoints are all damaged.
    """
    if str(text).startswith(HUGGINGFACE_PREFIX):
        return huggingface_origin(Path(str(text).removeprefix(HUGGINGFACE_PREFIX)))
    path = at_step(Path(text))
    ours, theirs = _could_be_ours(path), (path / CONFIG_NAME).is_file()
    if ours and theirs:
        raise CheckpointError(
            f"{path} could be a checkpoint ({ours}) and a Hugging Face folder ({CONFIG_NAME}); write "
            f"{HUGGINGFACE_PREFIX}{path} for the latter, or name the checkpoint's own folder"
        )
    if theirs:
        return huggingface_origin(path)
    path = existing_folder(path)
    run = run_of(path)
    if run is None:
        if not ours:
            raise CheckpointError(
                f"{path} is neither a checkpoint or a run ({METADATA_NAME}, checkpoints/) nor a Hugging Face folder "
                f"({CONFIG_NAME}); correct the path"
            )
        return checkpoint_origin(path, whole=not metadata_alone)
    newest, skipped = run.newest_valid()
    if newest is None:
        raise none_valid(run, skipped)
    return checkpoint_origin(newest, skipped, whole=False)  # just seen to be


def checkpoint_origin(path: Path, skipped: tuple[Skipped, ...] = (), *, whole: bool = True) -> CheckpointOrigin:
    """The checkpoint in the folder ``path``.

    Raises:
        CheckpointError: its manifest or ``.metadata`` cannot be read, or with ``whole`` a file is missing or cut short.
        DamagedError: it names data that the manifest does not answer for.
    """
    manifest, identity = read_identified_manifest(path)
    if whole and (reason := file_problem(path, manifest)) is not None:
        raise CheckpointError(f"cannot read {path}: {reason}; growth-megatron verify shows what else is there")
    tensors = DistCheckpoint(path)
    named = {info.relative_path for info in tensors.metadata.storage_data.values()}
    if unknown := sorted(named - manifest.files.keys()):
        raise DamagedError(f"{path}: {METADATA_NAME} names {unknown[0]}, which the manifest has no checksum of")
    return CheckpointOrigin(path, identity, manifest, tensors, skipped)


def huggingface_origin(path: Path) -> HuggingFaceOrigin:
    """The Hugging Face folder ``path``. Raises: CheckpointError if it holds no model of this library."""
    folder = HuggingFaceCheckpoint(path)
    manifest = Manifest(
        library_version=library_version(),
        step=0,
        stage=0,
        stage_step=0,
        consumed_samples=0,
        consumed_tokens=0,
        flops=0.0,
        geometry=folder.geometry,
        layout=ParallelConfig(),
        world_size=1,
    )
    return HuggingFaceOrigin(path, folder.identity, manifest, folder)


def fresh_objects(geometry: ModelConfig) -> dict[str, bytes]:
    """The byte objects without which megatron-core's strict load refuses a checkpoint: one, empty, for each matrix."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return dict.fromkeys(stateless_objects(geometry), buffer.getvalue())


def existing_folder(path: Path) -> Path:
    """``path`` with a link followed, so that the answer stays true when the link moves on.

    Raises: CheckpointError if there is no folder; the message lists the checkpoints near it.
    """
    followed = path
    if path.is_symlink():
        followed = path.parent / path.readlink()
        if path.name == LATEST_NAME and not followed.resolve().is_relative_to(path.parent.resolve()):
            raise CheckpointError(f"{path} points at {followed}, outside of its run; name that folder itself")
        if not followed.exists():
            raise CheckpointError(f"{path} points at {followed}, which does not exist; name a checkpoint or a run")
    if not followed.exists():
        raise CheckpointError(f"{path} does not exist; give a checkpoint or a run directory{_near(path)}")
    if not followed.is_dir():
        raise CheckpointError(f"{path} is a file; give the folder of a checkpoint, or a run directory")
    return followed


def run_of(path: Path) -> RunDirectory | None:
    """The run whose directory, or whose ``checkpoints`` folder, ``path`` is."""
    if (path / "checkpoints").is_dir():
        return RunDirectory(path)
    if not path.is_dir() or path.absolute().name != "checkpoints":
        return None
    if not any(CheckpointName.parse(entry.name) for entry in path.iterdir()):
        return None
    return RunDirectory(path.parent if path.name else path.absolute().parent)  # "." has no name


def run_of_checkpoint(path: Path) -> Path | None:
    """Directory of the run that the checkpoint in ``path`` belongs to by its place; None for any other folder."""
    path = path.absolute()
    is_named = CheckpointName.parse(path.name) is not None and path.parent.name == "checkpoints"
    return path.parent.parent if is_named else None


def none_valid(run: RunDirectory, skipped: Sequence[Skipped]) -> CheckpointError:
    """The error for a run of whose checkpoints none is valid."""
    if not skipped:
        return CheckpointError(f"{run.checkpoints_path} holds no checkpoint yet; let the run reach its first save")
    found = "; ".join(f"{item.path.name}: {item.reason}" for item in skipped)
    return NothingValidError(f"none of the checkpoints in {run.checkpoints_path} is valid ({found})")


def _near(path: Path) -> str:
    run = run_of(path.parent) if path.parent.is_dir() else None
    names = [entry.name for entry in run.checkpoints()[:3]] if run else []
    return f"; the newest there: {', '.join(names)}" if names else ""


def _could_be_ours(path: Path) -> str | None:
    """What in ``path`` is of a checkpoint or a run."""
    if path.absolute().name == "checkpoints" and path.is_dir():
        return "its name"
    return next((name for name in (METADATA_NAME, MANIFEST_NAME, "checkpoints") if (path / name).exists()), None)
