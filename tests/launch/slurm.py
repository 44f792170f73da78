"""A real Slurm on this machine: a controller, two nodes (``slurmd -N``) and munge, of this process and in a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pool import TIMEOUT_S

STARTS_WITHIN_S = 120.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "srun")
CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=1
MpiDefault=none
MinJobAge=3600
KillWait=5
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs={cpus}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs={cpus}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install() -> None:
    """Debian's packages, where they are not there. Skips the test, with the reason, where they cannot be had."""
    if all(_program(name) for name in PROGRAMS):
        return
    if os.geteuid() != 0:
        pytest.skip(f"no Slurm: {', '.join(PROGRAMS)} are not all there, and only root can install slurm-wlm and munge")
    command = ["apt-get", "install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]
    installed: subprocess.CompletedProcess[str] | None = None
    if shutil.which("apt-get"):
        subprocess.run(["apt-get", "update"], capture_output=True, timeout=TIMEOUT_S, check=False)
        settings = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        installed = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=settings
        )
    if installed is None or installed.returncode:
        reason = "there is no apt-get" if installed is None else installed.stderr.strip()[-300:]
        pytest.skip(f"no Slurm, and `{' '.join(command)}` does not install it: {reason}")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Slurm:
    """Up from ``start`` to ``close``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._daemons = folder, list[subprocess.Popen[bytes]]()
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        """Raises: AssertionError, with what the daemons say, where they do not come up."""
        (self.folder / "state").mkdir()
        names = ("controller", "first", "second")
        ports = dict(zip(names, _free_ports(3), strict=True))
        text = CONFIG.format(folder=self.folder, cpus=os.cpu_count(), **ports)
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        own = [f"--{name}={self.folder / f'munge.{name}'}" for name in ("socket", "seed-file", "pid-file", "log-file")]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", own[0], *own[1:])
        self.until(lambda: (self.folder / "munge.socket").exists(), "munged", STARTS_WITHIN_S)
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        self.until(
            lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2",
            "two nodes",
            STARTS_WITHIN_S,
        )

    def close(self) -> None:
        """End all daemons."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            daemon.wait(TIMEOUT_S)

    def _start(self, program: str, *options: str) -> None:
        path = _program(program)
        assert path is not None
        with open(self.folder / f"{program}-{len(self._daemons)}.log", "wb") as log:
            daemon = subprocess.Popen([path, *options], stdout=log, stderr=log, env=self.environment)
        self._daemons.append(daemon)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            command, env=self.environment | environment, cwd=self.folder, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def state(self, job: str) -> str:
        """As in PENDING, RUNNING, COMPLETED."""
        found = self.run("scontrol", "--oneliner", "show", "job", job)
        return found.partition("JobState=")[2].partition(" ")[0]

    def completed(self, job: str) -> None:
        """Wait for the end of a job that ends well."""
        states = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.until(lambda: self.state(job) in states, f"the end of job {job}")
        assert self.state(job) == "COMPLETED", self.run("scontrol", "show", "job", job) + self.said()

    def said(self) -> str:
        """What daemons and jobs have printed, the ends of it."""
        files = [*self.folder.glob("*.log"), *self.folder.glob("slurm-*.out")]
        return "\n".join(f"{file.name}: {file.read_text()[-3000:]}" for file in files)

    def until(self, holds: Callable[[], bool], what: str, within_s: float = TIMEOUT_S) -> None:
        """Wait for it."""
        deadline = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                raise AssertionError(f"{what} did not come: {self.said()}")
            time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
