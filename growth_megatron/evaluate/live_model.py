"""A model on its pipeline, tensor- and data-parallel ranks, asked for what stands after rows of token ids.

Owns: batches by length, the forward pass through all stages, scores and next tokens out of vocabulary-parallel logits.
Does not own: where the weights come from (``evaluate.opened``, ``train.engine``), what is asked (``evaluate.harness``).

Rows are padded on the right, which a causal model cannot see. Logits stay on the last stage, split over the
vocabulary; what leaves it is a number or two a row. There is no cache of keys and values: each new token costs a whole
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from growth_megatron.config.schema import ModelConfig, ParallelConfig

Row = Sequence[int]
Read = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""From the last stage's logits ``[b, s, vocabulary / TP]`` and their rows' numbers (at most b) to ``[rows, k]``."""


def ignore(rows: int) -> None:
    """Takes the number of rows that are done, as ``done`` below does."""


class LiveModel:
    """Model chunks in evaluation mode at the current process groups; all ranks of a replica call a method alike.

    Args:
        batch_tokens: of one micro-batch, padding included.
    """

    def __init__(
        self, models: Sequence[GPTModel], geometry: ModelConfig, parallel: ParallelConfig, batch_tokens: int
    ) -> None:
        self._models, self._geometry, self._batch_tokens = list(models), geometry, batch_tokens
        self.max_length = geometry.max_position_embeddings
        self._divisor = parallel.tensor_parallel_size if parallel.sequence_parallel else 1
        stages = parallel.pipeline_parallel_size
        self._unit = stages if parallel.model_chunks > 1 else 1  # of micro-batches that a schedule takes
        self._micro_batches = 4 * stages if stages > 1 else 1  # enough that few stages wait

    def score(
        self, rows: Sequence[Row], continuations: Sequence[Row], done: Callable[[int], None] = ignore
    ) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation and whether it is what greedy decoding gives.

        ``rows`` are what is fed; row i stands for the last ``len(continuations[i])`` predictions behind it.
        """

        def read(logits: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
            places = [
                (place, len(rows[number]) - len(continuations[number]) + offset, token)
                for place, number in enumerate(numbers)
                for offset, token in enumerate(continuations[number])
            ]
            row, position, target = torch.tensor(places, dtype=torch.int64, device=logits.device).view(-1, 3).unbind(1)
            chosen = self._without_padding(logits[row, position])  # [n, v / TP]
            hits = _argmax(chosen) == target
            losses = vocab_parallel_cross_entropy(chosen, target)  # overwrites chosen
            sums = torch.zeros(len(numbers), 2, dtype=torch.float64, device=logits.device)
            return sums.index_add_(0, row, torch.stack([-losses.double(), hits.double()], dim=1))  # [rows, 2]

        found = self._over(rows, 2, read, done).tolist()
        return [(total, hits == len(cont)) for (total, hits), cont in zip(found, continuations, strict=True)]

    def next_tokens(
        self, rows: Sequence[Row], choose: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
    ) -> list[int]:
        """A token for behind each row: what ``choose`` makes, ``[n]``, of the logits ``[n, vocabulary]`` of n rows."""

        def read(logits: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
            ends = torch.tensor([len(rows[number]) - 1 for number in numbers], device=logits.device)
            last = logits[torch.arange(len(numbers), device=logits.device), ends].float()  # [rows, v / TP]
            group = parallel_state.get_tensor_model_parallel_group()
            parts = [torch.empty_like(last) for _ in range(group.size())]
            dist.all_gather(parts, last, group=group)
            return choose(torch.cat(parts, dim=1)[:, : self._geometry.vocab_size], numbers)[:, None]

        return [int(token) for (token,) in self._over(rows, 1, read, ignore).tolist()]

    def _over(self, rows: Sequence[Row], width: int, read: Read, done: Callable[[int], None]) -> torch.Tensor:
        """``read``'s float64 ``[rows, width]`` in the order of ``rows``; the longest go first, like beside like."""
        result = torch.empty(len(rows), width, dtype=torch.float64)
        order = sorted(range(len(rows)), key=lambda number: (-len(rows[number]), number))
        while order:
            fit = self._micro_batches * max(1, self._batch_tokens // max(1, len(rows[order[0]])))
            batch, order = order[:fit], order[fit:]
            result[batch] = self._forward([rows[number] for number in batch], batch, width, read).cpu()
            done(len(batch))
        return result

    @torch.no_grad()
    def _forward(self, rows: Sequence[Row], numbers: Sequence[int], width: int, read: Read) -> torch.Tensor:
        """One pass of the schedule over ``rows``, the longest first; its results on every pipeline stage."""
        size = -(-len(rows) // min(len(rows), self._micro_batches))
        count = -(-len(rows) // (size * self._unit)) * self._unit
        # a row of which nothing is asked may be empty
        length = -(-max(1, len(rows[0])) // self._divisor) * self._divisor
        tokens = torch.zeros(count * size, length, dtype=torch.int64)
        for line, row in zip(tokens, rows, strict=False):
            line[: len(row)] = torch.tensor(row)
        device = torch.cuda.current_device()
        tokens = tokens.to(device)
        positions = torch.arange(length, device=device).expand(size, length)

        def step(parts: Iterator[slice], model: Any) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
            part = next(parts)
            output = model(tokens[part], positions, None)
            return output, lambda logits, non_loss_data: read(logits, numbers[part])

        parts = [slice(start, start + size) for start in range(0, count * size, size)]
        iterators = [iter(parts) for _ in self._models]
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._models if len(self._models) > 1 else self._models[0],
            num_microbatches=count,
            seq_length=length,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if found:  # on the last stage
            result = torch.cat(found).double()
        else:
            result = torch.zeros(len(rows), width, dtype=torch.float64, device=device)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(result, last, group=parallel_state.get_pipeline_model_parallel_group())
        return result

    def _without_padding(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, vocabulary / TP]`` in float32; what pads the vocabulary has no probability, as in an export."""
        logits = logits.float()
        start = parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
        logits[:, max(self._geometry.vocab_size - start, 0) :] = -torch.inf
        return logits


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """Lowest id of the largest of vocabulary-parallel ``[n, vocabulary / TP]``, ``[n]``."""
    group = parallel_state.get_tensor_model_parallel_group()
    largest, index = logits.max(dim=1)
    best = largest.clone()
    dist.all_reduce(best, op=dist.ReduceOp.MAX, group=group)
    index += parallel_state.get_tensor_model_parallel_rank() * logits.shape[1]
    index[largest < best] = torch.iinfo(index.dtype).max
    dist.all_reduce(index, op=dist.ReduceOp.MIN, group=group)
    return index
