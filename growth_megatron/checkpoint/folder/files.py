"""The file operations of checkpoint commits, in one place, and which names files may have.

Owns: every call that changes the file system on the way to a committed checkpoint, each made durable where it says so;
the rule that a name which a file gives lies within its folder.
Does not own: their order (``checkpoint.folder.commit``). Tests pass a subclass that dies at a chosen call.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path, PurePosixPath

PARTIAL_SUFFIX = ".partial"
"""Ending of a file that is being written and takes its name by a rename."""

_CANNOT_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})


def inside(name: str) -> str:
    """``name`` as it is, if it is relative and within the folder that it counts from.

    Every name that is read out of a file goes through here. Raises: ValueError.
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"it names {name!r}, outside of its folder; do not trust it")
    return name


class FileOperations:
    """Changes to the file system. Nothing here cleans up on the way: whoever comes next must cope with what is left."""

    def make_directory(self, path: Path) -> None:
        """Make a folder and those above it; one that exists is left as it is."""
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        """Write a file and flush it to the disk."""
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, path: Path, data: bytes) -> None:
        """Give ``path`` a new content: readers see the old or the new one, also after a crash."""
        partial = path.with_name(f".{path.name}{PARTIAL_SUFFIX}")
        self.write(partial, data)
        self.rename(partial, path)
        self.sync_directory(path.parent)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name, replacing a file of that name."""
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> bool:
        """Hard link ``source`` as ``target``; False where the file system cannot (another device, no links)."""
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno in _CANNOT_LINK:
                return False
            raise
        return True

    def copy(self, source: Path, target: Path) -> str:
        """Copy a file's content, flush it to the disk and give its SHA-256."""
        digest = hashlib.sha256()
        with open(source, "rb") as reader, open(target, "wb") as writer:
            while block := reader.read(1 << 22):
                digest.update(block)
                writer.write(block)
            writer.flush()
            os.fsync(writer.fileno())
        return digest.hexdigest()

    def symlink(self, link: Path, target: str) -> None:
        """Make ``link`` point at ``target``, replacing what it pointed at."""
        partial = link.with_name(f".{link.name}{PARTIAL_SUFFIX}")
        partial.unlink(missing_ok=True)
        os.symlink(target, partial)
        self.rename(partial, link)

    def sync_file(self, path: Path) -> None:
        """Flush a file's content to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_directory(self, path: Path) -> None:
        """Flush a folder's entries: without it a rename may not survive a power cut."""
        self.sync_file(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder with all that is in it."""
        shutil.rmtree(path)
