"""Text to Megatron's ``.bin``/``.idx``: the work behind ``growth-megatron prepare-data``.

Owns: the output files: written under temporary names, complete before they get their own.
Does not own: reading text (``corpus``), tokenizing in parallel (``encode``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.data.corpus import Source, list_sources
from growth_megatron.data.encode import encode_corpus, token_dtype
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.mixture import suffixed
from growth_megatron.data.prepared import Description
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import DataError

SUFFIXES = (".bin", ".idx", ".json")


@dataclass(frozen=True)
class Prepared:
    """What ``prepare_data`` wrote: the training prefix first, then the held-out one where there is one."""

    outputs: dict[Path, Description]
    seconds: float


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


def _check_documents(outputs: Sequence[_Output], inputs: Sequence[str | Path], validation_every: int | None) -> None:
    seen = sum(output.documents for output in outputs)
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
    text_field: str = "text",
    overwrite: bool = False,
    progress_stream: TextIO | None = None,
) -> Prepared:
    """Tokenize text files into ``OUTPUT_PREFIX.bin``, ``.idx`` and ``.json``; each document ends with EOS.

    The output is the same bytes at any number of workers. With ``validation_every`` = n every n-th document goes to
    ``OUTPUT_PREFIX_validation`` instead. Progress goes to ``progress_stream`` (standard error by default).

    Raises: DataError where there is no text, a file cannot be read, or an output exists and ``overwrite`` is not set.
    """
    if validation_every is not None and validation_every < 2:
        raise DataError(f"--validation-every {validation_every} leaves nothing to train on; use 2 or more")
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise DataError(f"--workers {workers} is not a number of processes; use 1 or more")
    prefixes = [Path(output_prefix)] + ([validation_prefix(output_prefix)] if validation_every else [])
    if not overwrite:
        _refuse_existing(prefixes)
    reader = open_tokenizer(tokenizer)
    sources = list_sources(inputs)
    started, disk_bytes, total_bytes = time.monotonic(), 0, sum(source.size_bytes for source in sources)
    shown = bytes_progress("preparing", stream=progress_stream)
    results = contextlib.closing(encode_corpus(sources, reader, workers, text_field))
    with _outputs(prefixes, reader.vocab_size) as outputs, shown as progress, results as encoded_tasks:
        text_bytes = empty = seen = 0
        for encoded in encoded_tasks:
            start = 0
            for end in numpy.cumsum(encoded.lengths).tolist():
                seen += 1
                held_out = validation_every is not None and seen % validation_every == 0
                outputs[1 if held_out else 0].add(encoded.tokens[start:end])
                start = end
            text_bytes += encoded.text_bytes
            empty += encoded.empty_documents
            disk_bytes += encoded.disk_bytes
            tokens = sum(output.tokens for output in outputs)
            progress(disk_bytes, total_bytes, f"{seen:,} documents, {tokens:,} tokens")
        _check_documents(outputs, inputs, validation_every)
        descriptions = [_describe(output, reader, sources, text_bytes, empty) for output in outputs]
        for output, description in zip(outputs, descriptions, strict=True):
            output.finish(description)
    return Prepared(dict(zip(prefixes, descriptions, strict=True)), time.monotonic() - started)


def _describe(
    output: _Output, tokenizer: Tokenizer, sources: Sequence[Source], text_bytes: int, empty: int
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
    )
