"""What all bytes of prepared datasets say: their checksums, and whether a model knows all their token ids.

Owns: the one pass over a dataset's files, remembered by their size, time of change and inode; checks that need it.
Does not own: checks that read little (``prepared``), the check of each sample (``dataset``), the comparison with a
checkpoint's data (``fingerprint``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.config.schema import DatasetConfig
from growth_megatron.data.description import read_description
from growth_megatron.data.index_cache import cached_arrays
from growth_megatron.data.mixture import suffixed
from growth_megatron.data.prepared import open_indexed
from growth_megatron.errors import DataError

BLOCK_BYTES = 1 << 23  # a multiple of every token's size
_FILES = (".bin", ".idx")


@dataclass(frozen=True)
class Contents:
    """Checksums of a dataset's files, and the range of its token ids and 0."""

    bin_sha256: str
    idx_sha256: str
    smallest_token: int
    largest_token: int


def contents(prefix: str | Path, cache_directory: str | Path) -> Contents:
    """What is in ``prefix``; its files are read whole the first time, and again when one of them has changed.

    Raises: DataError where a file cannot be read or does not have the checksum that ``PREFIX.json`` records.
    """
    state = [str(Path(prefix).resolve())]
    for suffix in _FILES:
        found = suffixed(prefix, suffix).stat()
        state += [str(number) for number in (found.st_size, found.st_mtime_ns, found.st_ino)]
    key = hashlib.sha256("|".join(["contents", *state]).encode()).hexdigest()[:24]
    stored = cached_arrays(cache_directory, key, lambda: _scan(prefix))
    (bin_sha256, idx_sha256), (smallest, largest) = stored["sums"].tolist(), stored["tokens"].tolist()
    result = Contents(bin_sha256, idx_sha256, smallest, largest)
    description = read_description(prefix)
    if description is not None and description.bin_sha256 not in (None, result.bin_sha256):
        raise DataError(
            f"{suffixed(prefix, '.bin')} does not have the checksum that {suffixed(prefix, '.json')} records: it was "
            "changed or damaged after it was prepared; restore it, or prepare the data again with --overwrite"
        )
    return result


def _scan(prefix: str | Path) -> dict[str, numpy.ndarray]:
    dtype = open_indexed(prefix).index.dtype
    digests = {suffix: hashlib.sha256() for suffix in _FILES}
    total, done = sum(suffixed(prefix, suffix).stat().st_size for suffix in _FILES), 0
    smallest, largest = 0, 0
    try:
        with bytes_progress(f"checking {prefix}") as progress:
            for suffix, digest in digests.items():
                with open(suffixed(prefix, suffix), "rb") as stream:
                    while block := stream.read(BLOCK_BYTES):
                        digest.update(block)
                        if suffix == ".bin":
                            tokens = numpy.frombuffer(block, dtype)
                            smallest, largest = min(smallest, int(tokens.min())), max(largest, int(tokens.max()))
                        progress(done := done + len(block), total)
    except OSError as error:
        raise DataError(f"dataset {prefix} cannot be read ({error.strerror}); restore its files") from error
    sums = numpy.array([digest.hexdigest() for digest in digests.values()])
    return {"sums": sums, "tokens": numpy.array([smallest, largest])}


def check_contents(entries: Sequence[DatasetConfig], vocab_size: int, cache_directory: str | Path) -> None:
    """Check every byte of some datasets, once (``contents``).

    Raises: DataError naming the first that is not what was prepared, or holds ids that the model does not know.
    """
    for entry in entries:
        found = contents(entry.path, cache_directory)
        if found.smallest_token < 0:
            raise DataError(f"dataset {entry.path} holds token {found.smallest_token}; prepare the data again")
        if found.largest_token >= vocab_size:
            raise DataError(
                f"dataset {entry.path} holds token {found.largest_token}, the model's vocab_size is {vocab_size}; set "
                f"model.vocab_size to more than {found.largest_token} or prepare the data with the model's tokenizer"
            )
