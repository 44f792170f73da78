"""Two nodes that share no network stack: network namespaces joined by one link. Needs root and ``ip``; else skipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from growth_megatron.train.metrics import read_metrics
from tests.conftest import write_growing_config
from tests.pool import TIMEOUT_S

REPOSITORY = Path(__file__).resolve().parents[2]
HANGS_AFTER_S = 20.0
ADDRESSES = ("10.213.7.1", "10.213.7.2")
Node = subprocess.Popen[str]


class Hosts:
    """``names`` of two namespaces, and the link between them."""

    def __init__(self) -> None:
        self.names = [f"grow{os.getpid()}{letter}" for letter in "ab"]

    def ip(self, *command: str) -> None:
        done = subprocess.run(["ip", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces: ip {' '.join(command)}: {done.stderr.strip()}")

    def link(self, state: str) -> None:
        """``up`` or ``down``."""
        self.ip("-n", self.names[1], "link", "set", "link0", state)

    def start(self, config: Path, *, own_disk: Path | None = None, overrides: tuple[str, ...] = ()) -> list[Node]:
        """One process for each node; ``own_disk`` is another, empty folder on the second one."""
        nodes = []
        for rank, name in enumerate(self.names):
            settings = os.environ | {
                "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": ADDRESSES[0], "LOCAL_ADDR": ADDRESSES[rank],
                "NPROC": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "link0", "GROWTH_MEGATRON_VENV": sys.prefix,
                "PYTHONPATH": str(REPOSITORY),
            }  # fmt: skip
            command = ["bash", str(REPOSITORY / "launch" / "torchrun_multinode.sh"), str(config), *overrides]
            if rank == 1 and own_disk is not None:
                mounted = f'mount -t tmpfs none {own_disk} && "$@"; code=$?; ls {own_disk}; exit $code'
                command = ["unshare", "--mount", "bash", "-c", mounted, "node", *command]
            nodes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *command],
                    env=settings,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        return nodes


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip (Debian: iproute2)")
    made = Hosts()
    first, second = made.names
    try:
        made.ip("netns", "add", first)
        made.ip("netns", "add", second)
        made.ip("-n", first, "link", "add", "link0", "type", "veth", "peer", "name", "link0", "netns", second)
        for name, address in zip(made.names, ADDRESSES, strict=True):
            made.ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
            made.ip("-n", name, "link", "set", "lo", "up")
            made.ip("-n", name, "link", "set", "link0", "up")
        yield made
    finally:
        for name in made.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def config(prepared_corpus: Path, tmp_path: Path) -> Path:
    """Two stages, with a data index of its own."""
    path = write_growing_config(tmp_path, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["schedule"]["kind"] = "constant"
    content["run"]["timeout_s"] = HANGS_AFTER_S
    content["data"]["cache_directory"] = str(tmp_path / "cache")
    content["checkpoint"] = {"interval_steps": 20, "keep_last": 2}
    (tmp_path / "cache").mkdir()
    path.write_text(yaml.safe_dump(content))
    return path


def _ended(nodes: list[Node], within_s: float = 300.0) -> list[tuple[int, str]]:
    try:
        outputs = [node.communicate(timeout=within_s)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


def _steps(run: Path) -> list[int]:
    found = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    return [record["step"] for record in found if record["kind"] == "train"]


def test_nodes_build_the_data_index_once_for_each_disk(hosts: Hosts, config: Path) -> None:
    cache = config.parent / "cache"
    for code, output in _ended(hosts.start(config, own_disk=cache)):
        assert code == 0, output
    built = sorted(path.name for path in cache.iterdir() if path.is_dir())
    assert built, "the first node has built none"
    times = {name: (cache / name).stat().st_mtime_ns for name in built}
    own = _ended(hosts.start(config, own_disk=cache, overrides=(f"run.directory={config.parent / 'again'}",)))[1][1]
    found = {line for line in own.splitlines() if re.fullmatch("[0-9a-f]{24}", line)}
    assert found, own
    assert found <= set(built)
    assert {name: (cache / name).stat().st_mtime_ns for name in built} == times, "the first node has built it again"
    assert _steps(config.parent / "run") == _steps(config.parent / "again") == list(range(1, 11))


def test_a_node_that_is_cut_off_ends_all_within_a_bound_and_the_run_goes_on_when_it_is_back(
    hosts: Hosts, config: Path
) -> None:
    run = config.parent / "run"
    config.write_text(config.read_text().replace("steps: 6", f"steps: {10**6}"))
    nodes = hosts.start(config)
    deadline = time.monotonic() + TIMEOUT_S
    while len(_steps(run)) < 30:
        assert time.monotonic() < deadline, "no step was made"
        assert all(node.poll() is None for node in nodes), _ended(nodes)
        time.sleep(0.2)
    hosts.link("down")
    for code, output in _ended(nodes):
        assert code == 1, output
        assert "re-run the same command" in output.lower(), output
    saved = max(int(path.name.split("_")[1]) for path in (run / "checkpoints").iterdir())
    hosts.link("up")
    config.write_text(config.read_text().replace(f"steps: {10**6}", f"steps: {saved + 5}"))
    for code, output in _ended(hosts.start(config)):
        assert code == 0, output
    assert _steps(run) == list(range(1, saved + 5 + 4 + 1))
