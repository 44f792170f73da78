"""Checkpoints and Hugging Face folders in which one file would run code, were it unpickled freely."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from growth_megatron.checkpoint.folder.manifest import checksum_files, list_files, read_manifest, write_manifest
from growth_megatron.checkpoint.torch_dist.reader import read_metadata


class Trap:
    """Pickled, it makes the file ``marker`` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def saved_trap(folder: Path, marker: Path) -> bytes:
    """The trap as torch.save writes it."""
    torch.save(Trap(marker), folder / "trap")
    content = (folder / "trap").read_bytes()
    (folder / "trap").unlink()
    return content


def sign(folder: Path) -> None:
    """Give the checkpoint a manifest with the sums of its files as they are now."""
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.model_copy(update={"files": checksum_files(folder, list_files(folder))}))


def edit_metadata(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _common_saved(folder: Path, marker: Path) -> None:
    (folder / "common.pt").write_bytes(saved_trap(folder, marker))


def _common_raw(folder: Path, marker: Path) -> None:
    (folder / "common.pt").write_bytes(pickle.dumps(Trap(marker)))


def _metadata(folder: Path, marker: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Trap(marker)))


def _stored_as(content: bytes, folder: Path, objects: bool) -> None:
    """Let all byte objects, or all tensors, be ``content``."""
    (folder / "hostile.distcp").write_bytes(content)

    def change(metadata: Metadata) -> None:
        for index in metadata.storage_data:
            if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata) == objects:
                metadata.storage_data[index] = _StorageInfo("hostile.distcp", 0, len(content))

    edit_metadata(folder, change)


def _chunk(folder: Path, marker: Path) -> None:
    _stored_as(saved_trap(folder, marker), folder, objects=False)


def _object_saved(folder: Path, marker: Path) -> None:
    _stored_as(saved_trap(folder, marker), folder, objects=True)


def _object_raw(folder: Path, marker: Path) -> None:
    _stored_as(pickle.dumps(Trap(marker)), folder, objects=True)


def _name_outside(folder: Path, marker: Path) -> None:
    shutil.copy(next(folder.glob("*.distcp")), folder.parent / "outside.distcp")

    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = "../outside.distcp"

    edit_metadata(folder, change)


CHECKPOINTS: dict[str, Callable[[Path, Path], None]] = {
    "common.pt, saved": _common_saved,
    "common.pt, raw": _common_raw,
    ".metadata": _metadata,
    "tensor chunk": _chunk,
    "byte object, saved": _object_saved,
    "byte object, raw": _object_raw,
    "a name outside": _name_outside,
}
"""All files of a checkpoint that are unpickled: what puts the trap into one; and one that leads out of the folder."""


def hostile_checkpoint(source: Path, target: Path, sample: str, marker: Path) -> Path:
    """A copy of the checkpoint ``source`` with the trap in it, and the checksums of what is there now."""
    shutil.copytree(source, target)
    CHECKPOINTS[sample](target, marker)
    sign(target)
    return target


def _pickled_weights(folder: Path, marker: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(saved_trap(folder, marker))


def _tokenizer(folder: Path, marker: Path) -> None:
    (folder / "tokenizer.model").write_bytes(pickle.dumps(Trap(marker)))
    auto = {"AutoTokenizer": [None, "hostile.Tokenizer"], "AutoModelForCausalLM": "hostile.Model"}
    (folder / "hostile.py").write_text(f"import os\nos.system('touch {marker}')\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tokenizer", "auto_map": auto}))


FOLDERS: dict[str, Callable[[Path, Path], None]] = {"pytorch_model.bin": _pickled_weights, "tokenizer": _tokenizer}
"""Files of a Hugging Face folder that others load as code."""
