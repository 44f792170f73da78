"""How a checkpoint folder comes into being: written under a temporary name, made durable, then renamed.

Owns: the order of operations, such that after a kill between any two of them either the old state or the new one can be
found; picking up what a kill left behind.
Does not own: where checkpoints live in a run (``checkpoint.folder.run_directory``), what may stand where one is to be
written (``checkpoint.folder.target``).

The order: data files, then ``manifest.json`` (so a temporary folder that holds a sound manifest is complete), then the
rename. A folder that is being replaced steps aside under ``.trash_`` first; until the rename follows, the complete
temporary folder is the one that counts, and ``recover_folder`` finishes the rename.

A checkpoint that is written over hours can go on after a kill (``checkpoint.torch_dist.journal``): its temporary folder
holds a journal of the complete data files, which is gone before the rename.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import (
    FileEntry,
    Manifest,
    checksum_files,
    list_files,
    validate_checkpoint,
    write_manifest,
)
from growth_megatron.errors import CheckpointError
from growth_megatron.parallel.file_lock import locked

TEMPORARY_PREFIX = ".tmp_"
TRASH_PREFIX = ".trash_"
JOURNAL_FOLDER = ".journal"
"""In a temporary folder: one file for each complete data file, with its name and ``JOURNAL_SUFFIX``."""
JOURNAL_SUFFIX = ".json"


def temporary_path(final: Path) -> Path:
    """Where the checkpoint that will be ``final`` is written."""
    return final.parent / f"{TEMPORARY_PREFIX}{final.name}"


def begin_folder(final: Path, files: FileOperations) -> Path:
    """An empty temporary folder for ``final``; what an earlier, unfinished attempt left is removed."""
    temporary = temporary_path(final)
    if os.path.lexists(temporary):
        files.remove_tree(temporary)
    files.make_directory(temporary)
    return temporary


@contextmanager
def exclusive(final: Path) -> Iterator[None]:
    """Hold ``final`` for this process while it is written: two writers would ruin each other's temporary folder.

    Raises:
        CheckpointError: another process holds it, or the file system refuses something to the body.
    """
    lock = final.parent / f".lock_{final.name}"
    held = CheckpointError(f"another process is writing {final} (it holds {lock}); wait for it, or end it")
    try:
        with locked(lock, held):
            yield
    except BrokenPipeError:
        raise  # of what reads our output
    except OSError as error:
        raise CheckpointError(
            f"cannot write {final}: {error.strerror or error} ({error.filename}); free space or name another folder"
        ) from None


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
        CheckpointError: no temporary folder, a checksummed file is absent, or its size is not the one checksummed.
    """
    temporary = temporary_path(final)
    if not temporary.is_dir():
        raise CheckpointError(f"nothing to commit: {temporary} does not exist; begin the checkpoint first")
    names = [name for name in list_files(temporary) if not name.startswith(f"{JOURNAL_FOLDER}/")]
    entries = dict(checksums or {})
    if absent := sorted(entries.keys() - set(names)):
        raise CheckpointError(
            f"{temporary} lacks {', '.join(absent)}, checksummed elsewhere; is it one shared file system?"
        )
    entries |= checksum_files(temporary, [name for name in names if name not in entries])
    for name in names:
        size = (temporary / name).stat().st_size
        if size != entries[name].size_bytes:
            raise CheckpointError(
                f"{temporary / name} has {size} bytes but {entries[name].size_bytes} were checksummed; "
                "it changed meanwhile"
            )
        files.sync_file(temporary / name)
    for folder in sorted({temporary, *((temporary / name).parent for name in names)}, reverse=True):
        files.sync_directory(folder)
    complete = manifest.model_copy(update={"files": {name: entries[name] for name in names}})
    write_manifest(temporary, complete, files)
    _take_name(temporary, final, files)
    return complete


def recover_folder(temporary: Path, files: FileOperations) -> str:
    """Finish or remove a temporary folder that a kill left behind, or keep it for a growth to go on; says which."""
    final = temporary.parent / temporary.name.removeprefix(TEMPORARY_PREFIX)
    reason = validate_checkpoint(temporary)
    if reason is None and (not final.exists() or validate_checkpoint(final) is not None):
        _take_name(temporary, final, files)
        return f"finished the interrupted commit of {final.name}"
    journal = temporary / JOURNAL_FOLDER
    finished = sum(path.suffix == JOURNAL_SUFFIX for path in journal.iterdir()) if journal.is_dir() else 0
    if reason is not None and finished:
        return (
            f"kept {temporary.name}, an unfinished growth of which {finished} data files are complete: the same growth "
            "goes on from there"
        )
    files.remove_tree(temporary)
    return f"removed {temporary.name}, left by an interrupted save ({reason or 'it was committed already'})"


def remove_folder(folder: Path, files: FileOperations) -> None:
    """Remove a checkpoint; it loses its name first, so a kill leaves no half-deleted checkpoint."""
    trash = folder.parent / f"{TRASH_PREFIX}{folder.name}"
    if os.path.lexists(trash):
        files.remove_tree(trash)
    files.rename(folder, trash)
    files.remove_tree(trash)


def _take_name(temporary: Path, final: Path, files: FileOperations) -> None:
    if (temporary / JOURNAL_FOLDER).exists():
        files.remove_tree(temporary / JOURNAL_FOLDER)
    trash = final.parent / f"{TRASH_PREFIX}{final.name}"
    if os.path.lexists(final):
        if os.path.lexists(trash):
            files.remove_tree(trash)
        files.rename(final, trash)
    files.rename(temporary, final)
    files.sync_directory(final.parent)
    if os.path.lexists(trash):
        files.remove_tree(trash)
