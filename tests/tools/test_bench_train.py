"""The benchmark runs and its figures are there; what they say of a loaded machine is not tested."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.command_line import run_module
from tests.pool import ROOT, TIMEOUT_S, environment
from tests.ranks import torchrun

SCRIPT = str(ROOT / "tools" / "bench_train.py")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)


def test_a_quick_run_on_two_ranks_measures_all_three_parts(tmp_path: Path) -> None:
    options = ["--quick", "--folder", str(tmp_path), "--output", str(tmp_path / "figures.json")]
    done = _run(torchrun(2, SCRIPT, *options, "parallel.pipeline_parallel_size=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["world_size"] == 2
    assert figures["plan_error"] <= 0.1
    for name in ("train_to_bare", "share_of_matmul", "save_to_step", "growth_to_resume"):
        assert 0 < figures[name] < 1000, name
    assert figures["save_grow_resume_s"].keys() - figures["save_resume_s"].keys() == {"grow"}
    assert [len(turn) for turn in figures["steps_s"]["train"]] == [2]
    assert "plan's weights, gradients, optimizer" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"], "the benchmark leaves its files behind"


def test_a_growth_that_does_not_fit_the_layout_is_refused(tmp_path: Path) -> None:
    done = run_module("tools.bench_train", "--quick", "--factor", "3", PYTHONPATH=str(ROOT / "tools"))
    assert done.code == 2
    assert "give another factor" in done.err
