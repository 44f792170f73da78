"""A save is what the model was when it began, whatever becomes of it meanwhile; nothing forks, all fail alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

WORKERS = "tests.checkpoint.saver_workers"


def _overwritten(folder: Path, ranks: int, layout: dict[str, Any], apart: bool = True) -> dict[str, Any]:
    arguments = {"directory": str(folder), "layout": layout, "apart": apart}
    first: dict[str, Any] = run_ranks(f"{WORKERS}:overwritten_while_it_is_saved", ranks, arguments)[0]
    assert not first["written"]
    assert len(first["before"]) > 0
    return first


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {}), (2, {"tensor_parallel_size": 2})])
def test_a_save_holds_what_there_was_when_it_began(tmp_path: Path, ranks: int, layout: dict[str, Any]) -> None:
    sums = _overwritten(tmp_path, ranks, layout)
    assert sums["during"] == sums["before"]


def test_without_a_copy_of_what_megatron_does_not_copy_it_would_hold_what_came_later(tmp_path: Path) -> None:
    sums = _overwritten(tmp_path, 1, {}, apart=False)
    assert sums["during"] != sums["before"]


def test_no_save_forks_a_process(tmp_path: Path) -> None:
    assert run_ranks(f"{WORKERS}:forks_of_saves", 1, {"directory": str(tmp_path)}) == [0]


def test_a_save_that_fails_is_told_when_none_of_its_threads_writes_any_more(tmp_path: Path) -> None:
    (found,) = run_ranks(f"{WORKERS}:threads_behind_a_failed_save", 1, {"directory": str(tmp_path)})
    assert found["files"] == 2
    assert "No space left on device" in found["said"]
    assert found["writing"] == []


def test_a_rank_that_cannot_write_is_said_on_all_ranks_and_the_next_save_works(tmp_path: Path) -> None:
    said = run_ranks(f"{WORKERS}:saves_with_a_full_disk_on_rank_one", 2, {"directory": str(tmp_path)})
    assert said[0] == said[1]
    assert "cannot write" in said[0][0]
    assert "File too large; mend that and re-run the same command" in said[0][0]
    assert said[0][1] == "__0_0.distcp __0_1.distcp __1_0.distcp __1_1.distcp"
