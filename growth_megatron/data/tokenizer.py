"""SentencePiece tokenizers: a thin reader and the training of new ones.

Owns: the model file, ids of text, text of ids.
Does not own: Hugging Face's tokenizers (``json_tokenizer``), which ids end a document in a dataset (``encode``).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from growth_megatron.data.corpus import Source, list_sources, read_documents
from growth_megatron.data.records import ALL_RECORDS, Fields
from growth_megatron.errors import DataError

MAX_SENTENCE_BYTES = 1 << 14  # SentencePiece silently drops a longer line, so longer ones are cut
# The number of threads is written into the model file and changes nothing else in it: one constant keeps files equal.
TRAINING_THREADS = 16
FILE_NAMES = ("tokenizer.json", "tokenizer.model")  # in a folder
SHORT_TEXT, LONG_TEXT = 1 << 13, 1 << 23  # characters


class Tokenizer:
    """A SentencePiece model file.

    ``begins_with_bos`` says whether a text that a model is asked about begins with BOS; ``encode`` never adds it.

    Raises: DataError where the file is missing, damaged, or has no end-of-sentence piece.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = tokenizer_file(path)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
            self.vocab_size = int(self._processor.vocab_size())
            self._longest = SHORT_TEXT if self._lines_are_independent() else LONG_TEXT
        except (
            RuntimeError,
            ValueError,
        ) as error:  # ValueError: text that is no UTF-8, in a piece or in its own message
            raise DataError(f"tokenizer {self.path} is not an intact SentencePiece model ({error})") from error
        self.bos_id = int(self._processor.bos_id())  # -1 where the model has none
        self.eos_id = int(self._processor.eos_id())
        self.begins_with_bos = False
        if self.eos_id < 0:
            raise DataError(f"tokenizer {self.path} has no end-of-sentence piece, which separates documents")

    def _lines_are_independent(self) -> bool:
        """Whether a text cut after a newline gives the same ids: no piece holds one, and none is put in front."""
        newline = self.encode_whole("\n")
        return (
            self.encode_whole("\n\n") == newline * 2
            and self.decode(newline) == "\n"
            and not any("\n" in self._processor.id_to_piece(token) for token in range(self.vocab_size))
        )

    def encode_whole(self, text: str) -> list[int]:
        """Ids of ``text`` in one piece; time per character grows with the length."""
        return list(self._processor.encode(text, out_type=int))

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS and EOS.

        A long text is cut after newlines where that changes nothing. For a tokenizer where it does (LLaMA's puts a
        space in front of each text) only one beyond ``LONG_TEXT`` characters is, which memory demands.
        """
        ids: list[int] = []
        start = 0
        while len(text) - start > self._longest:
            end = text.rfind("\n", start, start + self._longest) + 1
            if end <= start:  # one line longer than that
                end = text.find("\n", start, start + LONG_TEXT) + 1 or start + LONG_TEXT
            ids += self.encode_whole(text[start:end])
            start = end
        return ids + self.encode_whole(text[start:])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return str(self._processor.decode([int(token) for token in ids]))

    @property
    def sha256(self) -> str:
        """Hash of the model file."""
        return tokenizer_sha256(self.path)


def tokenizer_file(path: str | Path) -> Path:
    """``path``, or of a folder the file that is its tokenizer.

    Raises: DataError where there is none.
    """
    path = Path(path)
    found = next((path / name for name in FILE_NAMES if (path / name).is_file()), path)
    if not found.is_file():
        what = f"has no {' or '.join(FILE_NAMES)}" if path.is_dir() else "does not exist"
        raise DataError(
            f"tokenizer {path} {what}; give a SentencePiece model, a tokenizer.json or a folder with one, or train one "
            "with `growth-megatron train-tokenizer INPUT --output tokenizer.model --vocab-size N`"
        )
    return found


def tokenizer_sha256(path: str | Path) -> str:
    """Hash of a tokenizer's file, by which datasets and checkpoints know it."""
    try:
        return hashlib.sha256(tokenizer_file(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read ({error.strerror}); correct data.tokenizer") from error


def _cut(line: str) -> Iterator[str]:
    """``line`` in pieces that SentencePiece accepts, cut at spaces where there are any."""
    longest = MAX_SENTENCE_BYTES // 4  # characters; UTF-8 needs at most 4 bytes for one
    while len(line) > longest:
        end = line.rfind(" ", 1, longest)
        end = end if end > 0 else longest
        yield line[:end]
        line = line[end:]
    yield line


def sample_lines(sources: Sequence[Source], max_bytes: int, fields: Fields = ALL_RECORDS) -> list[str]:
    """Lines of the corpus, evenly thinned to about ``max_bytes`` of UTF-8; the same for the same corpus.

    Each time the bound is passed, every other line kept so far is dropped and from then on half as many are taken.
    """
    kept: list[str] = []
    kept_bytes, stride, seen = 0, 1, 0
    for source in sources:
        for document in read_documents(source, fields):
            for line in document.splitlines():
                for sentence in _cut(line):
                    if not sentence.strip():
                        continue
                    if seen % stride == 0:
                        kept.append(sentence)
                        kept_bytes += len(sentence.encode())
                        if kept_bytes > max_bytes and len(kept) > 1:
                            kept, stride = kept[::2], stride * 2
                            kept_bytes = sum(len(entry.encode()) for entry in kept)
                    seen += 1
    return kept


def _training_error(message: str, vocab_size: int) -> DataError:
    """SentencePiece's own words turned into what to change."""
    if largest := re.search(r"value <= (\d+)", message):
        return DataError(
            f"the corpus is too small for a vocabulary of {vocab_size}: the largest possible is {largest.group(1)}; "
            "lower --vocab-size or give more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"a vocabulary of {vocab_size} cannot hold the 256 bytes and the characters of the corpus: the smallest "
            f"possible is {smallest.group(1)}; raise --vocab-size"
        )
    return DataError(f"SentencePiece could not train a tokenizer: {message}")


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    *,
    max_bytes: int = 200_000_000,
    fields: Fields = ALL_RECORDS,
    overwrite: bool = False,
) -> Tokenizer:
    """Train a BPE tokenizer of LLaMA's kind and write it to ``output``.

    Byte fallback, digits apart, no normalisation, and, other than LLaMA's, no space put before the text, so that
    decoding what was encoded gives the text back. Ids: 0 unknown, 1 BOS, 2 EOS. The file depends on the corpus alone.

    Args: max_bytes: text to train on; a larger corpus is thinned evenly to at most this.
    Raises: DataError where the corpus is empty, or too small or too large for ``vocab_size``, or ``output`` exists.
    """
    output = Path(output)
    if vocab_size < 1:
        raise DataError(f"--vocab-size {vocab_size} is not a number of entries; use 300 or more")
    if any(parent.exists() and not parent.is_dir() for parent in output.parents):
        raise DataError(f"{output} lies below a file; give another --output")
    if output.exists() and not overwrite:
        raise DataError(f"{output} exists already; give --overwrite to replace it or another --output")
    lines = sample_lines(list_sources(inputs), max_bytes, fields)
    if not lines:
        raise DataError(f"the corpus is empty: no text in {', '.join(map(str, inputs))}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    partial.write_bytes(model.getvalue())
    partial.replace(output)
    return Tokenizer(output)
