"""``PREFIX.json`` beside a prepared dataset: what the dataset was made of, and with which tokenizer; without torch.

Owns: its fields, reading and writing it, whether tokenizer, datasets and model have one vocabulary.
Does not own: the dataset itself (``prepared``), making it (``prepare``).

Datasets that Megatron's own tools wrote have no ``PREFIX.json`` and are accepted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from growth_megatron.config.schema import DataConfig
from growth_megatron.data.json_tokenizer import open_tokenizer
from growth_megatron.data.mixture import suffixed
from growth_megatron.errors import DataError

FORMAT = 1


@dataclass(frozen=True)
class Description:
    """What ``PREFIX.json`` says. It holds no time and no absolute path, so equal input gives an equal file."""

    documents: int
    tokens: int  # EOS included
    vocab_size: int
    tokenizer: str  # file name
    tokenizer_sha256: str
    dtype: str
    text_bytes: int
    empty_documents: int  # left out
    sources: list[tuple[str, int]]  # path below the input, bytes on disk
    bin_sha256: str | None = None  # of PREFIX.bin; None: prepared by an earlier version
    largest_token: int | None = None
    where: list[str] = field(default_factory=list)  # conditions on the records that were read
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the description as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read_description(prefix: str | Path) -> Description | None:
    """The description beside ``prefix``, or None where there is none.  Raises: DataError where it is damaged."""
    path = suffixed(prefix, ".json")
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(
                f"{path} has format {values['format']}, this version reads {FORMAT}; prepare the data again"
            )
        return Description(**values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); prepare the data again with --overwrite") from error


def check_vocabulary(data: DataConfig, vocab_size: int) -> None:
    """Check tokenizer and datasets of ``data`` against each other and the model's ``vocab_size``.

    Raises: DataError naming the first thing that does not fit, and the remedy.
    """
    tokenizer = open_tokenizer(data.tokenizer) if data.tokenizer else None
    sha256 = tokenizer.sha256 if tokenizer is not None else ""
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} pieces, the model's vocab_size is {vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size} or use a smaller tokenizer"
        )
    for entry in (*data.train, *data.validation):
        description = read_description(entry.path)
        if description is None:
            continue
        if description.vocab_size > vocab_size:
            raise DataError(
                f"dataset {entry.path} was prepared with a vocabulary of {description.vocab_size}, the model's "
                f"vocab_size is {vocab_size}; set model.vocab_size to {description.vocab_size} or prepare the data "
                "with a smaller tokenizer"
            )
        if tokenizer is not None and description.tokenizer_sha256 != sha256:
            raise DataError(
                f"dataset {entry.path} was prepared with another tokenizer ({description.tokenizer}, sha256 "
                f"{description.tokenizer_sha256[:12]}) than data.tokenizer ({tokenizer.path}, {sha256[:12]}); "
                "correct data.tokenizer or prepare the data again with it"
            )
