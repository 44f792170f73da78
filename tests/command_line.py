"""The command line as users see it: a process each, or several commands in one fresh process to save imports."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.ranks import ROOT, environment

TIMEOUT_S = 240


@dataclass(frozen=True)
class Outcome:
    """What one command left: exit code and what it printed."""

    code: int
    out: str
    err: str


def run_command(*arguments: str, **variables: str) -> Outcome:
    """``python -m growth_megatron ARGUMENTS`` in a process of its own, with ``variables`` in its environment."""
    done = subprocess.run(
        [sys.executable, "-m", "growth_megatron", *arguments],
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_commands(commands: Sequence[Sequence[str]]) -> list[Outcome]:
    """The commands one after the other in one fresh process, which may start and end process groups each time."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.command_line"],
        cwd=ROOT,
        env=environment(),
        input=json.dumps([list(map(str, command)) for command in commands]),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [Outcome(**result) for result in results]


def _main() -> None:
    from growth_megatron.__main__ import main

    results = []
    for command in json.load(sys.stdin):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(command)
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            except Exception:
                traceback.print_exc()
                code = 1
        results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    _main()
