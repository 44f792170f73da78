"""Scores of rows in odd forms; the answers themselves are held against transformers in ``test_harness``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks


def test_batches_of_any_size_give_the_same_scores_in_the_order_of_the_rows(small_folder: Path) -> None:
    (found,) = run_ranks("tests.evaluate.workers:score_in_batches", 1, {"folder": str(small_folder)})
    expected = found.pop()
    for scores in found:
        assert [score for score, _ in scores] == pytest.approx([score for score, _ in expected], abs=1e-5)
        assert [hit for _, hit in scores] == [hit for _, hit in expected]
    assert expected[3] == [0.0, True], "nothing is asked of it"
    assert len({score for score, _ in expected}) == len(expected)
    assert {hit for _, hit in expected} == {True, False}
