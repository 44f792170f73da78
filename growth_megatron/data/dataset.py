"""Samples of fixed length from prepared datasets: the endless training stream and the fixed validation set.

Owns: the sample index of each dataset (built once per file system), epochs, the blend.
Does not own: the order's arithmetic (``order``), batches (``loader``), the files (``prepared``).

One epoch of a dataset is a Megatron ``GPTDataset``: documents shuffled, joined, cut into samples of
``sequence_length`` + 1 tokens. Every further epoch visits the same samples in another order. Attention runs over
document borders, no position is reset and EOS counts in the loss, as LLaMA was trained.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers import build_sample_idx
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from growth_megatron.config.schema import DataConfig, DatasetConfig
from growth_megatron.data.fingerprint import idx_digest
from growth_megatron.data.index_cache import cached_arrays
from growth_megatron.data.mixture import weights
from growth_megatron.data.order import Blend, key_of, permute, split_documents
from growth_megatron.data.prepared import open_indexed
from growth_megatron.errors import DataError

logger = logging.getLogger(__name__)

# The validation set does not follow the run's seed: runs that differ in it alone are then compared on the same text.
VALIDATION_SEED = 0

Sample = dict[str, torch.Tensor]  # tokens, labels, position_ids: int64 [s]; loss_mask: float32 [s]


class SampleSource(Protocol):
    """Anything with samples by number."""

    def __getitem__(self, index: int) -> Sample: ...


class FiniteSource(SampleSource, Protocol):
    """Samples by number, as many as its length says."""

    def __len__(self) -> int: ...


class _SpecialTokens:
    """What GPTDataset asks of a tokenizer. Without a pad token it masks nothing out, and nothing here is padded."""

    vocab_size: int | None = None
    eod: int | None = None  # -1 would be taken for its default pad token
    unique_identifiers: ClassVar[dict[str, str]] = {}


class Epoch(GPTDataset):
    """One epoch of the documents ``documents`` of an indexed dataset, in Megatron's cutting.

    Differs from its base in where the index comes from: ``cached_arrays`` builds it once per file system, on whichever
    process comes first, where the base builds on global rank 0 only, and so fails on a second host with its own disk.
    The order of the samples is left to ``order.permute``.
    """

    def __init__(
        self, indexed: IndexedDataset, documents: numpy.ndarray, sequence_length: int, seed: int, cache: Path, key: str
    ) -> None:
        self._seed, self._cache, self._key = seed, cache, key
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend=([indexed.path_prefix], None),
            split="1",
            tokenizer=_SpecialTokens(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        super().__init__(indexed, None, documents, None, Split.train, config)

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self._get_num_tokens_per_epoch())

    def _build_document_sample_shuffle_indices(self) -> tuple[numpy.ndarray, numpy.ndarray, range]:
        arrays = cached_arrays(self._cache, self._key, self._build)
        samples = arrays["sample_index"]  # [samples + 1, 2]: position in document_index, offset in the document
        return arrays["document_index"], samples, range(len(samples) - 1)

    def _build(self) -> dict[str, numpy.ndarray]:
        documents = self.indices.astype(numpy.int32)
        # RandomState's stream is frozen by numpy's compatibility policy.
        numpy.random.RandomState(key_of(self._seed) & 0xFFFFFFFF).shuffle(documents)
        lengths = numpy.array(self.dataset.sequence_lengths)
        samples = build_sample_idx(lengths, documents, self.config.sequence_length, 1, self.num_tokens)
        return {"document_index": documents, "sample_index": samples}


def _open_epoch(
    entry: DatasetConfig,
    part: Literal["all", "train", "validation"],
    validation_fraction: float,
    sequence_length: int,
    seed: int,
    cache_directory: str | Path,
) -> Epoch:
    """The epoch over ``part`` of a dataset's documents."""
    indexed = open_indexed(entry.path)
    if part == "all":
        documents = numpy.arange(len(indexed), dtype=numpy.int32)
    else:
        train, held_out = split_documents(len(indexed), validation_fraction)
        documents = train if part == "train" else held_out
    tokens = int(indexed.sequence_lengths[documents].sum())
    if tokens < sequence_length + 1:
        which = "" if part == "all" else f" ({part} part)"
        raise DataError(
            f"dataset {entry.path}{which} has {tokens} tokens, fewer than the {sequence_length + 1} of one sample; "
            "prepare more text or lower model.sequence_length"
        )
    choice = part if part == "all" else f"{part} of {validation_fraction!r}"
    parts = (idx_digest(entry.path), str(tokens), choice, str(sequence_length), str(seed))
    key = hashlib.sha256("|".join(parts).encode()).hexdigest()[:24]
    return Epoch(indexed, documents, sequence_length, seed, Path(cache_directory), key)


@dataclass(frozen=True)
class Location:
    """Where a sample of a stream comes from."""

    dataset: int
    epoch: int
    sample: int  # within the dataset's epoch


class Stream:
    """An endless stream of samples; ``stream[i]`` depends on the seed and ``i`` alone, not on what was read before."""

    def __init__(self, datasets: Sequence[FiniteSource], weights: Sequence[float], seed: int) -> None:
        self.datasets, self.seed = tuple(datasets), seed
        self._blend = Blend(weights) if len(self.datasets) > 1 else None

    def locate(self, index: int) -> Location:
        """Where sample ``index`` of the stream comes from. Raises IndexError below 0."""
        if index < 0:
            raise IndexError(f"sample {index} does not exist: samples are counted from 0")
        dataset, draw = self._blend.locate(index) if self._blend else (0, index)
        size = len(self.datasets[dataset])
        epoch, within = divmod(draw, size)
        return Location(dataset, epoch, permute(within, size, key_of(self.seed, dataset, epoch)))

    def __getitem__(self, index: int) -> Sample:
        place = self.locate(index)
        return self.datasets[place.dataset][place.sample]

    @property
    def samples_per_epoch(self) -> tuple[int, ...]:
        """Samples of one epoch of each dataset."""
        return tuple(len(dataset) for dataset in self.datasets)


class ValidationSet:
    """A fixed number of samples, none of them twice: the start of a stream's first epoch.

    ``weights`` are followed until a dataset is used up; the others then go on among themselves.
    """

    def __init__(self, datasets: Sequence[FiniteSource], weights: Sequence[float], seed: int, samples: int) -> None:
        self.requested = samples
        self._datasets = tuple(datasets)
        sizes = [len(dataset) for dataset in self._datasets]
        self._places: list[tuple[int, int]] = []  # (dataset, sample)
        used = [0] * len(sizes)
        while len(self._places) < min(samples, sum(sizes)):
            remaining = [number for number, size in enumerate(sizes) if used[number] < size]
            blend = Blend([weights[number] for number in remaining])
            for index in range(min(samples, sum(sizes)) - len(self._places)):
                number = remaining[blend.locate(index)[0]]
                sample = permute(used[number], sizes[number], key_of(seed, number, 0))
                self._places.append((number, sample))
                used[number] += 1
                if used[number] == sizes[number]:
                    break

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Sample:
        number, sample = self._places[index]
        return self._datasets[number][sample]


class InVocabulary:
    """Samples of ``source``, each looked at: an embedding split over ranks takes an unknown id for no token at all."""

    def __init__(self, source: SampleSource, vocab_size: int) -> None:
        self._source, self._vocab_size = source, vocab_size

    def __getitem__(self, index: int) -> Sample:
        sample = self._source[index]
        for name in ("tokens", "labels"):
            low, high = (int(bound) for bound in sample[name].aminmax())
            if low < 0 or high >= self._vocab_size:
                raise DataError(
                    f"sample {index} of the data holds token {low if low < 0 else high}, the model's vocab_size is "
                    f"{self._vocab_size}: a file changed after it was checked. Remove the cache (data.cache_directory, "
                    "else data_cache in run.directory) and re-run the same command: it checks every byte and names the "
                    "file"
                )
        return sample

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]  # where the source has a length


def build_train_dataset(data: DataConfig, sequence_length: int, seed: int, cache_directory: str | Path) -> Stream:
    """The training stream of ``data``. Call on every rank that reads; needs no process group.

    Raises: DataError where a file is missing or damaged, or holds less than one sample.
    """
    part: Literal["all", "train"] = "train" if data.validation_fraction else "all"
    epochs = [
        _open_epoch(entry, part, data.validation_fraction, sequence_length, seed, cache_directory)
        for entry in data.train
    ]
    return Stream(epochs, weights(data.train), seed)


def build_validation_dataset(
    data: DataConfig, sequence_length: int, samples: int, cache_directory: str | Path
) -> ValidationSet | None:
    """The validation set of ``data``: ``samples`` samples or, with a warning, as many as there are; None without one.

    Raises: as ``build_train_dataset``.
    """
    if not data.validation and not data.validation_fraction:
        return None
    part: Literal["all", "validation"] = "all" if data.validation else "validation"
    entries = data.validation or data.train
    epochs = [
        _open_epoch(entry, part, data.validation_fraction, sequence_length, VALIDATION_SEED, cache_directory)
        for entry in entries
    ]
    found = ValidationSet(epochs, weights(entries), VALIDATION_SEED, samples)
    if len(found) < samples and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        logger.warning("evaluation.samples is %d, the validation data hold %d: using these", samples, len(found))
    return found
