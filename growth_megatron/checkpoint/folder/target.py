"""What may stand where a folder is to be written, and whether there is room for it.

Owns: the checks of a target before its first byte. Does not own: the writing and the commit
(``checkpoint.folder.commit``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from growth_megatron.checkpoint.folder.manifest import MANIFEST_NAME, REQUIRED_FILES, validate_checkpoint
from growth_megatron.config.units import format_bytes
from growth_megatron.errors import CheckpointError


def check_new(target: Path, source: Path | None = None) -> None:
    """Raises CheckpointError unless ``target`` can be made: nothing is there, and not within ``source``."""
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target} exists; name a new folder, or remove it yourself")
    if source is not None and target.absolute().resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} lies within the source {source}; name a folder outside of it")
    above = nearest_parent(target)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written to" if above.is_dir() else "is not a folder"
        raise CheckpointError(f"cannot make {target}: {above} {what}; name another folder")


def check_replaceable(target: Path) -> None:
    """Raises CheckpointError if something stands at ``target`` that is not a damaged checkpoint."""
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} exists and is a file; choose another target")
    if validate_checkpoint(target) is None:
        raise CheckpointError(f"{target} exists and is a valid checkpoint; choose another target or remove it")
    known = (MANIFEST_NAME, *REQUIRED_FILES)
    if any(target.iterdir()) and not any((target / name).exists() for name in known):
        raise CheckpointError(f"{target} exists and is not a checkpoint; choose another target")


def check_room(target: Path, needed_bytes: int, why: str = "") -> None:
    """Raises CheckpointError unless ``needed_bytes`` fit beside ``target``; ``why`` says what asks for them."""
    free = free_bytes(target)
    if needed_bytes > free:
        raise CheckpointError(
            f"{target} needs {format_bytes(needed_bytes)}{why} where {format_bytes(free)} are free; free some space, "
            "or choose a target on another disk"
        )


def free_bytes(target: Path) -> int:
    """Bytes free where ``target`` would be."""
    return shutil.disk_usage(nearest_parent(target)).free


def nearest_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def same_file_system(one: Path, target: Path) -> bool:
    """Whether ``target`` can share the files of ``one`` by links, as far as the device tells."""
    return one.stat().st_dev == nearest_parent(target).stat().st_dev
