"""Runs ``growth-megatron train`` under torchrun's elastic agent and passes on what torchrun hides.

torchrun ends with 1 and a page of traceback whatever its workers' exit codes were, and answers SIGTERM by killing them
30 s later. This module drives the same agent in its own process, so that it can

- end with the workers' exit code (``growth_megatron.errors``: 0, 1, 2, 75, 76, 77),
- pass signals on and let the trainer save for as long as that takes,
- start the next stage of a growing run at its world size (exit code 76, RUN/next_layout.json).

Several nodes: every node runs this; the head node holds the rendezvous store for the whole run and announces each
attempt's world size in it, so nodes that a stage does not need wait for one that does. Usage: launch/torchrun.sh and
launch/torchrun_multinode.sh, which check the inputs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed import DistError, TCPStore
from torch.distributed import run as _torchrun  # untyped
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from growth_megatron.errors import (
    EXIT_FAULT,
    EXIT_NEXT_LAYOUT,
    EXIT_OK,
    EXIT_STOPPED_EARLY,
    GrowthMegatronError,
)
from growth_megatron.growth.configuration import load_config
from growth_megatron.parallel.keep_alive import keep_alive

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
torchrun: Any = _torchrun
JOIN_TIMEOUT = datetime.timedelta(minutes=10)
LEAVE_TIMEOUT_S = 60.0
POLL_S = 0.5
KEEP_ALIVE_EVERY_S = 5.0


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Cluster:
    """The nodes of a run, seen from one of them."""

    nodes: int
    node_rank: int
    processes_per_node: int
    head: str
    port: int

    @property
    def is_head(self) -> bool:
        return self.node_rank == 0

    def nodes_for(self, world_size: int) -> int:
        """Fewest nodes that hold ``world_size`` processes evenly; 0 if no number of them does."""
        for nodes in range(1, self.nodes + 1):
            if world_size % nodes == 0 and world_size // nodes <= self.processes_per_node:
                return nodes
        return 0


class Signals:
    """Passes signals on to the workers instead of tearing them down, as the elastic agent would."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, self._forward)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        workers = [child for child in psutil.Process().children() if _leads_its_group(child.pid)]
        if not workers:
            say(f"{self.received.name} before any worker ran")
            sys.exit(128 + number)
        for worker in workers:
            worker.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _leads_its_group(pid: int) -> bool:
    """Whether this child is a worker: the agent starts each in a session of its own."""
    try:
        return os.getpgid(pid) == pid
    except ProcessLookupError:
        return False


def exit_code_of(failures: Mapping[int, ProcessFailure]) -> int:
    """The exit code of a failed attempt: the documented one that the ranks ended with, 1 if one of them broke down.

    The agent ends the ranks that are left with SIGTERM, so that signal says nothing beside another cause; and a rank
    that dies makes the others fail in the next collective, so a signal counts as one second earlier than it was seen.
    """
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM} or failures
    faults = {rank: f for rank, f in own.items() if f.exitcode not in (EXIT_STOPPED_EARLY, EXIT_NEXT_LAYOUT)} or own
    rank, first = min(faults.items(), key=lambda item: (item[1].timestamp + (item[1].exitcode > 0), item[0]))
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        if name in ("SIGUSR1", "SIGUSR2"):  # only ever a request to stop, which a rank that still starts does not know
            say(f"rank {rank} was stopped by {name} before training began; what was saved before is untouched")
            return EXIT_STOPPED_EARLY
        cause = " (often: the host ran out of memory)" if name == "SIGKILL" else ""
        say(f"rank {rank} was killed by {name}{cause}")
        return EXIT_FAULT
    if first.exitcode == EXIT_FAULT:
        say(f"rank {rank} ended with exit code 1; its message is above and in the run's logs/rank_{rank}.log")
    return first.exitcode


def run_workers(elastic_options: Sequence[str], training_arguments: Sequence[str]) -> int:
    """One attempt; returns the workers' exit code."""
    arguments = torchrun.parse_args(
        [*elastic_options, "--max-restarts=0", "--module", "growth_megatron", "train", *training_arguments]
    )
    arguments.signals_to_handle = "SIGQUIT"  # the others are ours (Signals); torch before 2.9 takes them regardless
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # its "failed (exitcode: 76)" is no error here
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        return exit_code_of(error.failures)
    except SignalException as error:
        return 128 + int(error.sigval)
    return EXIT_OK


def watch_connections(port: int) -> None:
    """All connections to the rendezvous, now and later, end within a bound when the other node is cut off."""

    def watch() -> None:
        while True:
            keep_alive(port)
            time.sleep(KEEP_ALIVE_EVERY_S)

    threading.Thread(target=watch, name="keep alive", daemon=True).start()


def next_world_size(run_directory: Path) -> int:
    """The world size that the run asked for when it ended with 76."""
    path = run_directory / "next_layout.json"
    try:
        return int(json.loads(path.read_text())["world_size"])
    except (OSError, ValueError, KeyError) as error:
        raise GrowthMegatronError(
            f"the run ended with {EXIT_NEXT_LAYOUT} (next stage needs another world size) but {path} does not name it: "
            f"{error!r}; start the next stage by hand with the world size the trainer printed"
        ) from None


class Supervisor:
    """The attempts of one run, as the head node decides them."""

    def __init__(self, cluster: Cluster, run_directory: Path, training_arguments: Sequence[str]) -> None:
        self.cluster = cluster
        self.run_directory = run_directory
        self.training_arguments = training_arguments
        self.requeue = os.environ.get("GROWTH_MEGATRON_REQUEUE") == "1"
        self.signals = Signals()
        self.store = None
        if cluster.nodes > 1:
            self.store = self._join()
            watch_connections(cluster.port)

    def _join(self) -> TCPStore:
        """The store that outlives the attempts. multi_tenant: the agent of the head node shares its port."""
        cluster = self.cluster
        return TCPStore(
            cluster.head, cluster.port, is_master=cluster.is_head, multi_tenant=True, wait_for_workers=False,
            timeout=JOIN_TIMEOUT,
        )  # fmt: skip

    def run(self, world_size: int) -> int:
        """Attempts until the run is done or cannot go on; returns the exit code."""
        attempt = 0
        try:
            while True:
                announced = self._agree(attempt, {"world_size": world_size})
                if "exit_code" in announced:
                    return announced["exit_code"]
                code = self._attempt(attempt, announced["world_size"])
                attempt += 1
                if self.cluster.is_head:
                    following = self._following(code, world_size)
                    if following is None:
                        self._agree(attempt, {"exit_code": code})
                        return code
                    world_size = following
        except BaseException:
            if self.cluster.is_head:
                self._agree(attempt + 1, {"exit_code": EXIT_FAULT})
            raise
        finally:
            self._leave()

    def _attempt(self, attempt: int, world_size: int) -> int:
        """This node's part of an attempt."""
        nodes = self.cluster.nodes_for(world_size)
        if self.cluster.node_rank >= nodes:
            say(f"node {self.cluster.node_rank} is not needed at world size {world_size}; waiting for the next stage")
            return EXIT_OK
        return run_workers(self._elastic_options(world_size, nodes, attempt), self.training_arguments)

    def _agree(self, attempt: int, decision: dict[str, int]) -> dict[str, int]:
        """What the head node decided for this attempt; only there does ``decision`` count."""
        if self.store is None:
            return decision
        key = f"growth_megatron/attempt/{attempt}"
        if self.cluster.is_head:
            self.store.set(key, json.dumps(decision))
            return decision
        while not self.store.check([key]):  # a blocking wait would keep Python from seeing signals
            time.sleep(POLL_S)
        return dict(json.loads(self.store.get(key)))

    def _leave(self) -> None:
        """Keeps the head node's store up until the other nodes have read the last word."""
        if self.store is None:
            return
        gone = self.store.add("growth_megatron/left", 1)
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        while self.cluster.is_head and gone < self.cluster.nodes and time.monotonic() < deadline:
            time.sleep(0.1)
            gone = self.store.add("growth_megatron/left", 0)

    def _following(self, code: int, world_size: int) -> int | None:
        """World size of the next attempt; None if there is none."""
        if code == EXIT_STOPPED_EARLY and self.requeue and self.signals.received != signal.SIGINT:
            say("stopped early and saved; GROWTH_MEGATRON_REQUEUE=1, so it goes on")
            return world_size
        if code != EXIT_NEXT_LAYOUT:
            return None
        wanted = next_world_size(self.run_directory)
        if wanted == world_size:
            raise GrowthMegatronError(f"the run asked for world size {wanted}, which it had; it would never go on")
        if self.cluster.nodes_for(wanted) == 0:
            room = f"{self.cluster.nodes} node(s) with {self.cluster.processes_per_node} processes each"
            say(f"the next stage needs world size {wanted}, which {room} cannot hold evenly; start it on more")
            return None
        say(f"going on at world size {wanted}")
        return wanted

    def _elastic_options(self, world_size: int, nodes: int, attempt: int) -> list[str]:
        processes = world_size // nodes
        if self.cluster.nodes == 1:
            return ["--standalone", f"--nproc-per-node={processes}"]
        options = [
            f"--nnodes={nodes}",
            f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={self.cluster.head}:{self.cluster.port}",
            f"--rdzv-id=growth_megatron-{attempt}",
            f"--rdzv-conf=is_host={str(self.cluster.is_head).lower()}",
        ]
        local_address = os.environ.get("LOCAL_ADDR")
        return [*options, f"--local-addr={local_address}"] if local_address else options


def describe(config: Any, cluster: Cluster) -> str:
    """Run directory, and the ranks and nodes of each stage, where it is started on all of ``cluster``."""
    lines = [f"run directory: {config.run.directory}"]
    for stage in config.stages:
        layout, world = stage.parallel, cluster.nodes * cluster.processes_per_node
        size = layout.model_parallel_size
        if layout.data_parallel_size is not None:
            world = size * layout.data_parallel_size
        nodes = -(-world // cluster.processes_per_node)
        fits = world % size == 0 and world % nodes == 0
        note = f"{nodes} node(s) with {world // nodes} process(es) each" if fits else f"which {size} do not divide"
        if nodes > cluster.nodes:
            note += f", {nodes - cluster.nodes} more than there are: another job is submitted for it"
        lines.append(f"stage {stage.name}: {world} rank(s), {note}")
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Used by launch/torchrun.sh and launch/torchrun_multinode.sh.")
    parser.add_argument("--nproc", type=int, required=True, help="processes per node")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--head", default="localhost")
    parser.add_argument("--port", type=int, default=29500)
    parser.add_argument("--describe", action="store_true", help="say what would run where, and end")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    try:
        # Read here first: a mistake in the YAML shows once, before any process starts.
        config = load_config(arguments.config, arguments.overrides).config
        cluster = Cluster(arguments.nnodes, arguments.node_rank, arguments.nproc, arguments.head, arguments.port)
        if arguments.describe:
            print(describe(config, cluster))
            return EXIT_OK
        supervisor = Supervisor(cluster, Path(config.run.directory), [arguments.config, *arguments.overrides])
        return supervisor.run(arguments.nnodes * arguments.nproc)
    except (DistError, RendezvousError) as error:
        say(
            f"node {arguments.node_rank} has lost the others ({str(error).splitlines()[0]}); when all of them reach "
            f"{arguments.head}:{arguments.port} again, re-run the same command on each to resume"
        )
        return EXIT_FAULT
    except GrowthMegatronError as error:
        print(f"growth-megatron train: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
