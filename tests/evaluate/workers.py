"""What the tests of evaluation run on each rank (``tests.ranks``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.evaluate.opened import find_tokenizer, open_model

Answers = dict[str, dict[str, Any]]


def answers_of(found: dict[str, Any]) -> Answers:
    """Of each task the answers by document and request, and the figures."""
    return {
        task: {
            "answers": {str(line["doc_id"]): [list(answers) for answers in line["resps"]] for line in lines},
            "figures": {key: value for key, value in found["results"][task].items() if isinstance(value, float)},
        }
        for task, lines in found["samples"].items()
    }


def evaluate_all(cases: list[dict[str, Any]], tasks: str, names: list[str]) -> list[Answers]:
    """The answers of the live models of ``cases`` (``checkpoint``, ``tensor``, ``pipeline``, ``batch_tokens``)."""
    from growth_megatron.evaluate.harness import DistributedLM, run_harness
    from growth_megatron.evaluate.tasks import load_tasks

    loaded = load_tasks(names, Path(tasks))
    results = []
    for case in cases:
        shots = case.pop("num_fewshot", 0)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=shots)
        origin = find_origin(case.pop("checkpoint"))
        lm = DistributedLM(open_model(origin, **case), find_tokenizer(origin, None))
        results.append(answers_of(run_harness(lm, loaded)))
    return results


def evaluate_with_transformers(folders: list[str], tasks: str, names: list[str]) -> list[Answers]:
    """The answers of lm-eval's own ``hf`` model on exported folders."""
    from lm_eval.models.huggingface import HFLM

    from growth_megatron.evaluate.harness import run_harness
    from growth_megatron.evaluate.tasks import load_tasks

    loaded = load_tasks(names, Path(tasks))
    models = [HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1) for folder in folders]
    return [answers_of(run_harness(model, loaded)) for model in models]


def evaluate_with_padding(case: dict[str, Any], tasks: str, names: list[str]) -> Answers:
    """As ``evaluate_all`` for one case, with what pads the vocabulary left in the distribution."""
    from growth_megatron.evaluate.live_model import LiveModel

    LiveModel._without_padding = lambda self, logits: logits.float().clone()  # type: ignore[method-assign]
    return evaluate_all([case], tasks, names)[0]


def train_with_tasks(runs: list[dict[str, Any]]) -> list[int]:
    """As ``tests.workers.train_all``, with ``evaluation.tasks`` carried out."""
    from growth_megatron.evaluate.during_training import prepare_tasks
    from growth_megatron.growth.configuration import load_config
    from growth_megatron.train.stages import train

    return [train(load_config(run["config"], run["overrides"]), prepare_tasks) for run in runs]


def score_in_batches(folder: str) -> list[list[tuple[float, bool]]]:
    """Scores of six rows, one of them empty and one ended by the greedy token, at several batch sizes."""
    import torch

    origin = find_origin(folder)
    rows = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15, 16, 17], [], [3, 4], [30, 31]]
    (greedy,) = open_model(origin).next_tokens([rows[5]], lambda logits, _: torch.argmax(logits, dim=1))
    endings = [[20, 21], [22], [23, 24, 25], [], [26, 27], [greedy]]
    return [open_model(origin, batch_tokens=tokens).score(rows, endings) for tokens in (1, 9, 20, 4096)]
