"""The file operations of checkpoint commits, in one place, and which names files may have.

Owns: every call that changes the file system on the way to a committed checkpoint, each made durable where it says so;
the rule that a name which a file gives lies within its folder; what is said of files with wrong contents.
Does not own: their order (``checkpoint.folder.commit``). Tests pass a subclass that dies at a chosen call.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from growth_megatron.errors import DamagedError

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


@contextmanager
def expected_in(path: Path) -> Iterator[None]:
    """Wrong contents of ``path``, which the body works with, end it with an error that says so.

    Raises: DamagedError.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        reason = str(error).partition(chr(10))[0]
        raise DamagedError(
            f"{path} does not hold what it should ({type(error).__name__}: {reason}); restore it, or use another one"
        ) from None


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
        """Make ``link`` point at ``target``, replacing the link that is there.

        Raises: FileExistsError where something other than a link is.
        """
        if link.exists() and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, "it is no link", str(link))
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
        """Remove a folder with all that is in it, or the file or link that stands there instead."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
