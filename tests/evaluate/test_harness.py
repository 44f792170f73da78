"""The live model's answers are those of lm-eval's own ``hf`` model on its export, document by document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from growth_megatron.__main__ import main
from tests.conftest import write_growing_config
from tests.evaluate.small_tasks import NAMES, write_tasks
from tests.ranks import run_ranks

pytest.importorskip("lm_eval")

TOLERANCE = 1e-4  # nats, of a document's log-likelihood
FEWSHOT = {"num_fewshot": 2, "batch_tokens": 64}
TWO: list[dict[str, Any]] = [{"tensor": 2}, {"pipeline": 2, "batch_tokens": 64}, {"batch_tokens": 64}, FEWSHOT]


@pytest.fixture(scope="module")
def folder(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``run`` whose vocabulary is padded, its export ``hf`` and ``tasks``."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = write_growing_config(folder, prepared_corpus)
    overrides = ["stages.base.training.steps=2", "stages.grown.training.steps=2", "model.init_std=0.1"]
    assert run_ranks("tests.workers:train_all", 1, {"runs": [{"config": str(config), "overrides": overrides}]}) == [[0]]
    assert main(["export-hf", str(folder / "run"), str(folder / "hf")]) == 0
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    pytest.importorskip("accelerate")  # lm-eval's hf model imports it
    arguments = {"folders": [str(folder / "hf")], "tasks": str(folder / "tasks"), "names": NAMES}
    return run_ranks("tests.evaluate.workers:evaluate_with_transformers", 1, arguments)[0][0]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Any]:
    """Of one rank: the checkpoint, the same with examples, its export as a Hugging Face folder."""
    return evaluate(folder, 1, [{}, FEWSHOT], f"hf:{folder / 'hf'}")[0]


def evaluate(folder: Path, ranks: int, cases: list[dict[str, Any]], *others: str) -> list[list[Any]]:
    all_cases = [{"checkpoint": str(folder / "run"), **case} for case in cases]
    all_cases += [{"checkpoint": other} for other in others]
    arguments = {"cases": all_cases, "tasks": str(folder / "tasks"), "names": NAMES}
    return run_ranks("tests.evaluate.workers:evaluate_all", ranks, arguments)


def assert_same(ours: Any, theirs: Any) -> None:
    """The same documents, log-likelihoods within ``TOLERANCE``, greedy decisions, texts and accuracies."""
    assert ours.keys() == theirs.keys() == set(NAMES)
    for name in NAMES:
        mine, other = ours[name], theirs[name]
        assert mine["answers"].keys() == other["answers"].keys()
        for document, answers in mine["answers"].items():
            assert flat(answers) == pytest.approx(flat(other["answers"][document]), abs=TOLERANCE), (name, document)
        for metric, value in mine["figures"].items():
            assert value == pytest.approx(other["figures"][metric], rel=TOLERANCE), (name, metric)
            if metric.startswith(("acc", "exact")):
                assert value == other["figures"][metric]


def flat(answers: Any) -> Any:
    """Numbers, flags and texts of an answer, one after the other; texts as themselves."""
    if isinstance(answers, list):
        return [item for answer in answers for item in (flat(answer) if isinstance(answer, list) else [answer])]
    return answers


def test_one_rank_answers_as_transformers_does_on_the_export(alone: list[Any], theirs: Any) -> None:
    assert_same(alone[0], theirs)
    assert_same(alone[2], theirs)
    assert len(set(map(str, theirs["small_text"]["answers"].values()))) > 1, "all texts are one: nothing was compared"


def test_two_ranks_answer_as_one(folder: Path, alone: list[Any], theirs: Any) -> None:
    for of_rank in evaluate(folder, 2, TWO):
        for answers in of_rank[:3]:
            assert_same(answers, theirs)
        assert_same(of_rank[3], alone[1])  # examples are drawn alike, whichever replica asks


def test_four_ranks_answer_as_transformers_does(folder: Path, theirs: Any) -> None:
    cases = [{"tensor": 2, "pipeline": 2, "batch_tokens": 64}, {"tensor": 2, "batch_tokens": 64}]
    for of_rank in evaluate(folder, 4, cases):
        for answers in of_rank:
            assert_same(answers, theirs)


def test_negative_control_padding_of_the_vocabulary_would_be_noticed(folder: Path, theirs: Any) -> None:
    case = {"checkpoint": str(folder / "run")}
    arguments = {"case": case, "tasks": str(folder / "tasks"), "names": NAMES}
    (answers,) = run_ranks("tests.evaluate.workers:evaluate_with_padding", 1, arguments)
    with pytest.raises(AssertionError):
        assert_same(answers, theirs)
