"""The pages that a person reads, as programs: their fenced blocks, and a folder in which their commands are run.

Owns: finding blocks and commands; a checkout in small, in which the quickstart's run has been made. Does not own: which
commands are not run, and why (``tests.test_documents``).
"""

from __future__ import annotations

import json
import os
import re
import runpy
import select
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.pool import ROOT, TIMEOUT_S, environment, pool

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

SMALL = {
    "model": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "vocab_size": 300,
        "sequence_length": 32,
    },
    "training": {"global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    "evaluation": {"interval_steps": 50, "samples": 8},
}
"""What is other than in configs/quickstart.yaml; its stages stay, and the base's steps, since pages name them."""

GROWN_STEPS = 50


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, continued ones joined, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        found = (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in lines)
        return [line for line in found if line]


def blocks(page: Path) -> Iterator[Block]:
    """All fenced blocks of a Markdown file."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3])


def prepare_checkout(folder: Path, prepared_corpus: Path) -> None:
    """What a reader has after the quickstart, in small: an environment, data, a corpus of his own, a run, a model."""
    _make_environment(folder / ".venv" / "bin")
    for name in ("launch", "tools", "docs"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    config = folder / "configs" / "quickstart.yaml"
    content = yaml.safe_load(config.read_text())
    for section, values in SMALL.items():
        content[section].update(values) if section == "model" else content.update({section: values})
    content["stages"][1]["training"]["steps"] = GROWN_STEPS
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    data = folder / "data" / "quickstart"
    data.mkdir(parents=True)
    for name in ("tokenizer.model", *(f"{part}.{end}" for part in ("train", "validation") for end in ("bin", "idx"))):
        shutil.copy2(prepared_corpus / name, data / name)
    (folder / "corpus").mkdir()
    for page in PAGES:
        shutil.copy2(page, folder / "corpus" / f"{page.stem}.txt")


def prepare_run(folder: Path) -> None:
    """The quickstart's run, and a Hugging Face folder ``models/base`` of what it ended with."""
    shell = f"cd {folder} && source .venv/bin/activate && growth-megatron train configs/quickstart.yaml"
    outcome = run_shell(folder, shell + " && growth-megatron export-hf runs/quickstart models/base")
    assert outcome.returncode == 0, outcome.stdout


def _make_environment(where: Path) -> None:
    """Commands of a virtual environment: those of one process are forked (``run_shell``), the others started."""
    where.mkdir(parents=True)
    (where / "activate").write_text(f"export PATH={where}:$PATH\n")
    (where / "client.py").write_text(CLIENT)
    ask = f"exec {sys.executable} -S -E {where / 'client.py'}"
    start = f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1\nexec {sys.executable}"
    scripts = {
        "growth-megatron": f'{ask} growth_megatron "$@"',
        "python": f'case "$1" in docs/examples/*) {ask} "$@" ;; esac\n{start} "$@"',
        "torchrun": f'{start} -m torch.distributed.run "$@"',
    }
    for name, script in scripts.items():
        (where / name).write_text(f"#!/bin/sh\n{script}\n")
        (where / name).chmod(0o755)


CLIENT = """\
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect(os.environ["COMMANDS"])
socket.send_fds(server, [json.dumps([os.getcwd(), *sys.argv[1:]]).encode()], [1, 2])
sys.exit(int(server.recv(16)))
"""
"""Asks whoever listens at $COMMANDS to run a module or a file here, with this process's output."""


def run_shell(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """``script`` in a new shell with nothing of this process's environment but a PATH of the system's own.

    What it asks for at ``COMMANDS`` is forked from ``tests.pool``, since most of a small command's time is its imports.
    """
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        address = f"{short}/commands"  # the path of a socket may have some hundred letters, that of a test more
        listener.bind(address)
        listener.listen()
        variables = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "COMMANDS": address,
        }
        with tempfile.TemporaryFile("w+") as out:
            command = ["bash", "-euo", "pipefail", "-c", script]
            shell = subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=subprocess.STDOUT)
            while shell.poll() is None:
                if select.select([listener], [], [], 0.1)[0]:
                    _answer(listener)
            out.seek(0)
            return subprocess.CompletedProcess(command, shell.returncode, out.read())


def _answer(listener: socket.socket) -> None:
    client, _ = listener.accept()
    with client:
        request, files, *_ = socket.recv_fds(client, 2**16, 2)
        with open(files[0], "w") as out, open(files[1], "w") as err:
            process = pool.start("tests.documents", json.loads(request), environment(), out, err)
            pool.wait([process], TIMEOUT_S)
        client.send(str(process.code).encode())


def _run_there(folder: str, what: str, *arguments: str) -> None:
    os.chdir(folder)
    sys.argv = [what, *arguments]
    if what.endswith(".py"):
        runpy.run_path(what, run_name="__main__")
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run_there(*sys.argv[1:])
