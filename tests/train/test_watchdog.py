"""A run in which nothing moves ends within its bound and says which rank is to blame; a dead one is named first."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from growth_megatron.train.watchdog import Mark, bound_s, diagnosis
from tests.conftest import write_growing_config
from tests.pool import ROOT, TIMEOUT_S, environment

HOST = socket.gethostname()
LONG = ["stages.base.training.steps=100000", "checkpoint.interval_steps=null", "logging.interval_steps=1"]


@pytest.mark.parametrize(
    ("timeout_s", "doing", "longest_step_s", "expected"),
    [
        (None, "training", 0.0, 1800.0),  # the first step compiles
        (None, "training", 2.0, 300.0),
        (None, "training", 60.0, 1200.0),
        (None, "saving", 2.0, 1800.0),
        (None, "saving", 200.0, 4000.0),
        (7.0, "training", 60.0, 7.0),
        (7.0, "saving", 0.0, 7.0),
    ],
)
def test_the_bound_follows_the_runs_own_steps(
    timeout_s: float | None, doing: str, longest_step_s: float, expected: float
) -> None:
    assert bound_s(timeout_s, doing, longest_step_s) == expected


def _marks(**changes: dict[int, Any]) -> list[Mark]:
    marks = [Mark(rank, f"node{rank // 2}", 100 + rank, 12, "training", 60.0, 7) for rank in range(4)]
    for name, values in changes.items():
        for rank, value in values.items():
            marks[rank] = dataclasses.replace(marks[rank], **{name: value})
    return marks


def test_a_rank_without_a_new_mark_is_the_one_that_does_not_answer() -> None:
    later = _marks(beat={0: 9, 1: 9, 3: 9})
    said = diagnosis(_marks(), later)
    assert said == ("no answer from rank 2 (process 102 on node1; last seen training, step 12, not moving for 60 s)")
    assert "rank 3" in diagnosis(_marks(), [*_marks(beat={0: 9, 1: 9, 2: 9})[:3], None])


def test_a_rank_behind_the_others_is_named() -> None:
    earlier, beats = _marks(doing={1: "waiting for data"}), dict.fromkeys(range(4), 9)
    said = diagnosis(earlier, _marks(doing={1: "waiting for data"}, beat=beats))
    assert said.startswith("others are at training, step 12; behind: rank 1 (process 101 on node0; last seen waiting")
    assert "rank 2" not in said
    said = diagnosis(_marks(), _marks(step={3: 11}, beat=beats))
    assert "behind: rank 3" in said


def test_where_all_wait_at_the_same_place_nobody_is_blamed() -> None:
    said = diagnosis(_marks(), _marks(beat=dict.fromkeys(range(4), 9)))
    assert said.startswith("all ranks are at the same place: training, step 12")


class Job:
    """``launch/torchrun.sh`` with two ranks of a run that would last for hours."""

    def __init__(self, config: Path, run: Path, *overrides: str) -> None:
        self.run = run
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "-n", "2", str(config), f"run.directory={run}"]
        self.process = subprocess.Popen(
            [*command, *LONG, *overrides], cwd=ROOT, text=True, start_new_session=True,
            env={**environment(), "GROWTH_MEGATRON_VENV": sys.prefix},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        metrics = run / "metrics.jsonl"
        deadline = time.monotonic() + TIMEOUT_S
        while not metrics.exists() or metrics.read_text().count('"kind": "train"') < 3:
            assert time.monotonic() < deadline, "the run never began"
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.1)
        workers = [child for child in psutil.Process(self.process.pid).children() if os.getpgid(child.pid) == child.pid]
        self.ranks = sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))
        assert len(self.ranks) == 2

    def end(self) -> tuple[int, str]:
        """Exit code and output; both ranks are gone then."""
        try:
            output, _ = self.process.communicate(timeout=TIMEOUT_S)
            _, alive = psutil.wait_procs(self.ranks, timeout=TIMEOUT_S)
            assert not alive
        finally:
            for process in (self.process, *self.ranks):
                if process.pid and psutil.pid_exists(process.pid):
                    process.kill()
        return self.process.returncode, output


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_growing_config(tmp_path_factory.mktemp("growing"), prepared_corpus)


def test_a_stopped_rank_ends_the_run_within_its_bound_and_is_named(config: Path, tmp_path: Path) -> None:
    job = Job(config, tmp_path / "run", "run.timeout_s=5")
    stopped = job.ranks[1].pid
    os.kill(stopped, signal.SIGSTOP)
    code, output = job.end()
    assert code == 1
    who = rf"no answer from rank 1 \(process {stopped} on {HOST}; last seen [a-z ]+, step \d+, not moving for \d+ s\)"
    assert re.search(r"nothing has moved for \d+ s \(bound: 5 s, run.timeout_s or .*" + who, output), output
    waiting = r'loop\.py", line \d+ in _step'  # rank 0's stacks: in the step, or in the sum of what it reports
    assert re.search(waiting, output), output
    assert re.search(waiting, (job.run / "logs" / "rank_0.log").read_text())
    assert "Traceback (most recent call last)" not in output


def test_a_job_that_was_suspended_as_a_whole_goes_on(config: Path, tmp_path: Path) -> None:
    """As schedulers do it; the time does not count, however long it was."""
    job = Job(config, tmp_path / "run", "run.timeout_s=2")
    for rank in job.ranks:
        rank.suspend()
    time.sleep(8)
    before = (job.run / "metrics.jsonl").read_text().count('"kind": "train"')
    for rank in job.ranks:
        rank.resume()
    deadline = time.monotonic() + TIMEOUT_S
    while (job.run / "metrics.jsonl").read_text().count('"kind": "train"') < before + 100:
        assert job.process.poll() is None, job.process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.process.send_signal(signal.SIGTERM)
    code, output = job.end()
    assert code == 75, output


def test_a_killed_rank_is_named_in_one_line_without_tracebacks(config: Path, tmp_path: Path) -> None:
    job = Job(config, tmp_path / "run")
    job.ranks[1].kill()
    code, output = job.end()
    assert code == 1
    assert "Traceback" not in output
    told = [line for line in output.splitlines() if not line.startswith("now ")]  # but what it was about to do
    said = [line for line in told if "rank" in line and "step" not in line]
    assert said == ["launch: rank 1 was killed by SIGKILL (often: the host ran out of memory)"]
    assert "Traceback" in (job.run / "logs" / "rank_0.log").read_text()


def test_ranks_save_and_end_when_their_launcher_is_killed(config: Path, tmp_path: Path) -> None:
    job = Job(config, tmp_path / "run")
    job.process.kill()
    job.end()
    assert (job.run / "latest" / "manifest.json").is_file()
    assert "stopped early on request" in (job.run / "metrics.jsonl").read_text()
