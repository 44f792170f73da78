"""Runs a function on several ranks and brings back what each returned.

``run_ranks("tests.train.workers:losses", 2, {...})`` forks two processes that join on gloo as under torchrun, gives
every rank the same JSON arguments, shows each rank's output if one fails, and ends them all after ``timeout_s``.
Does not own: the processes (``tests.pool``). ``torchrun`` is the real one, for tests of it.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.pool import TIMEOUT_S, environment, how_it_ended, pool


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """Command line of a torchrun of ``ranks`` processes on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*command, "--master-addr", "127.0.0.1", "--master-port", str(port), *arguments]


def run_ranks(
    target: str, ranks: int, arguments: dict[str, Any], timeout_s: float = TIMEOUT_S, without: tuple[str, ...] = ()
) -> list[Any]:
    """Results of ``module:function`` called with ``arguments`` on each rank, by rank.

    ``without`` names repairs (functions of ``growth_megatron.parallel.megatron_fixes``) to leave out.

    Raises: AssertionError with every rank's output if a rank fails or time runs out.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as open_files:
        if ranks > 1:
            open_files.enter_context(_alone())
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments))
        outputs = [open_files.enter_context((folder / f"output_{rank}").open("w+")) for rank in range(ranks)]
        store, variables = _rendezvous(ranks)
        processes = [
            pool.start("tests.ranks", [target, name, *without], {**environment(), **given}, output, output)
            for given, output in zip(variables, outputs, strict=True)
        ]
        in_time = pool.wait(processes, timeout_s)
        del store
        if not in_time or any(process.code for process in processes):
            reason = "failed" if in_time else f"ran past {timeout_s} s"
            said = [
                f"--- rank {rank}: {how_it_ended(process.code)}\n{(folder / f'output_{rank}').read_text()[-6000:]}"
                for rank, process in enumerate(processes)
            ]
            raise AssertionError("\n".join([f"{target} on {ranks} ranks {reason}", *said]))
        return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(ranks)]


@contextmanager
def _alone() -> Iterator[None]:
    """No other job of several ranks of this checkout meanwhile: two would starve each other on few cores."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _rendezvous(ranks: int) -> tuple[Any, list[dict[str, str]]]:
    """A store for the ranks to meet at, and the variables torchrun would set; one rank starts as users start it.

    As torchrun does it: the store is ours, not rank 0's, so that its port is never free for others to take.
    """
    if ranks == 1:
        return None, [{}]
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return store, [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _main() -> None:
    target, folder = sys.argv[1], Path(sys.argv[2])
    module, _, name = target.partition(":")
    from growth_megatron.parallel import collectives, megatron_fixes, process_groups

    for repair in sys.argv[3:]:
        assert hasattr(megatron_fixes, repair)
        setattr(megatron_fixes, repair, lambda repaired: None)
    process_groups.start(timeout_s=TIMEOUT_S)
    result = getattr(importlib.import_module(module), name)(**json.loads((folder / "arguments.json").read_text()))
    (folder / f"result_{collectives.rank_from_environment()}.json").write_text(json.dumps(result))
    process_groups.stop()


if __name__ == "__main__":
    _main()
