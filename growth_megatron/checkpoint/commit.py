"""How a checkpoint folder comes into being: written under a temporary name, made durable, then renamed.

Owns: the order of operations, such that after a kill between any two of them either the old state or the new one can be
found; and picking up what a kill left behind.
Does not own: where checkpoints live in a run (``checkpoint.run_directory``).

The order: data files, then ``manifest.json`` (so a temporary folder that holds a sound manifest is complete), then the
rename. A folder that is being replaced steps aside under ``.trash_`` first; until the rename follows, the complete
temporary folder is the one that counts, and ``recover_folder`` finishes the rename.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from growth_megatron.checkpoint.files import FileOperations
from growth_megatron.checkpoint.manifest import (
    FileEntry,
    Manifest,
    checksum_files,
    list_files,
    validate_checkpoint,
    write_manifest,
)
from growth_megatron.errors import CheckpointError

TEMPORARY_PREFIX = ".tmp_"
TRASH_PREFIX = ".trash_"


def temporary_path(final: Path) -> Path:
    """Where the checkpoint that will be ``final`` is written."""
    return final.parent / f"{TEMPORARY_PREFIX}{final.name}"


def begin_folder(final: Path, files: FileOperations) -> Path:
    """An empty temporary folder for ``final``; what an earlier, unfinished attempt left is removed."""
    temporary = temporary_path(final)
    if temporary.exists():
        files.remove_tree(temporary)
    files.make_directory(temporary)
    return temporary


def commit_folder(
    final: Path,
    manifest: Manifest,
    files: FileOperations,
    checksums: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Turn the temporary folder of ``final`` into the checkpoint ``final``.

    Args:
        manifest: everything but ``files``, which is filled in here.
        checksums: of files that need no summing any more, by relative name.

    Returns: the manifest as written.

    Raises:
        CheckpointError: no temporary folder, a summed file is absent, or its size is not the one summed.
    """
    temporary = temporary_path(final)
    if not temporary.is_dir():
        raise CheckpointError(f"nothing to commit: {temporary} does not exist; begin the checkpoint first")
    names = list_files(temporary)
    entries = dict(checksums or {})
    if absent := sorted(entries.keys() - set(names)):
        raise CheckpointError(f"{temporary} lacks {', '.join(absent)}, summed elsewhere; is it one shared file system?")
    entries |= checksum_files(temporary, [name for name in names if name not in entries])
    for name in names:
        size = (temporary / name).stat().st_size
        if size != entries[name].size_bytes:
            raise CheckpointError(
                f"{temporary / name} has {size} bytes but {entries[name].size_bytes} were summed; it changed meanwhile"
            )
        files.sync_file(temporary / name)
    for folder in sorted({temporary, *((temporary / name).parent for name in names)}, reverse=True):
        files.sync_directory(folder)
    complete = manifest.model_copy(update={"files": {name: entries[name] for name in names}})
    write_manifest(temporary, complete, files)
    _take_name(temporary, final, files)
    return complete


def recover_folder(temporary: Path, files: FileOperations) -> str:
    """Finish or remove a temporary folder that a kill left behind; says what was done."""
    final = temporary.parent / temporary.name.removeprefix(TEMPORARY_PREFIX)
    reason = validate_checkpoint(temporary)
    if reason is None and (not final.exists() or validate_checkpoint(final) is not None):
        _take_name(temporary, final, files)
        return f"finished the interrupted commit of {final.name}"
    files.remove_tree(temporary)
    return f"removed {temporary.name}, left by an interrupted save ({reason or 'it was committed already'})"


def remove_folder(folder: Path, files: FileOperations) -> None:
    """Remove a checkpoint; it loses its name first, so a kill leaves no half-deleted checkpoint."""
    trash = folder.parent / f"{TRASH_PREFIX}{folder.name}"
    if trash.exists():
        files.remove_tree(trash)
    files.rename(folder, trash)
    files.remove_tree(trash)


def _take_name(temporary: Path, final: Path, files: FileOperations) -> None:
    trash = final.parent / f"{TRASH_PREFIX}{final.name}"
    if final.exists():
        if trash.exists():
            files.remove_tree(trash)
        files.rename(final, trash)
    files.rename(temporary, final)
    files.sync_directory(final.parent)
    if trash.exists():
        files.remove_tree(trash)
