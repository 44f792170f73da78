"""What is wrong with a rank's surroundings is said, with a remedy, before it joins the others."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest

from growth_megatron.errors import ConfigError
from growth_megatron.parallel.preflight import (
    allow_open_files,
    check_rendezvous,
    device_index,
    what_compiling_lacks,
)
from tests.command_line import run_command

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "devices", "index"),
    [
        ({}, 1, 0),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", **TORCHRUN}, 8, 3),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 1, 0),  # Slurm with --gpus-per-task=1
    ],
)
def test_a_rank_takes_its_own_device(environment: dict[str, str], devices: int, index: int) -> None:
    assert device_index(environment, devices) == index


@pytest.mark.parametrize(
    ("environment", "devices"),
    [({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **TORCHRUN}, 1), ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "8"}, 4)],
)
def test_more_ranks_than_devices_are_refused(environment: dict[str, str], devices: int) -> None:
    with pytest.raises(ConfigError, match=rf"ranks on this node, but {devices} visible GPUs; start {devices} "):
        device_index(environment, devices)


def test_a_limit_of_open_files_too_low_for_the_world_is_refused() -> None:
    assert allow_open_files(64, (256, 1024)) == 1024
    assert allow_open_files(10**6, (1024, resource.RLIM_INFINITY)) == resource.RLIM_INFINITY
    with pytest.raises(ConfigError, match=r"may open 1024 files here, and each of 1024 ranks .* ulimit -n 65536"):
        allow_open_files(1024, (1024, 1024))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE 2: allowed are 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1', not a number"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        ({"MASTER_PORT": "99999999"}, "MASTER_PORT is '99999999'; allowed: 1 to 65535"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_variables_that_name_no_rank_or_place_to_meet_are_refused(changes: dict[str, str], words: str) -> None:
    good = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    check_rendezvous(good)
    with pytest.raises(ConfigError, match=words):
        check_rendezvous({**good, **changes})


def test_a_rank_that_is_none_still_says_what_is_wrong(growing_config: Path) -> None:
    outcome = run_command("train", str(growing_config), RANK="-1")
    assert outcome.code == 2
    assert "RANK is '-1', not a number" in outcome.err


def test_what_compiling_lacks_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert what_compiling_lacks() == "the package triton (pip install triton)"
    monkeypatch.setitem(sys.modules, "triton", sys)
    monkeypatch.setenv("PATH", "")
    assert what_compiling_lacks() == "a C compiler (apt-get install gcc)"
