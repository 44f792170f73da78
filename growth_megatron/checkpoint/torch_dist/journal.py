"""What a write that was killed had completed, and a journal for the next one.

Owns: everything that makes a write resumable. A data file is written under ``.unfinished``, flushed to the disk, noted
in ``.journal`` with its checksum and what it holds, and only then moved into the temporary folder: one that stands
there is complete. So a kill costs the files in progress alone.
Does not own: what is written (``checkpoint.torch_dist.writer``) and how (``checkpoint.torch_dist.data_files``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from growth_megatron.checkpoint.folder.commit import JOURNAL_FOLDER, JOURNAL_SUFFIX, begin_folder, temporary_path
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import MANIFEST_NAME, FileEntry, checksum_files
from growth_megatron.parallel.collectives import all_gather, on_all_ranks, on_rank_zero, rank, world_size

UNFINISHED_FOLDER = ".unfinished"
"""In a temporary folder: data files that are being written."""


@dataclass(frozen=True)
class FinishedFile:
    """A complete data file: its checksum, and where each item lies in it."""

    entry: FileEntry
    items: dict[MetadataIndex, _StorageInfo]

    def results(self) -> list[WriteResult]:
        """The same, as torch DCP takes it."""
        return [WriteResult(index, place.length, place) for index, place in self.items.items()]


def item_bytes(item: WriteItem) -> int:
    """Size of an item's values, were all of them stored."""
    if item.tensor_data is None:
        return item.bytes_io_data.nbytes if item.bytes_io_data is not None else 0
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


class Journal:
    """The complete data files of a job, of earlier attempts (``resumed``) and of this one."""

    def __init__(self, target: Path, fingerprint: str, items: Sequence[WriteItem], files: FileOperations) -> None:
        """Look for an earlier attempt; all ranks call it alike and share the checksumming of what it left.

        Args:
            fingerprint: identity of the job. Data files of another one are not taken over.
            items: all there is to be in the checkpoint.
        """
        self.temporary = temporary_path(target)
        self._target, self._fingerprint, self._files = target, fingerprint, files
        self._planned = {item.index: _described(item) for item in items}
        noted = on_rank_zero(self._noted)
        mine = list(noted)[rank() :: world_size()]
        sound = on_all_ranks(lambda: self._sound(noted, mine))
        self.resumed = {name: noted[name] for part in all_gather(sound) for name in part}

    @property
    def bytes_resumed(self) -> int:
        """Bytes of files that an earlier attempt wrote."""
        return sum(file.entry.size_bytes for file in self.resumed.values())

    def left(self, items: Iterable[WriteItem]) -> list[WriteItem]:
        """Those of ``items`` that are yet to be written."""
        done = {index for file in self.resumed.values() for index in file.items}
        return [item for item in items if item.index not in done]

    def clear(self) -> None:
        """Remove an earlier attempt of which nothing can be used."""
        if not self.resumed and self.temporary.exists():
            self._files.remove_tree(self.temporary)

    def begin(self) -> None:
        """Leave in the temporary folder the data files that are taken over, their notes, and nothing else."""
        if self.resumed:
            self._reduce()
        else:
            begin_folder(self._target, self._files)
        self._files.make_directory(self.temporary / JOURNAL_FOLDER)
        self._files.make_directory(self.temporary / UNFINISHED_FOLDER)

    def add(self, name: str, file: FinishedFile) -> None:
        """Note a data file that is complete under ``UNFINISHED_FOLDER``, and give it its place."""
        items = [
            [
                index.fqn,
                None if index.offset is None else list(index.offset),
                self._planned[index],
                at.offset,
                at.length,
            ]
            for index, at in file.items.items()
        ]
        note = {"fingerprint": self._fingerprint, "entry": file.entry.model_dump(), "items": items}
        unfinished = self.temporary / UNFINISHED_FOLDER / name
        self._files.sync_file(unfinished)
        self._files.replace(self.temporary / JOURNAL_FOLDER / f"{name}{JOURNAL_SUFFIX}", json.dumps(note).encode())
        self._files.rename(unfinished, self.temporary / name)
        self._files.sync_directory(self.temporary)

    def end(self) -> None:
        """Nothing is left to write; the notes stay until the checkpoint has its name."""
        self._files.remove_tree(self.temporary / UNFINISHED_FOLDER)

    def _noted(self) -> dict[str, FinishedFile]:
        """Data files that were noted, by name, all of whose items are planned, each in one file; not looked into."""
        finished: dict[str, FinishedFile] = {}
        taken: set[MetadataIndex] = set()
        for path in sorted((self.temporary / JOURNAL_FOLDER).glob(f"*{JOURNAL_SUFFIX}")):
            name = path.name.removesuffix(JOURNAL_SUFFIX)
            try:
                note = json.loads(path.read_bytes())
                entry = FileEntry(**note["entry"])
                found = {
                    MetadataIndex(key, offsets if offsets is None else torch.Size(offsets)): (described, at, length)
                    for key, offsets, described, at, length in note["items"]
                }
                size = (self.temporary / name).stat().st_size
                is_sound = note["fingerprint"] == self._fingerprint and size == entry.size_bytes
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
            is_planned = all(self._planned.get(index) == described for index, (described, _, _) in found.items())
            if is_sound and is_planned and not taken & found.keys():
                taken |= found.keys()
                places = {index: _StorageInfo(name, at, length) for index, (_, at, length) in found.items()}
                finished[name] = FinishedFile(entry, places)
        return finished

    def _sound(self, noted: dict[str, FinishedFile], names: Collection[str]) -> list[str]:
        """Those of ``names`` whose content has the noted checksum."""
        sums = checksum_files(self.temporary, names)
        return [name for name in names if sums[name] == noted[name].entry]

    def _reduce(self) -> None:
        unfinished = self.temporary / UNFINISHED_FOLDER
        if unfinished.exists():
            self._files.remove_tree(unfinished)
        self._files.make_directory(unfinished)
        notes = {f"{name}{JOURNAL_SUFFIX}" for name in self.resumed}
        kept = {UNFINISHED_FOLDER, JOURNAL_FOLDER, *self.resumed}
        surplus = [path for path in self.temporary.iterdir() if path.name not in kept]
        # The manifest goes first: without it nobody takes the folder for a complete checkpoint.
        for path in sorted(surplus, key=lambda path: path.name != MANIFEST_NAME):
            self._files.rename(path, unfinished / path.name)
        for path in (self.temporary / JOURNAL_FOLDER).iterdir():
            if path.name not in notes:
                self._files.rename(path, unfinished / path.name)
        self._files.remove_tree(unfinished)


def _described(item: WriteItem) -> Any:
    """What must agree for an item written earlier to be the one wanted: type, sizes and global shape."""
    if item.tensor_data is None:
        return [item_bytes(item)]
    tensor = item.tensor_data
    return [str(tensor.properties.dtype), list(tensor.chunk.sizes), list(tensor.size)]
