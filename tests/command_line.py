"""The command line as users see it: every command in a fresh process.

Owns: what a command left behind as an ``Outcome``. Does not own: the processes (``tests.pool``).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from tests.pool import ROOT, TIMEOUT_S, environment, pool


@dataclass(frozen=True)
class Outcome:
    """What one command left: exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def printed(self) -> str:
        return self.out + self.err


def run_command(*arguments: str, **variables: str) -> Outcome:
    """``python -m growth_megatron ARGUMENTS`` in a forked process, with ``variables`` in its environment."""
    return run_module("growth_megatron", *arguments, **variables)


def run_module(module: str, *arguments: str, **variables: str) -> Outcome:
    """``python -m MODULE ARGUMENTS`` likewise."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = pool.start(module, arguments, {**environment(), **variables}, out, err)
        in_time = pool.wait([process], TIMEOUT_S)
        out.seek(0)
        err.seek(0)
        assert in_time, f"{module} {arguments} ran past {TIMEOUT_S} s\n{out.read()}{err.read()}"
        assert process.code is not None
        return Outcome(process.code, out.read(), err.read())


def run_commands(commands: Sequence[Sequence[str]]) -> list[Outcome]:
    """The commands one after the other."""
    return [run_command(*map(str, command)) for command in commands]


def start_command(*arguments: str, **variables: str) -> Outcome:
    """``run_command`` in a process that is really started, for what its start is to show."""
    command = [sys.executable, "-m", "growth_megatron", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment(), **variables}, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
