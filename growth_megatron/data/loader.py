"""Micro-batches of one data-parallel rank.

Owns: which samples of a step go to which rank and micro-batch, stacking, prefetch.
Does not own: what a sample is (``dataset``), counting consumed samples (``train``).

The step that starts at sample c consumes samples c .. c + global_batch_size - 1. They are cut, in order, into
micro-batches of ``micro_batch_size``; micro-batch m of the step goes to rank m % data_parallel_size as its number
m // data_parallel_size. This is Megatron's own order. A micro-batch's content and the set of samples of a step
therefore do not depend on the data-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from growth_megatron.data.dataset import FiniteSource, Sample, SampleSource
from growth_megatron.errors import ConfigError

Batch = dict[str, torch.Tensor]  # as Sample, stacked: [b, s]


def stack(samples: Sequence[Sample], pin: bool = False) -> Batch:
    """Samples of [s] as one batch of [b, s]."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {name: tensor.pin_memory() for name, tensor in batch.items()} if pin else batch


class BatchLoader:
    """The training micro-batches of one data-parallel rank, read ahead by one step in a background thread.

    Raises: ConfigError where the global batch does not divide into micro-batches for all ranks.
    """

    def __init__(
        self,
        stream: SampleSource,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} x "
                f"data-parallel size {data_parallel_size} = {micro_batch_size * data_parallel_size}; change one of them"
            )
        self.num_micro_batches = global_batch_size // (micro_batch_size * data_parallel_size)
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self._stream, self._rank, self._ranks = stream, data_parallel_rank, data_parallel_size
        self._pin = torch.cuda.is_available()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batch-loader")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def sample_indices(self, consumed_samples: int) -> list[list[int]]:
        """Global sample numbers of this rank's micro-batches in the step that starts at ``consumed_samples``."""
        size = self.micro_batch_size
        starts = [consumed_samples + (j * self._ranks + self._rank) * size for j in range(self.num_micro_batches)]
        return [list(range(start, start + size)) for start in starts]

    def _read(self, consumed_samples: int) -> list[Batch]:
        return [
            stack([self._stream[index] for index in indices], self._pin)
            for indices in self.sample_indices(consumed_samples)
        ]

    def micro_batches(self, consumed_samples: int) -> list[Batch]:
        """The micro-batches of the step that starts at ``consumed_samples``; the next step is read meanwhile."""
        if self._ahead and self._ahead[0] == consumed_samples:
            ready = self._ahead[1]
        else:  # the first step, or a jump
            ready = self._thread.submit(self._read, consumed_samples)
        following = consumed_samples + self.global_batch_size
        batches = ready.result()
        self._ahead = following, self._thread.submit(self._read, following)
        return batches

    def close(self) -> None:
        """End the thread; what it has read ahead is dropped."""
        self._ahead = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def validation_batches(
    samples: FiniteSource, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[Batch]:
    """This rank's micro-batches over a whole validation set.

    Every rank gets equally many, as collectives need; where the samples run out, a batch is filled with the last one
    under a loss mask of zeros. So sum(loss * mask) / sum(mask) over all ranks is the same at any size.
    """
    total = len(samples)
    per_round = micro_batch_size * data_parallel_size
    pin = torch.cuda.is_available()
    for start in range(0, total, per_round):
        first = start + data_parallel_rank * micro_batch_size
        batch = []
        for index in range(first, first + micro_batch_size):
            sample = samples[min(index, total - 1)]
            batch.append(sample if index < total else {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])})
        yield stack(batch, pin)
