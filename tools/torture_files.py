"""Attacks on files, configurations and command lines for ``tools/torture.py``: one at a time, each judged.

Every command runs in a forked child of this process, which has all libraries loaded: a crash or a hang is its own.
"""

# ruff: noqa: SIM905 - lists of words read better as words

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import growth_megatron.commands.export_hf
import growth_megatron.commands.grow
import growth_megatron.commands.import_hf
import growth_megatron.commands.inspect
import growth_megatron.commands.sample
import growth_megatron.commands.verify
import growth_megatron.train.stages  # noqa: F401 - loaded here once, not in each child
from growth_megatron.__main__ import main

LIMIT_S = 90.0  # of one command, on a busy machine
CODES = (0, 1, 2, 75, 76, 77)
JUNK = (
    "", "x", "-1", "0", "1e99", "nan", ".inf", "null", "true", "[]", "{}", "[[1]]", "../..", "/", "/dev/null", "~", "'",
    '"', "9" * 30, "2**70", "\x00", "é", "\u202e", "a=b", "--", "-", "run", "1-234*7-56", "0,1,0,1", "num_layers=8",
    "num_layers=-3", "hidden_size=128", "operator=stack", "!!python/object:os.system", "*a", "&a", "%",
    "18446744073709551616", "1e-400",
)  # fmt: skip
OPTIONS = (
    "--operator --set --layers --optimizer-state --seed --config --materialize --plan --json --full --tensor --dtype "
    "--verify --tokenizer --weights-only --vocab-size --output --help --overwrite"
).split()
COMMANDS = (
    "train plan grow inspect verify import-hf import-megatron export-hf report prepare-data evaluate sample compare "
    "guideline advise probe"
).split()
WORSE = ('"../../escaped"', '"/etc/passwd"', "1e308", str(2**40))
KEYS = (
    "run.seed run.directory run.timeout_s model.num_layers model.hidden_size model.head_dim model.rope_scaling "
    "parallel.tensor_parallel_size data.train data.train.0.path optimizer.beta1 schedule.learning_rate training.tokens "
    "training.steps stages.grown.growth.layers stages.0.name stages stages.grown.growth growth base logging.wandb "
    "checkpoint.resume x model stages.9.training.steps"
).split()
DATA = "tokenizer.model train.bin train.idx train.json validation.bin validation.idx validation.json".split()


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code (-1: past its limit, below: a signal's number) and what it printed."""

    command: tuple[str, ...]
    code: int
    printed: str
    seconds: float

    def problem(self) -> str | None:
        """What no command may do, whatever it was given."""
        said = f"{' '.join(self.command)[:300]!r} ended with {self.code}: {self.printed[-1500:]}"
        if self.code == -1:
            return f"hang: {said}"
        if self.code not in CODES or "Traceback (most recent call last)" in self.printed:
            return f"traceback or crash: {said}"
        if self.code and not self.printed.strip():
            return f"silent: {said}"
        return None


class Sandbox:
    """A checkpoint, a Hugging Face folder, a run and data to be copied and damaged."""

    def __init__(self, folder: Path, config: Path, run: Path) -> None:
        torch.set_num_threads(1)
        self.folder, self.config = folder / "cases", config
        self.sources, self.marker = folder / "sources", folder / "code_has_run"
        self.cases = 0
        shutil.copytree((run / "latest").resolve(), self.sources / "checkpoint")
        (self.sources / "run" / "checkpoints").mkdir(parents=True)
        shutil.copy(run / "metrics.jsonl", self.sources / "run")
        for checkpoint in sorted((run / "checkpoints").glob("step_*"))[-2:]:
            shutil.copytree(checkpoint, self.sources / "run" / "checkpoints" / checkpoint.name)
        exported = self.command("export-hf", str(self.sources / "checkpoint"), str(self.sources / "hf"))
        assert exported.code == 0, exported.printed
        (self.sources / "data").mkdir()
        for name in DATA:
            shutil.copy(folder / name, self.sources / "data")
        text = config.read_text().replace(str(folder), str(self.sources / "data"))
        (self.sources / "data" / "config.yaml").write_text(text)
        self.exported = _weights(self.sources / "hf")

    def case(self, kind: str) -> tuple[Path, Path]:
        """A copy of one of the sources, and an empty folder for targets beside it."""
        self.cases += 1
        folder = self.folder / str(self.cases)
        shutil.copytree(self.sources / kind, folder / kind)
        (folder / "targets").mkdir()
        return folder / kind, folder / "targets"

    def end(self, victim: Path) -> None:
        """Remove a case."""
        shutil.rmtree(victim.parent, ignore_errors=True)

    def command(self, *arguments: str) -> Ended:
        """Run one command in a child."""
        log = self.sources.with_suffix(".log")
        started = time.monotonic()
        with open(log, "w+b") as output:
            child = os.fork()
            if child == 0:
                _be_the_command(arguments, output.fileno())
            status = None
            while status is None and time.monotonic() - started < LIMIT_S:
                done, code = os.waitpid(child, os.WNOHANG)
                status = code if done else None
                time.sleep(0.002)
            if status is None:
                os.kill(child, 9)
                os.waitpid(child, 0)
            output.seek(0)
            printed = output.read().decode(errors="replace")
        ended = -1 if status is None else os.waitstatus_to_exitcode(status)
        return Ended(arguments, ended, printed, time.monotonic() - started)


def _be_the_command(arguments: tuple[str, ...], output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    code: Any = 99
    warnings.simplefilter("ignore")  # of libraries, which this process has imported in another order than a command
    try:
        code = main(list(arguments))
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            os.sys.stdout.flush()  # type: ignore[attr-defined]
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def digests(folder: Path) -> dict[str, str]:
    """Content of each file below ``folder``, by name; what a link points at is not followed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _weights(folder: Path) -> dict[str, str]:
    """Of a Hugging Face folder; other files of it name their source."""
    return {name: digest for name, digest in digests(folder).items() if name.endswith(".safetensors")}


def bit_flip(sandbox: Sandbox, rng: random.Random) -> tuple[str | None, str]:
    """Flip a bit of a checkpoint's file; what is wrong with how it is met (None: nothing), and how it was met."""
    checkpoint, targets = sandbox.case("checkpoint")
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size]
    file = rng.choice(files)
    position, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)
    where = f"bit {bit} of byte {position} of {file.name}"
    ended = [
        sandbox.command("verify", "--full", str(checkpoint)),
        sandbox.command("grow", str(checkpoint), str(targets / "grown"), "--set", "num_layers=8", "--materialize"),
        sandbox.command("export-hf", str(checkpoint), str(targets / "hf")),
        sandbox.command("sample", str(checkpoint), "We", "--max-tokens", "1"),
    ]
    problems = [text for each in ended if (text := each.problem())]
    if file.name != "manifest.json":  # it holds the sums, and has none itself
        if ended[0].code == 0:
            problems.append("verify --full did not notice")
        if ended[2].code == 0 and _weights(targets / "hf") != sandbox.exported:
            problems.append("export-hf wrote other data without a word")
        if file.suffix == ".distcp":
            problems += [
                f"{name} took it" for name, each in (("grow", ended[1]), ("sample", ended[3])) if each.code == 0
            ]
    for each, name in zip(ended[1:3], ("grown", "hf"), strict=True):
        if each.code and (targets / name).exists():
            problems.append(f"{name} stands there though the command failed")
    sandbox.end(checkpoint)
    return (f"{where}: {'; '.join(problems)}" if problems else None), f"noticed in {file.suffix or file.name}"


class _Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _damages(rng: random.Random, sandbox: Sandbox) -> dict[str, Callable[[Path], None]]:
    def cut(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data) + 1)])

    def junk(path: Path) -> None:
        path.write_bytes(rng.randbytes(rng.randrange(1, 5000)))

    def patched(path: Path) -> None:
        data = bytearray(path.read_bytes() or b"x")
        for _ in range(rng.randint(1, 20)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)

    def rewritten(path: Path) -> None:
        """Words and numbers of a text replaced."""
        words = path.read_bytes().decode(errors="replace").split(" ")
        for _ in range(rng.randint(1, 4)):
            words[rng.randrange(len(words))] = rng.choice(
                [*JUNK, '"../../escaped"', '"/etc/passwd"', "1e308", str(2**40)]
            )
        path.write_text(" ".join(words), errors="replace")

    def folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    return {
        "cut": cut,
        "emptied": lambda path: path.write_bytes(b"") and None,
        "junk": junk,
        "patched": patched,
        "rewritten": rewritten,
        "a folder": folder,
        "a link to itself": loop,
        "removed": lambda path: path.unlink(),
        "nested": lambda path: path.write_text("[" * 200_000) and None,
        "a pickle": lambda path: path.write_bytes(pickle.dumps(_Payload(sandbox.marker))) and None,
        "torch.save": lambda path: torch.save({"a": _Payload(sandbox.marker)}, path.open("wb")),
    }


def hostile_file(sandbox: Sandbox, rng: random.Random) -> tuple[str | None, str]:
    """Damage one file so that it may be taken for a good one; what is wrong with how it is met, and how it was met."""
    kind = rng.choice(["checkpoint", "checkpoint", "run", "hf", "data"])
    victim, targets = sandbox.case(kind)
    file = rng.choice([path for path in sorted(victim.rglob("*")) if path.is_file()])
    name, damage = rng.choice(list(_damages(rng, sandbox).items()))
    damage(file)
    if rng.random() < 0.6:
        _sum_again(file)
    arguments = _command_on(kind, victim, targets, sandbox, rng)
    before = digests(victim)
    kept = {path: digests(path) for path in (sandbox.sources / "checkpoint", sandbox.sources / "hf")}
    ended = sandbox.command(*arguments)
    problems = [text] if (text := ended.problem()) else []
    if sandbox.marker.exists():
        problems.append("CODE HAS RUN")
        sandbox.marker.rmdir()
    after = {key: value for key, value in digests(victim).items() if key in before}
    if (kind != "run" and after != before) or any(digests(path) != value for path, value in kept.items()):
        problems.append("a file outside the target was changed")
    escaped = [path.name for path in (*targets.parent.iterdir(), *sandbox.folder.iterdir()) if "escaped" in path.name]
    if escaped:
        problems.append(f"written outside the target: {escaped}")
    where = f"{file.relative_to(victim.parent)} {name}"
    sandbox.end(victim)
    return (f"{where}: {'; '.join(problems)}" if problems else None), f"{kind}: code {ended.code}"


def _sum_again(file: Path) -> None:
    """Let the manifest beside ``file`` call it whole."""
    manifest = file.parent / "manifest.json"
    with contextlib.suppress(Exception):
        content = json.loads(manifest.read_text())
        data = file.read_bytes()
        content["files"][file.name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if file.name != "manifest.json":
            manifest.write_text(json.dumps(content))


def _command_on(kind: str, victim: Path, targets: Path, sandbox: Sandbox, rng: random.Random) -> list[str]:
    source, target, moved = str(victim), str(targets / "target"), str(targets / "run")
    data = sandbox.sources / "data" / "config.yaml"
    deeper = ["--set", "num_layers=8"]
    if kind == "run":
        resumed = ["train", str(sandbox.config), f"run.directory={source}"]
        choices = [
            resumed,
            ["report", source],
            ["advise", source],
            ["verify", source],
            ["inspect", source],
            ["grow", source, target],
        ]
    elif kind == "hf":
        choices = [
            ["import-hf", source, target],
            ["grow", f"hf:{source}", f"hf:{target}", *deeper],
            ["inspect", source],
        ]
    elif kind == "data":
        config = victim / "config.yaml"
        with contextlib.suppress(OSError, ValueError):
            config.write_text(config.read_text().replace(str(sandbox.sources / "data"), source))
        steps = [f"stages.{stage}.training.steps=1" for stage in ("base", "grown")]
        choices = [
            ["train", str(config), f"run.directory={moved}", f"data.cache_directory={targets / 'cache'}", *steps]
        ]
    else:
        resume = [f"run.directory={moved}", f"checkpoint.resume={source}", "stages.grown.training.steps=1"]
        train = ["train", str(data), *resume]
        grow = ["grow", source, target, *deeper, *rng.choice([["--materialize"], ["--plan"], []])]
        tensor = ["inspect", source, "--tensor", "embedding.word_embeddings.weight"]
        others = [["verify", "--full", source], ["inspect", source], tensor, ["import-megatron", source, target]]
        choices = [train, train, grow, grow, ["export-hf", source, target], *others]
    return rng.choice(choices)


def bad_input(sandbox: Sandbox, rng: random.Random) -> tuple[str | None, str]:
    """A random configuration or command line; what is wrong with how it is met, and how it was met."""
    victim, targets = sandbox.case("data")
    arguments = rng.choice([_edited, _overridden, _random_line])(victim, targets, sandbox, rng)
    ended = sandbox.command(*arguments)
    problem = ended.problem()
    if not problem and ended.code not in (0, 2):
        problem = f"{' '.join(arguments)[:300]!r} ended with {ended.code}, not 2: {ended.printed[-500:]}"
    sandbox.end(victim)
    return problem, f"code {ended.code}"


def _edited(victim: Path, targets: Path, sandbox: Sandbox, rng: random.Random) -> list[str]:
    """``plan`` of a configuration with lines changed."""
    path = victim / "config.yaml"
    lines = path.read_text().splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        change = rng.choice(["value", "value", "drop", "double", "indent", "key", "junk"])
        if change == "value":
            lines[at] = f"{key}{colon} {rng.choice(JUNK)}"
        elif change == "drop":
            del lines[at]
        elif change == "double":
            lines.insert(at, lines[at])
        elif change == "indent":
            lines[at] = " " * rng.randint(0, 6) + lines[at].lstrip()
        elif change == "key":
            lines[at] = lines[at].replace(key.strip(), rng.choice(JUNK) or "z", 1)
        else:
            lines.insert(at, rng.choice(JUNK))
        if not lines:
            break
    path.write_text("\n".join(lines), errors="replace")
    return ["plan", str(path), *rng.choice([[], ["--json"], ["--gpus", rng.choice(JUNK)]])]


def _overridden(victim: Path, targets: Path, sandbox: Sandbox, rng: random.Random) -> list[str]:
    """``plan`` with overrides of random values at random keys."""
    overrides = [f"{rng.choice(KEYS)}={rng.choice(JUNK)}".replace("\x00", "") for _ in range(rng.randint(1, 4))]
    return ["plan", str(victim / "config.yaml"), *overrides]


def _random_line(victim: Path, targets: Path, sandbox: Sandbox, rng: random.Random) -> list[str]:
    """A command with random words, some of which make sense."""
    sensible = ["num_layers=8", f"hf:{sandbox.sources / 'hf'}", f"hf:{targets / 'hf'}"]
    sensible += map(str, (sandbox.sources / "checkpoint", targets / "target", victim / "nowhere" / "at" / "all"))
    sensible += map(str, (victim / "config.yaml", victim / "tokenizer.model"))
    words = [rng.choice([*sensible, *sensible, *JUNK, *OPTIONS]) for _ in range(rng.randint(0, 6))]
    command = rng.choice([*COMMANDS, "grow", "grow", "inspect"])
    if command == "train":
        words = ["--help", *words]  # it would train
    return [command, *(word.replace("\x00", "") for word in words)]
