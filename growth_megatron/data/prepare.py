"""Text to Megatron's ``.bin``/``.idx``: the work behind ``growth-megatron prepare-data``.

Owns: the output files: written under temporary names, complete before they get their own.
Does not own: reading text (``corpus``), tokenizing in parallel (``encode``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.data.corpus import Source, list_sources, unknown_fields
from growth_megatron.data.description import Description, read_description
from growth_megatron.data.encode import encode_corpus, token_dtype
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.mixture import suffixed
from growth_megatron.data.prepared import open_indexed
from growth_megatron.data.records import ALL_RECORDS, Fields
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import DataError

SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class Prepared:
    """What ``prepare_data`` wrote: the training prefix first, then the held-out one where there is one."""

    outputs: dict[Path, Description]
    seconds: float
    other_records: int = 0
    """Left out, since they do not meet the conditions."""


def validation_prefix(output_prefix: str | Path) -> Path:
    """Where the held-out documents of ``output_prefix`` go."""
    return suffixed(output_prefix, "_validation")


def default_workers() -> int:
    """One worker for each core this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Output:
    """One prefix under construction."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._partial = prefix.with_name(f".{prefix.name}.{os.getpid()}.partial")
        self._dtype = token_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(str(suffixed(self._partial, ".bin")), dtype=self._dtype)
        self.documents = self.tokens = self.largest_token = 0
        self.digest = hashlib.sha256()

    def add(self, tokens: numpy.ndarray) -> None:
        self._builder.add_document(tokens, [len(tokens)])
        self.digest.update(tokens.astype(self._dtype).tobytes())
        self.largest_token = max(self.largest_token, int(tokens.max()))
        self.documents += 1
        self.tokens += len(tokens)

    def append(self, prefix: str | Path) -> None:
        """All documents of a prepared dataset of the same vocabulary."""
        indexed, digest = open_indexed(prefix), hashlib.sha256()
        with open(suffixed(prefix, ".bin"), "rb") as stream:
            while block := stream.read(1 << 23):
                self.digest.update(block)
                digest.update(block)
        known = read_description(prefix)
        if known and digest.hexdigest() != known.bin_sha256:
            raise DataError(f"{prefix}.bin does not have the checksum that {prefix}.json records; prepare it again")
        self._builder.add_index(str(prefix))
        self.documents += len(indexed)
        self.tokens += int(indexed.sequence_lengths.sum())

    def finish(self, description: Description) -> None:
        """Give the files their names; an index never stands beside data that is not its own."""
        self._builder.finalize(str(suffixed(self._partial, ".idx")))
        description.write(suffixed(self._partial, ".json"))
        for suffix in SUFFIXES:
            with open(suffixed(self._partial, suffix), "rb") as stream:
                os.fsync(stream.fileno())
        for suffix in (".json", ".idx"):
            suffixed(self.prefix, suffix).unlink(missing_ok=True)
        for suffix in SUFFIXES:
            suffixed(self._partial, suffix).replace(suffixed(self.prefix, suffix))

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._builder.data_file.close()
        for suffix in SUFFIXES:
            suffixed(self._partial, suffix).unlink(missing_ok=True)


def _refuse_existing(prefixes: Sequence[Path]) -> None:
    for prefix in prefixes:
        for suffix in SUFFIXES:
            if suffixed(prefix, suffix).exists():
                raise DataError(
                    f"{suffixed(prefix, suffix)} exists already; give --overwrite to replace it or another --output"
                )


@contextlib.contextmanager
def _outputs(prefixes: Sequence[Path], vocab_size: int) -> Iterator[list[_Output]]:
    """Outputs under construction; whatever is not finished is removed."""
    outputs: list[_Output] = []
    try:
        for prefix in prefixes:
            outputs.append(_Output(prefix, vocab_size))
        yield outputs
    except OSError as error:
        raise DataError(
            f"cannot write {prefixes[0]} ({error.strerror or error}); make room there or choose another --output"
        ) from error
    finally:
        for output in outputs:
            output.discard()


def _check_documents(
    outputs: Sequence[_Output], inputs: Sequence[str | Path], validation_every: int | None, fields: Fields, other: int
) -> None:
    seen = sum(output.documents for output in outputs)
    if not seen and other:
        raise DataError(
            f"no document is left: --where {' --where '.join(map(str, fields.where))} leaves out {other:,} records, "
            "and those that it keeps have no text; correct the field or the value"
        )
    if not seen:
        raise DataError(f"the corpus is empty: no document with text in {', '.join(map(str, inputs))}")
    if any(output.documents == 0 for output in outputs):
        raise DataError(
            f"the corpus has {seen} document(s), so holding out every {validation_every}th leaves one side empty; "
            f"use --validation-every between 2 and {seen}"
            if seen > 1
            else "the corpus has one document, which cannot be split; leave out --validation-every"
        )


def prepare_data(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output_prefix: str | Path,
    workers: int | None = None,
    validation_every: int | None = None,
    *,
    fields: Fields = ALL_RECORDS,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    progress_stream: TextIO | None = None,
) -> Prepared:
    """Tokenize text files into ``OUTPUT_PREFIX.bin``, ``.idx`` and ``.json``; each document ends with EOS.

    The output is the same bytes at any number of workers. With ``validation_every`` = n every n-th document goes to
    ``OUTPUT_PREFIX_validation`` instead. Progress goes to ``progress_stream`` (standard error by default).

    Args: shard: (i, n), i from 1: only every n-th of the files, into ``OUTPUT_PREFIX_IofN``; one that is there already
        and came of the same files and settings is left as it is.
    Raises: DataError where there is no text, a file cannot be read, or an output exists and ``overwrite`` is not set.
    """
    if validation_every is not None and validation_every < 2:
        raise DataError(f"--validation-every {validation_every} leaves nothing to train on; use 2 or more")
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise DataError(f"--workers {workers} is not a number of processes; use 1 or more")
    sources = list_sources(inputs)
    if shard is not None:
        sources, output_prefix = _shard(sources, output_prefix, *shard)
    prefixes = [Path(output_prefix)] + ([validation_prefix(output_prefix)] if validation_every else [])
    reader = open_tokenizer(tokenizer)
    for sentence in unknown_fields(sources, fields):
        print(f"warning: {sentence}", file=progress_stream or sys.stderr)
    if not overwrite:
        if shard is not None and (done := _done(prefixes, sources, reader, fields)):
            return Prepared(done, 0.0)
        _refuse_existing(prefixes)
    started, disk_bytes, total_bytes = time.monotonic(), 0, sum(source.size_bytes for source in sources)
    shown = bytes_progress("preparing", stream=progress_stream)
    results = contextlib.closing(encode_corpus(sources, reader, workers, fields))
    with _outputs(prefixes, reader.vocab_size) as outputs, shown as progress, results as encoded_tasks:
        text_bytes = empty = other = seen = 0
        for encoded in encoded_tasks:
            start = 0
            for end in numpy.cumsum(encoded.lengths).tolist():
                seen += 1
                held_out = validation_every is not None and seen % validation_every == 0
                outputs[1 if held_out else 0].add(encoded.tokens[start:end])
                start = end
            text_bytes += encoded.text_bytes
            empty += encoded.empty_documents
            other += encoded.other_records
            disk_bytes += encoded.disk_bytes
            tokens = sum(output.tokens for output in outputs)
            progress(disk_bytes, total_bytes, f"{seen:,} documents, {tokens:,} tokens")
        _check_documents(outputs, inputs, validation_every, fields, other)
        descriptions = [_describe(output, reader, sources, fields, text_bytes, empty) for output in outputs]
        for output, description in zip(outputs, descriptions, strict=True):
            output.finish(description)
    return Prepared(dict(zip(prefixes, descriptions, strict=True)), time.monotonic() - started, other)


def _describe(
    output: _Output, tokenizer: Tokenizer, sources: Sequence[Source], fields: Fields, text_bytes: int, empty: int
) -> Description:
    """``text_bytes`` and ``empty`` are those of all the sources, held-out documents included."""
    return Description(
        documents=output.documents,
        tokens=output.tokens,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.path.name,
        tokenizer_sha256=tokenizer.sha256,
        dtype=numpy.dtype(token_dtype(tokenizer.vocab_size)).name,
        text_bytes=text_bytes,
        empty_documents=empty,
        sources=[(source.name, source.size_bytes) for source in sources],
        bin_sha256=output.digest.hexdigest(),
        largest_token=output.largest_token,
        where=[str(condition) for condition in fields.where],
    )


def _shard(sources: Sequence[Source], output_prefix: str | Path, number: int, count: int) -> tuple[list[Source], Path]:
    """The files of one shard and where they go."""
    if not 1 <= number <= count:
        raise DataError(f"--shard {number}/{count} is none of {count} shards; count them from 1, as in 1/{count}")
    if len(sources) < count:
        raise DataError(
            f"--shard {number}/{count}: the corpus has {len(sources)} file(s), and a shard takes whole ones; use at "
            f"most {len(sources)} shards, or cut the files up"
        )
    return list(sources[number - 1 :: count]), suffixed(output_prefix, f"_{number:0{len(str(count))}}of{count}")


def _done(
    prefixes: Sequence[Path], sources: Sequence[Source], tokenizer: Tokenizer, fields: Fields
) -> dict[Path, Description]:
    """What earlier preparation of the same files left at ``prefixes``; empty where it is not whole."""
    if not all(suffixed(prefix, suffix).is_file() for prefix in prefixes for suffix in SUFFIXES):
        return {}
    found = {prefix: read_description(prefix) for prefix in prefixes}
    wanted = (tokenizer.sha256, [(s.name, s.size_bytes) for s in sources], [str(c) for c in fields.where])
    return {
        prefix: known
        for prefix, known in found.items()
        if known and (known.tokenizer_sha256, [(n, s) for n, s in known.sources], known.where) == wanted
    }


def merge_data(prefixes: Sequence[str | Path], output_prefix: str | Path, *, overwrite: bool = False) -> Prepared:
    """Join prepared datasets, one after the other, into one; what it was joined from may be removed afterwards.

    Raises: DataError where one is damaged, was prepared with another tokenizer, or the output exists.
    """
    started, output = time.monotonic(), Path(output_prefix)
    if not overwrite:
        _refuse_existing([output])
    parts = [(prefix, _described(prefix)) for prefix in prefixes]
    first = parts[0][1]
    for prefix, part in parts:
        if part.tokenizer_sha256 != first.tokenizer_sha256:
            raise DataError(
                f"{prefix} was prepared with another tokenizer than {parts[0][0]}; prepare one of them again"
            )
    total, done = sum(suffixed(prefix, ".bin").stat().st_size for prefix, _ in parts), 0
    with _outputs([output], first.vocab_size) as (merged,), bytes_progress("merging") as progress:
        for prefix, _ in parts:
            merged.append(prefix)
            done += suffixed(prefix, ".bin").stat().st_size
            progress(done, total, f"{merged.documents:,} documents, {merged.tokens:,} tokens")
        description = replace(
            first,
            documents=merged.documents,
            tokens=merged.tokens,
            text_bytes=sum(part.text_bytes for _, part in parts),
            empty_documents=sum(part.empty_documents for _, part in parts),
            sources=[source for _, part in parts for source in part.sources],
            bin_sha256=merged.digest.hexdigest(),
            largest_token=max(part.largest_token or 0 for _, part in parts),
            where=sorted({condition for _, part in parts for condition in part.where}),
        )
        merged.finish(description)
    return Prepared({output: description}, time.monotonic() - started)


def _described(prefix: str | Path) -> Description:
    open_indexed(prefix)  # refuses what is not whole
    found = read_description(prefix)
    if found is None or found.bin_sha256 is None:
        raise DataError(f"{suffixed(prefix, '.json')} is not there or of an earlier version; prepare {prefix} again")
    return found
