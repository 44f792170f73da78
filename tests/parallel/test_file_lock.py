"""The lock between processes: it excludes, whoever had it before; a kill frees it; without locks work goes on."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from growth_megatron.errors import CheckpointError
from growth_megatron.parallel.file_lock import locked
from tests.pool import ROOT, TIMEOUT_S, environment

HELD = CheckpointError("held elsewhere")

_HOLDER = """
import os, sys, time
from pathlib import Path
from growth_megatron.parallel.file_lock import locked
with locked(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        time.sleep(60)  # as a process that writes a checkpoint, which its run's death does not end
    print(child, flush=True)
    time.sleep(60)
"""


def _held(path: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(path)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.child = int(holder.stdout.readline())  # type: ignore[attr-defined]
    return holder


def test_a_kill_frees_the_lock_though_a_forked_process_lives_on(tmp_path: Path) -> None:
    holder = _held(tmp_path / "lock")
    child: int = holder.child  # type: ignore[attr-defined]
    try:
        who = rf"held elsewhere. The holder is process {holder.pid} on {socket.gethostname()}$"
        with pytest.raises(CheckpointError, match=who), locked(tmp_path / "lock", HELD):
            pytest.fail("locked twice")
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # still there
        with locked(tmp_path / "lock", HELD):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def _take(path: str, seconds: float, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    with locked(Path(path)):
        started = time.monotonic()
        time.sleep(seconds)
        results.put((started, time.monotonic()))


def test_later_holders_exclude_each_other_on_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, HELD):
        inode = path.stat().st_ino
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    takers = [context.Process(target=_take, args=(str(path), 0.3, results)) for _ in range(3)]
    for taker in takers:
        taker.start()
    spans = sorted(results.get(timeout=TIMEOUT_S) for _ in takers)
    for taker in takers:
        taker.join()
    assert all(ended <= started for (_, ended), (started, _) in itertools.pairwise(spans))
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
@pytest.mark.parametrize("error", [None, HELD])
def test_a_file_system_without_locks_is_said_and_no_obstacle(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    error: CheckpointError,
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", lockf)
    with locked(tmp_path / "lock", error):
        done = True
    assert done
    assert len(caplog.records) == 1
    assert "lock cannot be locked" in caplog.text
