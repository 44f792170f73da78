"""Text from a live model, token by token.

Owns: how a token is chosen (greedy, temperature, nucleus), when a text is at its end.
Does not own: the forward pass (``evaluate.live_model``), what becomes of the text.

A choice depends on the seed, the stream and the number of the token alone, not on batches, layouts and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from growth_megatron.evaluate.live_model import LiveModel, Row, ignore
from growth_megatron.parallel.counter_rng import normal_rows


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a text are chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_p: of the likeliest tokens those that have so much probability together.
        stream: texts of one seed and other streams are independent.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stream: int = 0


def generate(
    model: LiveModel,
    prompts: Sequence[Row],
    limits: Sequence[int],
    is_over: Callable[[int, list[int]], bool],
    how: Sequence[Sampling],
    done: Callable[[int], None] = ignore,
) -> list[list[int]]:
    """New ids behind each prompt, at most ``limits[i]``, ended by the first at which ``is_over(i, new ids)``."""
    written: list[list[int]] = [[] for _ in prompts]
    open_ = [number for number, limit in enumerate(limits) if limit > 0]
    while open_:
        rows = [[*prompts[number], *written[number]] for number in open_]

        def choose(logits: torch.Tensor, places: Sequence[int], open_: list[int] = open_) -> torch.Tensor:
            numbers = [open_[place] for place in places]
            chosen = [
                choose_token(line, how[number], len(written[number]))
                for line, number in zip(logits, numbers, strict=True)
            ]
            return torch.stack(chosen)

        for number, token in zip(open_, model.next_tokens(rows, choose), strict=True):
            written[number].append(token)
        left = [n for n in open_ if len(written[n]) < limits[n] and not is_over(n, written[n])]
        done(len(open_) - len(left))
        open_ = left
    return written


def choose_token(logits: torch.Tensor, how: Sampling, position: int) -> torch.Tensor:
    """The id, ``[]``, of the new token number ``position`` of a text, out of logits ``[vocabulary]``."""
    if how.temperature == 0.0:
        return logits.argmax()
    shares, ids = (logits.double() / how.temperature).softmax(dim=0).sort(descending=True, stable=True)
    sums = shares.cumsum(dim=0)
    nucleus = int((sums - shares < how.top_p).sum())  # at least one
    (normal,) = normal_rows(how.seed, f"sample {how.stream}", range(position, position + 1), 1)[0].tolist()
    uniform = 0.5 * (1 + math.erf(normal / math.sqrt(2)))
    return ids[int((sums[:nucleus] < uniform * sums[nucleus - 1]).sum())]
