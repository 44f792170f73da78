"""Parallel tokenization with an output order that does not depend on the number of workers.

Owns: cutting a corpus into tasks, the worker, the ordered pool.
Does not own: the files written (``prepare``). Imports neither torch nor megatron-core, since every worker pays for it.
"""

from __future__ import annotations

import io
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy

from growth_megatron.data.corpus import Source, parse_record, read_text, reading, table_texts
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.records import ALL_RECORDS, Fields
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import DataError

TASK_BYTES = 1 << 20
UINT16_LIMIT = 65500  # megatron-core's own bound for storing ids in two bytes


@dataclass(frozen=True)
class Task:
    """Work for one worker: whole ``.txt`` files, lines of a ``.jsonl`` file, or texts of a table."""

    files: tuple[Path, ...]
    texts: list[str | None] | None = None  # of files[0]; None for a row that is left out
    lines: bytes | None = None  # of files[0], from byte `offset` of the decompressed file
    offset: int = 0
    disk_bytes: int = 0  # how far this task carries the progress


@dataclass(frozen=True)
class Encoded:
    """Tokens of a task's documents, one after the other, EOS included."""

    tokens: numpy.ndarray  # [sum of lengths]
    lengths: numpy.ndarray  # [documents]
    text_bytes: int
    empty_documents: int  # left out
    other_records: int  # left out, since they are not what was asked for
    disk_bytes: int


def token_dtype(vocab_size: int) -> type[numpy.uint16] | type[numpy.int32]:
    """The type in which ids of such a vocabulary are stored."""
    return numpy.uint16 if vocab_size < UINT16_LIMIT else numpy.int32


def _line_blocks(source: Source) -> Iterator[tuple[bytes, int, int]]:
    """Whole lines of about ``TASK_BYTES``: the bytes, their offset in the text, bytes read on disk since the last."""
    offset = on_disk = 0
    with reading(source.path) as (stream, raw):
        while lines := stream.readlines(TASK_BYTES):
            block = b"".join(lines)
            yield block, offset, raw.tell() - on_disk
            offset, on_disk = offset + len(block), raw.tell()


def _table_tasks(source: Source, fields: Fields) -> Iterator[Task]:
    """Texts of about ``TASK_BYTES``; the last task carries the progress of the whole file."""
    gathered: list[str | None] = []
    for texts in table_texts(source.path, fields):
        gathered += texts
        if sum(len(text or "") for text in gathered) >= TASK_BYTES:
            yield Task((source.path,), gathered)
            gathered = []
    yield Task((source.path,), gathered, disk_bytes=source.size_bytes)


def make_tasks(sources: Sequence[Source], fields: Fields = ALL_RECORDS) -> Iterator[Task]:
    """The corpus in order, as tasks that depend on the corpus alone."""
    files: list[Path] = []
    gathered = 0
    for source in sources:
        if source.kind == "txt":
            files.append(source.path)
            gathered += source.size_bytes
            if gathered >= TASK_BYTES:
                yield Task(tuple(files), disk_bytes=gathered)
                files, gathered = [], 0
            continue
        if files:
            yield Task(tuple(files), disk_bytes=gathered)
            files, gathered = [], 0
        if source.kind == "table":
            yield from _table_tasks(source, fields)
            continue
        for lines, offset, on_disk in _line_blocks(source):
            yield Task((source.path,), None, lines, offset, on_disk)
    if files:
        yield Task(tuple(files), disk_bytes=gathered)


def _documents(task: Task, fields: Fields) -> Iterator[str | None]:
    if task.lines is None:
        yield from map(read_text, task.files) if task.texts is None else task.texts
        return
    offset = task.offset
    for line in io.BytesIO(task.lines):
        if line.strip():
            yield parse_record(line, task.files[0], offset, fields)
        offset += len(line)


def encode_task(tokenizer: Tokenizer, task: Task, fields: Fields = ALL_RECORDS) -> Encoded:
    """Tokens of the task's documents; a document without any visible character is left out."""
    parts: list[numpy.ndarray] = []
    text_bytes = empty = other = 0
    dtype = token_dtype(tokenizer.vocab_size)
    for text in _documents(task, fields):
        if text is None:
            other += 1
            continue
        if not text.strip():
            empty += 1
            continue
        text_bytes += len(text.encode())
        parts.append(numpy.array([*tokenizer.encode(text), tokenizer.eos_id], dtype=dtype))
    tokens = numpy.concatenate(parts) if parts else numpy.empty(0, dtype)
    lengths = numpy.array([len(part) for part in parts], dtype=numpy.int64)
    return Encoded(tokens, lengths, text_bytes, empty, other, task.disk_bytes)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle


_loaded = cache(open_tokenizer)  # once per worker process


def _run_task(task: Task, tokenizer_path: Path, fields: Fields) -> Encoded:
    return encode_task(_loaded(tokenizer_path), task, fields)


def encode_corpus(
    sources: Sequence[Source], tokenizer: Tokenizer, workers: int, fields: Fields
) -> Generator[Encoded, None, None]:
    """Results in the order of the corpus, at most ``4 * workers`` tasks ahead of the consumer.

    Closing the generator ends the workers.

    Raises: DataError for a file that cannot be read as text, or where a worker died.
    """
    tasks = make_tasks(sources, fields)
    if workers == 1:
        for task in tasks:
            yield encode_task(tokenizer, task, fields)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_run_task, task, tokenizer.path, fields))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker process died, most often for lack of memory; use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
