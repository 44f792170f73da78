"""Runs a function on several ranks under torchrun and brings back what each returned.

``run_ranks("tests.train.workers:losses", 2, {...})`` starts two processes on gloo on a free port, gives every rank the
same JSON arguments, shows each rank's output if one fails, and ends them all after ``timeout_s``.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """What every test process runs with: one thread a rank, this checkout first."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200"}


def torchrun(ranks: int, *arguments: str, log_folder: Path | None = None) -> list[str]:
    """Command line of a torchrun of ``ranks`` processes on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    if log_folder is not None:
        command += ["--redirects", "3", "--log-dir", str(log_folder)]
    return [*command, *arguments]


def run_ranks(
    target: str, ranks: int, arguments: dict[str, Any], timeout_s: float = 300, without: tuple[str, ...] = ()
) -> list[Any]:
    """Results of ``module:function`` called with ``arguments`` on each rank, by rank.

    ``without`` names repairs (functions of ``growth_megatron.parallel.megatron_fixes``) to leave out.

    Raises: AssertionError with every rank's output if a rank fails or time runs out.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments))
        arguments_line = ["-m", "tests.ranks", target, str(folder), *without]
        if ranks == 1:  # as users run one rank
            command = [sys.executable, *arguments_line]
        else:
            command = torchrun(ranks, *arguments_line, log_folder=folder / "logs")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise AssertionError(f"{target} on {ranks} ranks ran past {timeout_s} s\n{_outputs(folder)}") from None
        if process.returncode:
            raise AssertionError(f"{target} on {ranks} ranks failed\n{_outputs(folder)}\n{printed[-4000:]}")
        return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(ranks)]


def _outputs(folder: Path) -> str:
    parts = []
    for file in sorted(folder.glob("logs/**/std*.log")):
        text = file.read_text(errors="replace")
        if text:
            parts.append(f"--- rank {file.parent.name} {file.name}\n{text[-4000:]}")
    return "\n".join(parts)


def _main() -> None:
    target, folder = sys.argv[1], Path(sys.argv[2])
    module, _, name = target.partition(":")
    from growth_megatron.parallel import collectives, megatron_fixes, process_groups

    for repair in sys.argv[3:]:
        assert hasattr(megatron_fixes, repair)
        setattr(megatron_fixes, repair, lambda repaired: None)
    process_groups.start(timeout_s=240)
    result = getattr(importlib.import_module(module), name)(**json.loads((folder / "arguments.json").read_text()))
    (folder / f"result_{collectives.rank_from_environment()}.json").write_text(json.dumps(result))
    process_groups.stop()


if __name__ == "__main__":
    _main()
