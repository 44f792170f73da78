"""A prepared dataset on disk: ``PREFIX.bin`` and ``PREFIX.idx``, in Megatron's format.

Owns: opening these files, and the checks that need nothing but them.
Does not own: writing them (``prepare``), what ``PREFIX.json`` says (``description``), samples (``dataset``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset

from growth_megatron.config.schema import DataConfig
from growth_megatron.data.description import check_vocabulary
from growth_megatron.data.mixture import IDX_HEADER, suffixed
from growth_megatron.errors import DataError

IDX_MAGIC, IDX_VERSION = b"MMIDIDX\x00\x00", 1
IDX_DTYPES: dict[int, type[numpy.generic]] = {4: numpy.int32, 5: numpy.int64, 8: numpy.uint16}
_BLOCK_SEQUENCES = 1 << 20
REGIONS, REGION_BYTES = 64, 1 << 16  # what is read of a large file where all of it would take too long


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """The memory-mapped dataset at ``prefix``.

    Raises: DataError where a file is missing, is no Megatron index, or the two do not belong together.
    """
    missing = [str(suffixed(prefix, suffix)) for suffix in (".bin", ".idx") if not suffixed(prefix, suffix).is_file()]
    if missing:
        raise DataError(
            f"no such dataset file: {', '.join(missing)}; prepare it with `growth-megatron prepare-data "
            f"INPUT --tokenizer TOKENIZER --output {prefix}` or correct the path in data.train / data.validation"
        )
    idx = suffixed(prefix, ".idx")
    with open(idx, "rb") as stream:
        head = stream.read(IDX_HEADER.size)
    if len(head) < IDX_HEADER.size or not head.startswith(IDX_MAGIC):
        raise DataError(f"{idx} is not a Megatron index; prepare the data again with --overwrite")
    _, version, code, sequences, bounds = IDX_HEADER.unpack(head)
    if version != IDX_VERSION:
        raise DataError(f"{idx} has version {version}, this library reads {IDX_VERSION}; prepare the data again")
    if code not in IDX_DTYPES:
        raise DataError(f"{idx} stores values of type {code}, not token ids (int32, int64 or uint16)")
    length, expected = idx.stat().st_size, IDX_HEADER.size + sequences * 12 + bounds * 8
    if length != expected:
        raise DataError(
            f"{idx} is {'truncated' if length < expected else 'damaged'}: it has {length} bytes where its header says "
            f"{expected}; prepare the data again with --overwrite"
        )
    if sequences == 0 or suffixed(prefix, ".bin").stat().st_size == 0:
        raise DataError(f"dataset {prefix} holds no documents; prepare it again from a corpus with text")
    try:
        dataset = IndexedDataset(str(prefix))
    except (AssertionError, IndexError):
        raise DataError(
            f"{idx} is damaged: its documents do not fit; prepare the data again with --overwrite"
        ) from None
    _check_pointers(idx, dataset)
    expected = int(dataset.index.sequence_pointers[-1]) + int(dataset.sequence_lengths[-1]) * dataset.index.dtype_size
    actual = suffixed(prefix, ".bin").stat().st_size
    if actual != expected:
        raise DataError(
            f"{suffixed(prefix, '.bin')} has {actual} bytes where its .idx says {expected}: it is truncated or of "
            "another preparation; prepare the data again with --overwrite"
        )
    return dataset


def _check_pointers(idx: Path, dataset: IndexedDataset) -> None:
    """Each sequence begins where the one before it ends, as every writer of this format has it."""
    lengths, pointers, begins = dataset.sequence_lengths, dataset.index.sequence_pointers, 0
    for start in range(0, len(lengths), _BLOCK_SEQUENCES):
        some = lengths[start : start + _BLOCK_SEQUENCES].astype(numpy.int64)
        ends = begins + numpy.cumsum(some) * dataset.index.dtype_size
        found = pointers[start : start + _BLOCK_SEQUENCES]
        if some.min() < 0 or found[0] != begins or not numpy.array_equal(found[1:], ends[:-1]):
            raise DataError(f"{idx} is damaged: a length or pointer is wrong; prepare the data again with --overwrite")
        begins = int(ends[-1])


def regions(path: Path, whole_bytes: int = REGIONS * REGION_BYTES) -> Iterator[bytes]:
    """The whole of a file of up to ``whole_bytes``; of a larger one, evenly spread parts, first and last included."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if size <= whole_bytes:
            while part := stream.read(REGION_BYTES):
                yield part
            return
        for index in range(REGIONS):
            # A multiple of 8 keeps every region on whole token ids.
            stream.seek((size - REGION_BYTES) * index // (REGIONS - 1) // 8 * 8)
            yield stream.read(REGION_BYTES)
        stream.seek(-8, os.SEEK_END)
        yield stream.read(8)


def check_data(data: DataConfig, vocab_size: int) -> None:
    """Check all files of ``data`` against each other and the model's ``vocab_size``; reads little, needs no processes.

    What the tokens themselves say is seen by ``contents.check_contents``.

    Raises: DataError naming the first thing that does not fit, and the remedy.
    """
    for entry in (*data.train, *data.validation):
        open_indexed(entry.path)
    check_vocabulary(data, vocab_size)
