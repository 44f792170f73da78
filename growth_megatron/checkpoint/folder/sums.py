"""Files of a checkpoint against the checksums of its manifest, while something else reads them.

Owns: the threads that sum, the share of each rank, what is said of a file that is another one now.
Does not own: checksums (``checkpoint.folder.manifest``), what is read meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from growth_megatron.checkpoint.folder.manifest import FileEntry, checksum
from growth_megatron.errors import DamagedError
from growth_megatron.parallel.collectives import on_all_ranks, rank, world_size

_THREADS = 2  # beside as many that work; one sums about 1.7 GB/s


@contextmanager
def summed_beside(folder: Path, files: Mapping[str, FileEntry]) -> Iterator[Callable[[], None]]:
    """Sum ``files`` of ``folder`` while the body reads them, each once; what is given waits for the sums.

    With a process group all ranks call both alike, and share the files. An error in the body ends the summing.

    Raises, by what is given, alike on all ranks:
        DamagedError: a file does not have the checksum of its entry, or cannot be read.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(_THREADS) as pool:
        own = sorted(files)[rank() :: world_size()]
        sums = {name: pool.submit(checksum, folder / name, stop) for name in own}

        def check() -> None:
            for name, found in sums.items():
                try:
                    same = found.result() == files[name]
                except OSError as error:
                    raise DamagedError(f"{folder / name} cannot be read: {error.strerror}") from None
                if not same:
                    raise changed(folder / name)

        try:
            yield lambda: on_all_ranks(check)
        finally:
            stop.set()


def changed(path: Path) -> DamagedError:
    """The error for a file that is not what its checksum says."""
    return DamagedError(
        f"{path} does not match its checksum: it changed after it was saved; restore it, or use another checkpoint"
    )
