"""The launch scripts under the real elastic agent, with a stand-in for the trainer.

The stand-in is a package ``growth_megatron`` that comes first on the path; its ``train CONFIG`` executes the CONFIG
file as Python, so that each test writes down what its workers do.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.pool import TIMEOUT_S

REPOSITORY = Path(__file__).resolve().parents[2]

MAIN = """
import sys
from pathlib import Path
sys.exit(exec(Path(sys.argv[2]).read_text()))
"""

LOAD = """
from pathlib import Path
from types import SimpleNamespace
from growth_megatron.errors import ConfigError
def load_config(path, overrides):
    if "typo=1" in overrides:
        raise ConfigError("unknown key typo; allowed: model, data")
    run = SimpleNamespace(directory=str(Path(path).parent / "run"))
    return SimpleNamespace(config=SimpleNamespace(run=run))
"""

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
run = Path(sys.argv[2]).parent / "run"
def once(name):
    "True in the first attempt only; every rank has its own mark"
    mark = run / f"{name}_{world}_{rank}"
    first = not mark.exists()
    mark.touch()
    return first
def meet(place):
    "The agent ends the other ranks when one is gone, so they must have done their part by then"
    attempt = os.environ["TORCHELASTIC_RUN_ID"]
    (run / f"{place}_{attempt}_{rank}").touch()
    while not all((run / f"{place}_{attempt}_{other}").exists() for other in range(world)): time.sleep(0.01)
def ask_for(size):
    if rank == 0:
        (run / "next_layout.json").write_text(json.dumps({"world_size": size}))
    meet("asked")
    sys.exit(76)
def tell(text):
    "In one write: the agent starts Python unbuffered, where print makes two"
    sys.stdout.write(text + "\\n")
    sys.stdout.flush()
tell(f"rank {rank} of {world} threads {os.environ['OMP_NUM_THREADS']}")
meet("started")
"""

Launched = subprocess.Popen[str]


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    package = tmp_path / "path" / "growth_megatron"
    (package / "growth").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "growth" / "__init__.py").touch()
    shutil.copy(REPOSITORY / "growth_megatron" / "errors.py", package)
    (package / "parallel").mkdir()
    (package / "parallel" / "__init__.py").touch()
    shutil.copy(REPOSITORY / "growth_megatron" / "parallel" / "keep_alive.py", package / "parallel")
    (package / "__main__.py").write_text(MAIN)
    (package / "growth" / "configuration.py").write_text(LOAD)
    (tmp_path / "run").mkdir()
    return tmp_path


def environment(trainer: Path, **extra: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("GROWTH_MEGATRON", "OMP", "MASTER", "TORCH"))}
    return inherited | {"PYTHONPATH": str(trainer / "path"), "GROWTH_MEGATRON_VENV": sys.prefix} | extra


def start(script: str, trainer: Path, workers: str, *arguments: str, override: str = "", **extra: str) -> Launched:
    config = trainer / "config.py"
    config.write_text(PRELUDE + textwrap.dedent(workers))
    return subprocess.Popen(
        ["bash", str(REPOSITORY / "launch" / script), *arguments, str(config), *override.split()],
        env=environment(trainer, **extra), cwd=trainer, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: Launched) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, out, err


def single(trainer: Path, workers: str, *arguments: str, **extra: str) -> tuple[int, str, str]:
    return finish(start("torchrun.sh", trainer, workers, *arguments, **extra))


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never appeared"
        time.sleep(0.05)


@pytest.mark.parametrize("code", [0, 2, 75, 77])
def test_the_workers_exit_code_comes_through_without_a_traceback(trainer: Path, code: int) -> None:
    returned, out, err = single(trainer, f"sys.exit({code})", "-n", "2", OMP_NUM_THREADS="3")
    assert returned == code
    assert sorted(out.splitlines()) == ["rank 0 of 2 threads 3", "rank 1 of 2 threads 3"]
    assert err == ""


def test_a_fault_on_one_rank_names_the_rank_and_its_log(trainer: Path) -> None:
    returned, _, err = single(trainer, "sys.exit(1) if rank == 1 else time.sleep(60)", "-n", "2")
    assert returned == 1
    assert err.splitlines() == [
        "launch: rank 1 ended with exit code 1; its message is above and in the run's logs/rank_1.log"
    ]


def test_a_fault_wins_over_another_ranks_early_stop(trainer: Path) -> None:
    workers = "time.sleep(0.05 * (1 - rank)); sys.exit(75 if rank == 0 else 1)"
    assert single(trainer, workers, "-n", "2")[0] == 1


def test_a_killed_rank_is_named_though_the_others_fail_for_want_of_it(trainer: Path) -> None:
    workers = """
    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    sys.exit(1)
    """
    returned, _, err = single(trainer, workers, "-n", "2")
    assert returned == 1
    assert err == "launch: rank 1 was killed by SIGKILL (often: the host ran out of memory)\n"


def test_the_next_stage_starts_at_the_world_size_it_asks_for(trainer: Path) -> None:
    returned, out, err = single(trainer, "if world == 2: ask_for(1)", "-n", "2")
    assert returned == 0
    assert sorted(line[:11] for line in out.splitlines()) == ["rank 0 of 1", "rank 0 of 2", "rank 1 of 2"]
    assert err == "launch: going on at world size 1\n"


def test_a_world_size_that_the_node_does_not_hold_ends_with_76(trainer: Path) -> None:
    returned, _, err = single(trainer, "ask_for(8)", "-n", "1")
    assert returned == 76
    assert "needs world size 8, which 1 node(s) with 1 processes each cannot hold" in err


def test_asking_for_the_same_world_size_is_a_fault_not_an_endless_loop(trainer: Path) -> None:
    returned, out, err = single(trainer, "ask_for(1)", "-n", "1")
    assert returned == 1
    assert len(out.splitlines()) == 1
    assert "asked for world size 1, which it had" in err


def test_76_without_a_next_layout_says_which_file_is_missing(trainer: Path) -> None:
    returned, _, err = single(trainer, "sys.exit(76)")
    assert returned == 1
    assert "run/next_layout.json does not name it" in err


def test_an_early_stop_goes_on_only_when_asked_to(trainer: Path) -> None:
    returned, out, _ = single(trainer, "sys.exit(75 if once('stop') else 0)", GROWTH_MEGATRON_REQUEUE="1")
    assert returned == 0
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_workers_once_and_they_take_their_time(trainer: Path, number: signal.Signals) -> None:
    workers = f"""
    seen = []
    signal.signal({int(number)}, lambda *_: seen.append(1))
    (run / f"ready_{{rank}}").touch()
    while not seen: time.sleep(0.05)
    time.sleep(1.5)  # the save
    signals = len(seen)
    meet("saved")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what the agent sends to the rank that is last to leave
    sys.exit(75 if signals == 1 else 1)
    """
    process = start("torchrun.sh", trainer, workers, "-n", "2", GROWTH_MEGATRON_REQUEUE="0")
    for rank in range(2):
        wait_for(trainer / "run" / f"ready_{rank}")
    process.send_signal(number)
    returned, _, err = finish(process)
    assert (returned, err) == (75, "")


def test_a_request_to_stop_that_comes_before_training_is_no_fault(trainer: Path) -> None:
    returned, _, err = single(trainer, "os.kill(os.getpid(), signal.SIGUSR1)")
    assert returned == 75
    assert "rank 0 was stopped by SIGUSR1 before training began; what was saved before is untouched" in err


def test_a_bad_configuration_shows_once_before_any_worker_starts(trainer: Path) -> None:
    returned, out, err = finish(start("torchrun.sh", trainer, "", "-n", "2", override="typo=1"))
    assert (returned, out) == (2, "")
    assert err == "growth-megatron train: unknown key typo; allowed: model, data\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "two", "x.yaml"], "no such configuration file: x.yaml"),
        (["-n", "0", __file__], "the number of processes is '0'; give a whole number from 1"),
        (["-n"], "-n needs a value"),
        (["-x", __file__], "unknown option -x"),
        ([], "Examples"),
    ],
)
def test_wrong_arguments_are_refused_with_code_2(trainer: Path, arguments: list[str], message: str) -> None:
    result = subprocess.run(
        ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), *arguments],
        env=environment(trainer), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize("script", ["torchrun.sh", "torchrun_multinode.sh"])
def test_help_shows_usage_with_examples(script: str) -> None:
    result = subprocess.run(
        ["bash", str(REPOSITORY / "launch" / script), "-h"], text=True, capture_output=True, check=False
    )
    assert result.returncode == 0
    assert "Example" in result.stdout


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "NNODES is ''"),
        ({"NNODES": "2"}, "NODE_RANK is ''"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK is '2'; set it to 0 on the head node and 1 to 1"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "99999"}, "MASTER_PORT is '99999'"),
    ],
)
def test_missing_node_settings_are_named(trainer: Path, variables: dict[str, str], message: str) -> None:
    code, _, err = finish(start("torchrun_multinode.sh", trainer, "", **variables))
    assert code == 2
    assert message in err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_nodes(trainer: Path, workers: str, **extra: str) -> list[tuple[int, str, str]]:
    """Two loopback addresses as two nodes with one process each."""
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NPROC": "1"} | extra
    nodes = [
        start(
            "torchrun_multinode.sh", trainer, workers, NODE_RANK=str(rank), LOCAL_ADDR=f"127.0.0.{rank + 1}", **common
        )
        for rank in range(2)
    ]
    return [finish(node) for node in nodes]


def test_two_nodes_meet_and_their_ranks_talk_to_each_other(trainer: Path) -> None:
    workers = """
    import torch
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(total)
    tell(f"sum {total.item()}")
    torch.distributed.destroy_process_group()
    """
    results = two_nodes(trainer, workers)
    assert [code for code, _, _ in results] == [0, 0]
    assert sum(out.count("sum 3.0") for _, out, _ in results) == 2
    assert sorted(out.splitlines()[0][:11] for _, out, _ in results) == ["rank 0 of 2", "rank 1 of 2"]


def test_a_node_waits_while_a_stage_does_not_need_it_and_is_used_again(trainer: Path) -> None:
    workers = """
    done = run / "small_stage_done"
    if world == 2 and not done.exists(): ask_for(1)
    if world == 1:
        done.touch()
        ask_for(2)
    sys.exit(0)
    """
    head, other = two_nodes(trainer, workers)
    assert [head[0], other[0]] == [0, 0]
    assert head[1].count(" of ") == 3
    assert other[1].count(" of ") == 2
    assert other[2] == "launch: node 1 is not needed at world size 1; waiting for the next stage\n"


def test_every_node_ends_with_the_runs_code(trainer: Path) -> None:
    assert [code for code, _, _ in two_nodes(trainer, "sys.exit(75)")] == [75, 75]
