"""Arrays built once per file system and shared by every process that sees it.

Owns: the rename, the mapping back into memory.
Does not own: what is in the arrays (``dataset``).
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy

from growth_megatron.errors import DataError
from growth_megatron.parallel.file_lock import locked


def _load(folder: Path) -> dict[str, numpy.ndarray] | None:
    if not folder.is_dir():
        return None
    return {path.stem: numpy.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _store(folder: Path, arrays: dict[str, numpy.ndarray]) -> None:
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        for name, array in arrays.items():
            with open(partial / f"{name}.npy", "wb") as stream:
                numpy.save(stream, array)
                stream.flush()
                os.fsync(stream.fileno())
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same arrays
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def cached_arrays(
    directory: str | Path, key: str, build: Callable[[], dict[str, numpy.ndarray]]
) -> dict[str, numpy.ndarray]:
    """The arrays stored under ``key`` in ``directory``, memory-mapped; built and stored first where there are none.

    Safe with any number of processes and hosts. ``key`` names the content: equal keys mean equal arrays.

    Raises: DataError where the directory cannot be written or what it holds is damaged.
    """
    directory = Path(directory)
    folder = directory / key
    try:
        if (arrays := _load(folder)) is None:
            with locked(directory / f".{key}.lock"):  # without locks all build alike, and the first rename counts
                if (arrays := _load(folder)) is None:
                    _store(folder, build())
                    arrays = _load(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the data cache in {folder} cannot be used ({error}); remove that folder if it is damaged, or set "
            "data.cache_directory to a folder that can be written"
        ) from error
    assert arrays is not None
    return arrays
