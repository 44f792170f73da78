"""A run's records after those of the runs it branched off, however these are tied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growth_megatron.report.joined import joined_records


def _run(folder: Path, steps: range, parent: Path | None = None) -> None:
    folder.mkdir()
    lines = [{"kind": "train", "step": step, "stage": "main", "loss": 1.0} for step in steps]
    if parent is not None:
        source = str(parent / "checkpoints" / f"step_{steps[0] - 1:08d}")
        lines.insert(0, {"kind": "event", "event": "branch", "step": steps[0] - 1, "source": source})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _steps(folder: Path) -> list[tuple[int, str]]:
    return [(r["step"], r["stage"]) for r in joined_records(folder) if r["kind"] == "train"]


def test_parents_come_first_up_to_where_they_were_left(tmp_path: Path) -> None:
    _run(tmp_path / "a", range(1, 9))
    _run(tmp_path / "b", range(4, 7), tmp_path / "a")
    _run(tmp_path / "c", range(6, 8), tmp_path / "b")
    names = ["b/a/main"] * 3 + ["b/main"] * 2 + ["main"] * 2
    assert _steps(tmp_path / "c") == list(zip(range(1, 8), names, strict=True))


@pytest.mark.parametrize("parents", [("a", "b"), ("b", "a")])
def test_runs_that_name_each_other_as_parents_come_to_an_end(tmp_path: Path, parents: tuple[str, str]) -> None:
    """As after a folder was used again."""
    for name, parent in zip(("a", "b"), parents, strict=True):
        _run(tmp_path / name, range(3, 5), tmp_path / parent)
        assert [step for step, _ in _steps(tmp_path / name)][-2:] == [3, 4]
    assert [step for step, _ in _steps(tmp_path / "a")][-2:] == [3, 4]
