"""What may stand where a folder is to be written, and whether there is room for it.

Owns: the checks of a target before its first byte. Does not own: the writing and the commit
(``checkpoint.folder.commit``).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from growth_megatron.checkpoint.folder.manifest import list_files, read_manifest
from growth_megatron.config.units import format_bytes
from growth_megatron.errors import CheckpointError


def check_new(target: Path, source: Path | None = None, overwrite: bool | None = None) -> None:
    """Raises CheckpointError unless ``target`` can be made, and does not lie within ``source`` nor the other way round.

    Args:
        overwrite: whether a checkpoint of this library may stand there, to be replaced; None: it cannot be asked for.
    """
    if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
        replaceable = overwrite is not None and _is_ours(target)
        if not (replaceable and overwrite):
            remedy = ", add --overwrite to replace it" if replaceable else ""
            raise CheckpointError(f"{target} exists; name a new folder{remedy}, or remove it yourself")
    if source is not None:
        here, there = target.absolute().resolve(), source.resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise CheckpointError(f"{target} and the source {source} lie in one another; name a folder outside of it")
    above = nearest_parent(target)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written to" if above.is_dir() else "is not a folder"
        raise CheckpointError(f"cannot make {target}: {above} {what}; name another folder")


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds what its sound manifest says and nothing else, so that nobody's work is lost with it."""
    try:
        return not folder.is_symlink() and read_manifest(folder).files.keys() >= set(list_files(folder))
    except CheckpointError:
        return False


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
