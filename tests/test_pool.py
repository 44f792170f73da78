"""What the pool of processes promises: failures are told, nothing outlives a job, nothing is waited for without end."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.command_line import run_command
from tests.pool import TIMEOUT_S, environment, pool
from tests.ranks import run_ranks

NEVER_S = 100 * TIMEOUT_S


def fail_on(rank: int) -> str:
    """Rank ``rank`` raises; the others wait for it for ever."""
    if int(os.environ["RANK"]) == rank:
        raise ValueError(f"of rank {rank}")
    time.sleep(NEVER_S)
    return ""


def die_on(rank: int, number: int) -> None:
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), number)
    time.sleep(NEVER_S)


def hang(note: str) -> None:
    """Leaves its process id, and that of a child which hangs as well, in the file ``note``."""
    child = os.fork()
    if child:
        Path(note).write_text(f"{os.getpid()} {child}")
    time.sleep(NEVER_S)


def patch_and_look() -> list[object]:
    """What was there before the patches, of a module and of the process."""
    import growth_megatron.errors as module

    found = [getattr(module, "PATCHED", None), os.environ.get("PATCHED"), signal.getsignal(signal.SIGTERM) == _ignore]
    module.PATCHED = "patched"  # type: ignore[attr-defined]
    os.environ["PATCHED"] = "patched"
    signal.signal(signal.SIGTERM, _ignore)
    return [*found, os.getpid()]


def _ignore(number: int, frame: object) -> None: ...


def start_as_seen() -> list[object]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GIVEN")
    return [sys.modules["__main__"].__spec__.name, os.getsid(0) == os.getpid(), *map(os.environ.get, names)]  # type: ignore[union-attr]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_rank_that_raises_is_reported_with_its_traceback_and_the_others_are_not_waited_for() -> None:
    with pytest.raises(AssertionError, match="on 2 ranks failed") as caught:
        run_ranks("tests.test_pool:fail_on", 2, {"rank": 1})
    zero, one = str(caught.value).split("--- rank ")[1:]
    assert "rank 1" in f"rank {one}"
    for words in ("exit code 1", "Traceback", "ValueError: of rank 1", "in fail_on"):
        assert words in one
    assert "killed by SIGKILL" in zero


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_rank_that_is_killed_fails_the_job_at_once(number: signal.Signals) -> None:
    with pytest.raises(AssertionError, match=f"rank 0: killed by {number.name}"):
        run_ranks("tests.test_pool:die_on", 2, {"rank": 0, "number": number}, timeout_s=NEVER_S)


def test_what_hangs_is_killed_at_the_timeout_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with (tmp_path / "output").open("w") as output:
        process = pool.start("tests.test_pool", [str(note)], environment(), output, output)
        while not note.exists() or len(note.read_text().split()) < 2:
            time.sleep(0.01)
        assert pool.wait([process], timeout_s=0.1) is False
    assert process.code == -signal.SIGKILL
    while not all(gone(int(pid)) for pid in note.read_text().split()):
        time.sleep(0.01)


def test_ranks_that_hang_are_reported_as_such() -> None:
    with pytest.raises(AssertionError, match=r"on 2 ranks ran past 0.5 s(.|\n)*rank 1: killed by SIGKILL"):
        run_ranks("tests.test_pool:fail_on", 2, {"rank": 7}, timeout_s=0.5)


def test_a_job_sees_nothing_of_the_one_before() -> None:
    first = run_ranks("tests.test_pool:patch_and_look", 2, {})
    second = run_ranks("tests.test_pool:patch_and_look", 2, {})
    assert [found[:3] for found in first + second] == [[None, None, False]] * 4
    assert len({found[3] for found in first + second}) == 4


def test_a_process_finds_what_a_start_would_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "by the test")
    expected = ["tests.ranks", True]
    assert run_ranks("tests.test_pool:start_as_seen", 1, {}) == [[*expected, None, None, None, "by the test"]]
    two = run_ranks("tests.test_pool:start_as_seen", 2, {})
    assert two == [[*expected, rank, rank, "2", "by the test"] for rank in "01"]
    monkeypatch.delenv("GIVEN")
    assert run_ranks("tests.test_pool:start_as_seen", 1, {})[0][-1] is None


def test_a_command_gives_its_exit_code_and_both_outputs() -> None:
    outcome = run_command("plan", "nowhere.yaml")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("growth-megatron plan: nowhere.yaml: no such file")
    usage = run_command("--help")
    assert (usage.code, usage.err) == (0, "")
    assert usage.out.startswith("usage: growth-megatron")


if __name__ == "__main__":
    hang(sys.argv[1])
