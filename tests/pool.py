"""``python -m MODULE ARGUMENTS`` without the seconds of imports: forked from a server that has megatron-core loaded.

Owns: the server, how a forked process gets its argv, environment, folder and files, and how it is waited for or killed.
Does not own: what runs in it (``tests.ranks``, ``tests.command_line``).

Every process is forked for one job and is gone after it, so patches, signals and kills stay its own. Unlike processes
that are started, those of one server hash strings with the same seed, find every module of growth_megatron imported,
and end without taking themselves apart: an import that is missing, an order of sets, a crash of the interpreter's end
show in a real start alone.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent

TIMEOUT_S = 900
"""Far above what any job takes on a busy machine: it ends hangs, and judges no speed."""

LAST_WORDS_S = 2
"""How long the others of a job may go on when one has failed; they often fail too, and say more."""


@dataclass
class Process:
    """One forked process; ``code`` is its exit code, negative for a signal, once the pool has seen it end."""

    pid: int
    code: int | None = None

    def kill(self) -> None:
        """End it and what it has started, if it still runs."""
        if self.code is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


class Pool:
    """The client's side of one server, which starts with the first process asked for."""

    def __init__(self) -> None:
        self._control: socket.socket | None = None
        self._started: dict[int, Process] = {}

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], out: IO[Any], err: IO[Any]
    ) -> Process:
        """Fork a process that is ``python -m module arguments``, its output in the two files."""
        control = self._server()
        request = {"module": module, "arguments": list(arguments), "environment": dict(environment)}
        with open(os.devnull) as nothing:
            files = [nothing.fileno(), out.fileno(), err.fileno()]
            socket.send_fds(control, [json.dumps(request).encode()], files)
            while True:
                pid, code = self._answer()
                if code is None:
                    process = self._started[pid] = Process(pid)
                    return process

    def wait(self, processes: Sequence[Process], timeout_s: float) -> bool:
        """Until all have ended or one has failed; False if time ran out. None of them is left."""
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.code is None for process in processes):
                left = deadline - time.monotonic()
                worst = min(process.code or 0 for process in processes)
                if any(process.code for process in processes):
                    left = min(left, LAST_WORDS_S if worst >= 0 else 0)
                if not select.select([self._server()], [], [], max(left, 0))[0]:
                    return any(process.code for process in processes)
                self._answer()
        finally:
            self._end(processes)
        return True

    def ended(self, process: Process) -> bool:
        """Whether it has, without waiting."""
        while process.code is None and select.select([self._server()], [], [], 0)[0]:
            self._answer()
        return process.code is not None

    def _end(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.kill()
        while any(process.code is None for process in processes):
            self._answer()

    def _answer(self) -> tuple[int, int | None]:
        message = self._server().recv(4096)
        if not message:
            raise RuntimeError("the server of test processes has died; its output is on stderr")
        pid, code = json.loads(message)
        if code is not None:
            self._started.pop(pid).code = code
        return pid, code

    def _server(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                command = [sys.executable, "-m", "tests.pool", str(theirs.fileno())]
                server = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # an interrupt of pytest is pytest's to handle
                )
            atexit.register(server.wait)
            atexit.register(self._control.close)  # runs first
        return self._control


pool = Pool()


def environment() -> dict[str, str]:
    """What every test process runs with: one thread a rank, this checkout first."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200"}


def how_it_ended(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "still running"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _preload() -> None:
    """Import what the processes need, all of it, whatever the modules are called."""
    import growth_megatron

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core says what this machine lacks
        for module in pkgutil.walk_packages(growth_megatron.__path__, "growth_megatron."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page it looks at
    tasks = os.listdir("/proc/self/task")
    assert len(tasks) == 1, "the imports have started threads, which no forked process would have"


def _serve(control: socket.socket) -> None:
    """Fork what is asked for until the other side hangs up."""
    running: dict[int, int] = {}
    while True:
        for ready in select.select([control.fileno(), *running], [], [])[0]:
            if ready in running:
                pid = running.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                control.send(json.dumps([pid, code]).encode())
                continue
            message, files, *_ = socket.recv_fds(control, 2**20, 3)
            if not message:
                for pid in running.values():
                    os.killpg(pid, signal.SIGKILL)
                return
            pid = os.fork()
            if not pid:
                for file in (control.detach(), *running):
                    os.close(file)
                _run(files, **json.loads(message))
            for file in files:
                os.close(file)
            running[os.pidfd_open(pid)] = pid
            control.send(json.dumps([pid, None]).encode())


def _run(files: list[int], module: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Be ``python -m module arguments``, short of the end: to take all modules apart costs more than most jobs."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    sys.path += [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _preload()
    _serve(socket.socket(fileno=int(sys.argv[1])))
