"""lm-eval's harness over a live model: its three kinds of requests, answered at any layout.

Owns: the ``TemplateLM``, the share of each data-parallel replica, what a run of the harness returns.
Does not own: which tasks there are (``evaluate.tasks``), the forward pass (``evaluate.live_model``).

The harness is told of one rank: every rank builds all requests, replicas answer a share each and give the answers to
all. So few-shot examples, documents and results are those of one process, which lm-eval's own split does not promise.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any, TypeVar

import tqdm
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state
from typing_extensions import override

from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import ConfigError
from growth_megatron.evaluate.generation import Sampling, generate
from growth_megatron.evaluate.live_model import LiveModel
from growth_megatron.parallel import collectives

A = TypeVar("A")
B = TypeVar("B")

_FEWSHOT_SEED = 1234  # lm-eval's own
_LINE_INTERVAL_S = 30.0  # of the bar where it is no terminal's
_GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


class DistributedLM(TemplateLM):
    """A live model and its tokenizer as lm-eval asks for them.

    Args:
        bar: whether rank 0 shows a bar for each kind of requests.
        alive: called after every batch, on all ranks.
    """

    def __init__(
        self, model: LiveModel, tokenizer: Tokenizer, *, bar: bool = True, alive: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._model, self._text, self._bar, self._alive = model, tokenizer, bar, alive

    @property
    @override
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    @override
    def prefix_token_id(self) -> int:
        return self._text.bos_id if self._text.bos_id >= 0 else self._text.eos_id

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of ``string``, behind BOS where the tokenizer's own files put it."""
        ids = self._text.encode(string)
        first = self._text.begins_with_bos and add_special_tokens is not False and ids[:1] != [self._text.bos_id]
        return [self._text.bos_id, *ids] if first else ids

    @override
    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    @override
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], label: str = "loglikelihood", **_: Any
    ) -> list[tuple[float, bool]]:
        """What does not fit into the model's length is cut off on the left."""
        longest = self._model.max_length
        pairs = [((context + ending)[-longest - 1 :], ending[-longest:]) for _, context, ending in requests]

        def score(own: list[tuple[list[int], list[int]]], done: Callable[[int], None]) -> list[tuple[float, bool]]:
            return self._model.score([ids[:-1] for ids, _ in own], [continuation for _, continuation in own], done)

        return self._shared(pairs, lambda pair: len(pair[0]), score, label)

    @override
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._model.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in found]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, label="rolling"), strict=True):
            totals[owner] += value
        return totals

    @override
    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        wanted = [_Wanted(number, self, request.args[0], request.args[1]) for number, request in enumerate(requests)]

        def write(own: list[_Wanted], done: Callable[[int], None]) -> list[str]:
            def is_over(number: int, ids: list[int]) -> bool:
                return ids[-1] == self.eot_token_id or own[number].ends(self._text.decode(ids))

            found = generate(
                self._model,
                [item.prompt for item in own],
                [item.limit for item in own],
                is_over,
                [item.how for item in own],
                done,
            )
            return [
                item.until_end(self._text.decode([token for token in ids if token != self.eot_token_id]))
                for item, ids in zip(own, found, strict=True)
            ]

        return self._shared(wanted, lambda item: len(item.prompt), write, "generate")

    def _shared(
        self,
        items: Sequence[A],
        length: Callable[[A], int],
        answer: Callable[[list[A], Callable[[int], None]], list[B]],
        label: str,
    ) -> list[B]:
        """The answers to all ``items``, of which every replica works out an equal share of long and short ones."""
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        order = sorted(range(len(items)), key=lambda number: (-length(items[number]), number))
        own = order[replica::replicas]
        interval = 0.1 if sys.stderr.isatty() else _LINE_INTERVAL_S
        show = self._bar and collectives.rank() == 0
        with tqdm.tqdm(total=len(own), desc=label, unit="request", mininterval=interval, disable=not show) as bar:

            def done(count: int) -> None:
                bar.update(count)
                self._alive()

            found = dict(zip(own, answer([items[number] for number in own], done), strict=True))
        for others in collectives.all_gather(found if replicas > 1 and _is_first_of_replica() else {}):
            found |= others
        return [found[number] for number in range(len(items))]


class _Wanted:
    """One text to be generated, as a task's ``generation_kwargs`` say."""

    def __init__(self, number: int, lm: DistributedLM, context: str, options: dict[str, Any]) -> None:
        from lm_eval.models.utils import normalize_gen_kwargs  # loads transformers, which only some tasks need

        known = normalize_gen_kwargs(options)
        if unknown := sorted(known.keys() - _GENERATION_OPTIONS):
            raise ConfigError(
                f"a task generates with {unknown[0]}={known[unknown[0]]}, which is not supported (allowed: "
                f"{', '.join(sorted(_GENERATION_OPTIONS))}); leave it out of its generation_kwargs, or evaluate an "
                "export with lm-eval itself"
            )
        until = known.get("until") or []
        self._until = [text for text in ([until] if isinstance(until, str) else until) if text]
        longest = lm._model.max_length
        self.limit = min(known["max_gen_toks"], longest - 1)
        self.prompt = (lm.tok_encode(context) or [lm.prefix_token_id])[-(longest - self.limit) :]
        self.how = Sampling(known.get("temperature") or 0.0, known.get("top_p", 1.0), stream=number)

    def ends(self, text: str) -> bool:
        return any(stop in text for stop in self._until)

    def until_end(self, text: str) -> str:
        for stop in self._until:
            text = text.split(stop)[0]
        return text


def run_harness(lm: DistributedLM, loaded: Any, *, limit: float | None = None, errors: bool = True) -> dict[str, Any]:
    """What lm-eval makes of the tasks ``loaded``, with every document (``samples``); the same figures on every rank.

    Args:
        limit: documents of each task, or a share of them below 1.
        errors: whether rank 0 estimates standard errors too, some by resampling, which takes seconds.
    """
    from lm_eval.evaluator import evaluate  # loads datasets, and starts threads

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # what draws the examples goes on from one run to the next
    # What resamples prints that it does; a console that is live meanwhile is left its standard output.
    with _quiet_harness(), redirect_stdout(io.StringIO()) if errors else nullcontext():
        draws = 1000 if errors and collectives.rank() == 0 else 0
        try:
            found: dict[str, Any] = evaluate(lm, loaded, limit=limit, bootstrap_iters=draws)
        except ValueError as error:
            if "larger than population" not in str(error):
                raise
            raise ConfigError(
                "there are more examples asked for than a task has documents to take them from; give a smaller "
                "--num-fewshot"
            ) from error
    return found


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Without the harness's own bars, one a task and rank; and its resampling starts no processes."""
    from lm_eval.api import task

    bar = task.tqdm
    task.tqdm = functools.partial(bar, disable=True)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        yield
    finally:
        task.tqdm = bar


def _is_first_of_replica() -> bool:
    ranks = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank())
    return ranks == (0, 0)
