"""A run's checkpoints in an object store, or anything else that fsspec speaks to: copied there, fetched from there.

Owns: ``STORE/checkpoints/step_...``, the copies that are missing there, those that are there too much, fetching one.
Does not own: the run's own checkpoints, which stay on the disk (``checkpoint.folder.run_directory``).

A store has no rename, so ``manifest.json`` goes last: a checkpoint without it is not there. Files that a checkpoint of
the store has already, as most of a grown one's are, are copied by the store itself. What fails is done again with the
next checkpoint. Everything here runs on rank 0.
"""

from __future__ import annotations

import logging
import posixpath
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.folder.commit import begin_folder, exclusive, temporary_path
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import (
    MANIFEST_NAME,
    Manifest,
    read_manifest,
    validate_checkpoint,
)
from growth_megatron.checkpoint.folder.run_directory import CheckpointName, RunDirectory
from growth_megatron.errors import CheckpointError, ConfigError

_LOG = logging.getLogger(__name__)
_RUN_FILES = ("metrics.jsonl", "config.yaml")
POLL_S = 0.2


def is_url(path: str) -> bool:
    """Whether a path is one of a store."""
    return "://" in path


class Store:
    """``url/checkpoints``. Creating the object connects to nothing."""

    def __init__(self, url: str) -> None:
        """Raises: ConfigError for a protocol whose package is missing, or that is none."""
        import fsspec  # comes with torch

        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            hint = " (pip install s3fs)" if url.startswith("s3://") else ""
            raise ConfigError(f"{url}: {error}{hint}") from None
        self._checkpoints = posixpath.join(self._root, "checkpoints")

    def names(self) -> list[CheckpointName]:
        """Of the checkpoints that are there, oldest first.  Raises: CheckpointError if the store does not answer."""
        with self._answering():
            self._files.invalidate_cache()
            if not self._files.exists(self._checkpoints):
                return []
            folders = [str(entry).rstrip("/") for entry in self._files.ls(self._checkpoints, detail=False)]
            named = {name: folder for folder in folders if (name := CheckpointName.parse(posixpath.basename(folder)))}
            return sorted(name for name, folder in named.items() if self._is_there(folder))

    def put(self, checkpoint: Path, others: dict[str, str]) -> None:
        """Copy a checkpoint of the disk; ``others``: where the store has contents already, by their checksum.

        What it puts is added to ``others``.
        """
        manifest, folder = read_manifest(checkpoint), self._folder(checkpoint.name)
        with self._answering():
            for name, entry in manifest.files.items():
                target = posixpath.join(folder, name)
                if entry.sha256 in others and others[entry.sha256] != target:
                    self._files.copy(others[entry.sha256], target)
                else:
                    self._files.put_file(str(checkpoint / name), target)
                others[entry.sha256] = target
            self._files.put_file(str(checkpoint / MANIFEST_NAME), posixpath.join(folder, MANIFEST_NAME))

    def put_run_file(self, path: Path) -> None:
        """Copy a file of the run directory beside the checkpoints."""
        with self._answering():
            self._files.put_file(str(path), posixpath.join(self._root, path.name))

    def get_run_file(self, path: Path) -> None:
        """Fetch it, if it is there and not on the disk."""
        source = posixpath.join(self._root, path.name)
        with self._answering():
            if not path.exists() and self._files.exists(source):
                partial = path.with_name(f".{path.name}.fetched")
                self._files.get_file(source, str(partial))
                partial.rename(path)

    def contents(self, manifest: Manifest, name: str) -> dict[str, str]:
        """Where the store has the files of a checkpoint that is there, by checksum."""
        return {entry.sha256: posixpath.join(self._folder(name), file) for file, entry in manifest.files.items()}

    def remove(self, name: str) -> None:
        """Remove a checkpoint: first what makes it one."""
        with self._answering():
            self._files.rm_file(posixpath.join(self._folder(name), MANIFEST_NAME))
            self._files.rm(self._folder(name), recursive=True)

    def fetch(self, name: str, final: Path) -> None:
        """Write a checkpoint of the store to ``final``, whole or not at all.

        Raises: CheckpointError if the store does not answer, or what comes is not what the manifest says.
        """
        files, temporary = FileOperations(), temporary_path(final)
        final.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(final):
            begin_folder(final, files)
            with self._answering():
                self._files.get(self._folder(name).rstrip("/") + "/", str(temporary) + "/", recursive=True)
            if (reason := validate_checkpoint(temporary, full=True)) is not None:
                raise CheckpointError(f"{self.url}/checkpoints/{name} did not come whole: {reason}; try again")
            files.rename(temporary, final)
            files.sync_directory(final.parent)

    def _folder(self, name: str) -> str:
        return posixpath.join(self._checkpoints, name)

    def _is_there(self, folder: str) -> bool:
        return bool(self._files.exists(posixpath.join(folder, MANIFEST_NAME)))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # of whatever package speaks the protocol
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(
                f"checkpoint.store {self.url} does not do what is asked: {said}; mend that, or set "
                "checkpoint.store=null to go on without it"
            ) from error


class StoreCopies:
    """Keeps a store's checkpoints like those of a run directory, in a thread of its own."""

    def __init__(self, store: Store, directory: RunDirectory) -> None:
        self._store, self._directory = store, directory
        self._own: set[str] = set()
        self._wanted, self._ended = threading.Event(), False
        self.problem: str | None = None
        """What went wrong last, until it has gone well."""
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def update(self) -> None:
        """Something has changed on the disk; returns at once."""
        self._is_idle.clear()
        self._wanted.set()

    def finish(self, alive: Callable[[], Any]) -> None:
        """Wait until all is there, or has failed once more; ``alive`` is called meanwhile."""
        if self.problem:
            self.update()
        while not self._is_idle.wait(POLL_S):
            alive()

    def close(self) -> None:
        """Work no more."""
        self._ended = True
        self._wanted.set()

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._ended:
                return
            try:
                copy_missing(self._store, self._directory, self._own)
                self.problem = None
            except (CheckpointError, OSError) as error:
                self.problem = str(error)
                _LOG.warning("%s; training goes on, and the next checkpoint tries again", error)
            if not self._wanted.is_set():
                self._is_idle.set()


def copy_missing(store: Store, directory: RunDirectory, own: set[str]) -> None:
    """Copy what the store lacks, oldest first, then remove there what the run has removed.

    ``own`` are the names that have been seen on the disk, and grows: nothing else is removed.
    Raises: CheckpointError if the store does not do it.
    """
    there, contents = set(map(str, store.names())), dict[str, str]()
    local = [path for path in reversed(directory.checkpoints()) if validate_checkpoint(path) is None]
    own |= {path.name for path in local}
    for path in local:
        if path.name in there:
            contents |= store.contents(read_manifest(path), path.name)
    for path in local:
        if path.name not in there:
            try:
                store.put(path, contents)
            except FileNotFoundError:  # removed meanwhile
                continue
            there.add(path.name)
    for path in (directory.path / name for name in _RUN_FILES):
        if path.exists():
            store.put_run_file(path)
    kept = {path.name for path in directory.checkpoints()}
    for name in sorted((there & own) - kept):
        store.remove(name)


def fetch_newer(store: Store, directory: RunDirectory) -> str | None:
    """Fetch the store's newest checkpoint where the run has none as new; what was done, in words.

    Raises: CheckpointError if the store does not answer, or the checkpoint does not come whole.
    """
    names = store.names()
    own, _ = directory.newest_valid()
    here = CheckpointName.parse(own.name) if own is not None else None
    if not names or (here is not None and here >= names[-1]):
        return None
    newest = names[-1]
    directory.make_way(newest.step, newest.grown)
    store.fetch(str(newest), directory.checkpoint_path(newest.step, newest.grown))
    for name in _RUN_FILES:
        store.get_run_file(directory.path / name)
    return f"fetched {newest} from {store.url}"


def fetch_origin(url: str, folder: Path) -> Path:
    """The checkpoint that a URL means (STORE, STORE@STEP or STORE/checkpoints/NAME), fetched into ``folder`` once.

    Raises: CheckpointError if there is none.
    """
    root, _, step = url.partition("@") if "@" in url.rpartition("/")[2] else (url, "", "")
    above, _, last = root.rstrip("/").rpartition("/")
    wanted = CheckpointName.parse(last)
    store = Store(above.removesuffix("/checkpoints") if wanted else root)
    names = store.names()
    if step:
        wanted = CheckpointName(int(step)) if step.isdecimal() else None
    elif wanted is None and names:
        wanted = names[-1]
    if wanted not in names:
        raise CheckpointError(f"checkpoint.resume: {url}: there are {', '.join(map(str, names)) or 'no'} checkpoints")
    final = folder / str(wanted)
    if not final.exists():
        store.fetch(str(wanted), final)
    return final
