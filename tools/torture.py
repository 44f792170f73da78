"""Tries to break runs, checkpoints and command lines at random, and says what broke. Bounded, and the same for a seed.

    python tools/torture.py --seconds 300                        some of everything; what CI runs
    python tools/torture.py --kills 100 --layouts 50 --flips 140 --hostile 360 --inputs 600 --disks 4
    python tools/torture.py --kills 20 --seed 7 --output torture.json

    kills     launch/torchrun.sh, killed (all of it, one rank, or the launcher) at a random moment, started again until
              the run is done: losses and gradient norms bitwise those of the uninterrupted run, one record of growth
    layouts   a growing run at two random layouts of up to four ranks: the losses of a single process within 1e-5
    flips     a bit of a checkpoint or Hugging Face folder flipped: `verify --full`, `grow` and `export-hf` notice
    hostile   a file cut, emptied, replaced by junk, a bomb or a pickle that runs code: a message, and no code has run
    inputs    configurations and command lines of random words: a message with exit code 2, or it works
    disks     a file system that fills up while a run saves or a command writes: a message, nothing lost, resumable

Everything happens in a temporary folder; no file outside a command's target may change. The exit code is 1 if anything
broke, and the folder is kept then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

# Run as a script, so this folder is on the path.
from torture_files import Sandbox, bad_input, bit_flip, hostile_file  # type: ignore[import-not-found]

from growth_megatron.config.tables import columns

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 300.0  # of one start of a run, on a busy machine
KINDS = ("kills", "layouts", "flips", "hostile", "inputs", "disks")
MOMENTS = ("at once", "while it trains", "while it saves", "while it grows")


@dataclass
class Tally:
    """What came of one kind."""

    kind: str
    tried: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def note(self, outcome: str) -> None:
        """Count an outcome that is as it should be."""
        self.seen[outcome] = self.seen.get(outcome, 0) + 1


class Torture:
    """The reference run, and what is done to its like."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.config = prepare(folder)
        self.expected: dict[int, dict[int, tuple[float, float]]] = {}
        for ranks in (1, 2):
            run = folder / f"reference_{ranks}"
            code, output = self.run_to_end(run, ranks)
            if code:
                raise SystemExit(f"the uninterrupted run on {ranks} ranks ended with {code}:\n{output}")
            self.expected[ranks] = records(run)
        self.sandbox = Sandbox(folder, self.config, folder / "reference_1")

    def start(self, run: Path, ranks: int = 1, *overrides: str) -> subprocess.Popen[str]:
        """``launch/torchrun.sh`` of ``run``, in a session of its own, its output in RUN.log."""
        command = ["bash", str(ROOT / "launch" / "torchrun.sh"), "-n", str(ranks), str(self.config)]
        with open(run.with_suffix(".log"), "a") as log:
            return subprocess.Popen(
                [*command, f"run.directory={run}", *overrides], cwd=ROOT, stdout=log, stderr=log, text=True,
                env={"GROWTH_MEGATRON_VENV": sys.prefix, **os.environ},
                start_new_session=True,
            )  # fmt: skip

    def run_to_end(self, run: Path, ranks: int = 1, *overrides: str) -> tuple[int, str]:
        """Exit code (-1: past its limit) and the end of the output."""
        process = self.start(run, ranks, *overrides)
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = -1
            for each in tree(process):
                each.kill()
        return code, run.with_suffix(".log").read_text()[-4000:]

    def kills(self, tally: Tally) -> None:
        """One run, killed up to eight times and then left alone; counts kills."""
        run, ranks = self.folder / f"killed_{tally.tried}", self.rng.choice([1, 2])
        overrides = [f"checkpoint.async_save={self.rng.choice(['true', 'false'])}"]
        for _ in range(self.rng.randint(2, 8)):
            done = self._kill(run, ranks, overrides, tally)
            if done:
                break
        code, output = self.run_to_end(run, ranks, *overrides)
        problem = f"ended with {code}: {output}" if code else difference(self.expected[ranks], records(run))
        left = [path.name for path in (run / "checkpoints").glob(".*") if not path.name.startswith(".lock")]
        if not problem and left:
            problem = f"left behind: {left}"
        self._judge(tally, run, problem, "the uninterrupted run")

    def _kill(self, run: Path, ranks: int, overrides: list[str], tally: Tally) -> bool:
        """Start and kill once; whether the run was done before that."""
        moment, victim = self.rng.choice(MOMENTS), self.rng.choice(["all", "all", "a rank", "the launcher"])
        process = self.start(run, ranks, *overrides)
        deadline = time.monotonic() + LIMIT_S
        while process.poll() is None and time.monotonic() < deadline and not reached(run, moment):
            time.sleep(0.002)
        time.sleep(self.rng.uniform(0, 0.5 if moment == "while it trains" else 0.05))
        if process.poll() is not None:
            return process.returncode == 0
        everyone = tree(process)
        workers = [each for each in everyone if is_rank(each)]
        victims = {
            "all": everyone,
            "the launcher": everyone[:1],
            "a rank": self.rng.sample(workers, min(1, len(workers))),
        }
        for each in victims[victim] or everyone:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        tally.tried += 1
        tally.note(f"{victim}, {moment}")
        _, alive = psutil.wait_procs(everyone, timeout=90)
        if alive:
            tally.faults.append(f"{run}: {len(alive)} processes live on 90 s after {victim} was killed {moment}")
            for each in alive:
                each.kill()
        return False

    def layouts(self, tally: Tally) -> None:
        """A growing run at random layouts."""
        run = self.folder / f"layout_{tally.tried}"
        stages = [random_layout(self.rng, layers) for layers in (2, 4)]
        ranks, overrides = max(world for _, world in stages), []
        for (layout, world), name in zip(stages, ("base", "grown"), strict=True):
            size = layout["tensor_parallel_size"] * layout["pipeline_parallel_size"]
            written = json.dumps({**layout, "data_parallel_size": world // size})
            overrides.append(f"stages.{name}.parallel={written}")
        tally.tried += 1
        # A launch at the first stage's size; the launcher goes on at the next stage's where the node was given as many.
        code, output = self.run_to_end(run, stages[0][1], *overrides)
        if code == 76:
            code, output = self.run_to_end(run, ranks, *overrides)
        problem = f"ended with {code}: {output}" if code else difference(self.expected[1], records(run), within=1e-5)
        self._judge(tally, run, problem and f"{stages}: {problem}", "the losses of a single process")

    def disks(self, tally: Tally) -> None:
        """A run on a file system of its own that is too small, then larger."""
        disk = self.folder / f"disk_{tally.tried}"
        disk.mkdir()
        tally.tried += 1
        kilobytes = self.rng.randint(300, 4000)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
        if subprocess.run(mount, check=False, capture_output=True).returncode:
            tally.note("not tried: no right to mount")
            return
        run = disk / "run"
        overrides = [
            f"checkpoint.async_save={self.rng.choice(['true', 'false'])}",
            f"data.cache_directory={self.folder}/cache",
        ]
        try:
            code, output = self.run_to_end(run, 1, *overrides)
            problem = None
            if "Traceback" in output or code not in (0, 1, 2, 77):
                problem = f"with {kilobytes} KiB it ended with {code}: {output}"
            tally.note(f"ended with {code}")
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again, output = self.run_to_end(run, 1, *overrides)
            problem = problem or (f"with room it ended with {again}: {output}" if again else None)
            problem = problem or difference(self.expected[1], records(run))
            self._judge(tally, self.folder / "nothing", problem, "the uninterrupted run, once there was room")
        finally:
            subprocess.run(["umount", str(disk)], check=False)

    def flips(self, tally: Tally) -> None:
        """A flipped bit."""
        self._files(tally, bit_flip)

    def hostile(self, tally: Tally) -> None:
        """A hostile file."""
        self._files(tally, hostile_file)

    def inputs(self, tally: Tally) -> None:
        """A bad configuration or command line."""
        self._files(tally, bad_input)

    def _files(self, tally: Tally, attack: Callable[[Sandbox, random.Random], tuple[str | None, str]]) -> None:
        problem, seen = attack(self.sandbox, self.rng)
        tally.tried += 1
        if problem:
            tally.faults.append(problem)
        else:
            tally.note(seen)

    def _judge(self, tally: Tally, run: Path, problem: str | None, seen: str) -> None:
        if problem:
            tally.faults.append(f"{run}: {problem}")
        else:
            tally.note(seen)
            shutil.rmtree(run, ignore_errors=True)


def prepare(folder: Path) -> Path:
    """A corpus and the configuration of a run of seconds that grows once."""
    rng = random.Random(5)
    words = "growth of a small model into one that is larger keeps what it has learned".split()  # noqa: SIM905
    for name, documents in (("train", 60), ("validation", 6)):
        (folder / f"text_{name}").mkdir()
        for number in range(documents):
            text = " ".join(rng.choice(words) + rng.choice(["", "s", "ed"]) for _ in range(200))
            (folder / f"text_{name}" / f"{number}.txt").write_text(text)
    command = [sys.executable, "-m", "growth_megatron"]
    tokenizer = ["train-tokenizer", folder / "text_train", "--output", folder / "tokenizer.model", "--vocab-size", 300]
    subprocess.run([*command, *map(str, tokenizer)], cwd=ROOT, check=True, capture_output=True)
    for name in ("train", "validation"):
        data = [
            "prepare-data",
            folder / f"text_{name}",
            "--output",
            folder / name,
            "--tokenizer",
            folder / "tokenizer.model",
        ]
        subprocess.run([*command, *map(str, data)], cwd=ROOT, check=True, capture_output=True)
    model = {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4, "ffn_hidden_size": 96}
    grown = {"operator": "stack", "optimizer_state": "carry"}
    content = {
        "run": {"directory": "unused", "seed": 3, "timeout_s": 120},
        "model": {**model, "vocab_size": 300, "sequence_length": 32},
        "data": {
            "tokenizer": str(folder / "tokenizer.model"),
            "train": [{"path": str(folder / "train")}],
            "validation": [{"path": str(folder / "validation")}],
            "cache_directory": str(folder / "cache"),
        },
        "schedule": {"learning_rate": 0.003, "warmup_steps": 2},
        "training": {"global_batch_size": 8, "micro_batch_size": 1, "precision": "fp32"},
        "evaluation": {"samples": 8},
        "checkpoint": {"interval_steps": 4, "keep_last": 3},
        "logging": {"interval_steps": 1},
        "stages": [
            {"name": "base", "model": {"num_layers": 2}, "training": {"steps": 30}},
            {"name": "grown", "model": {"num_layers": 4}, "training": {"steps": 20}, "growth": grown},
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def records(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step; growths as step -1 with their number."""
    found: dict[int, tuple[float, float]] = {}
    growths = 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        growths += record["kind"] == "growth"
        if record["kind"] == "train":
            if record["step"] in found:
                found[-2] = (record["step"], 0)  # twice: to be seen as a difference
            found[record["step"]] = (record["loss"], record["grad_norm"])
    return {**found, -1: (growths, 0)}


def difference(
    expected: dict[int, tuple[float, float]], got: dict[int, tuple[float, float]], within: float | None = None
) -> str | None:
    """How ``got`` differs: in any bit, or in a loss by more than ``within`` nats."""
    if expected.keys() != got.keys():
        return f"other steps: {sorted(expected.keys() ^ got.keys())}"

    def is_other(step: int) -> bool:
        return expected[step] != got[step] if within is None else abs(expected[step][0] - got[step][0]) > within

    wrong = [step for step in expected if is_other(step)]
    if not wrong:
        return None
    pairs = [(expected[step], got[step]) for step in wrong[:2]]
    return f"other losses or gradient norms at steps {wrong[:5]}: {pairs}"


def reached(run: Path, moment: str) -> bool:
    """Whether the run is at the moment at which it is to be killed."""
    if moment == "at once":
        return True
    if moment == "while it trains":
        return (run / "metrics.jsonl").exists()
    pattern = ".tmp_*_grown" if moment == "while it grows" else ".tmp_*"
    return next((run / "checkpoints").glob(pattern), None) is not None


def tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process and all below it, itself first."""
    try:
        top = psutil.Process(process.pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def is_rank(process: psutil.Process) -> bool:
    """Whether it is a rank of the run."""
    try:
        return process.environ().get("RANK") is not None and "growth_megatron" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def random_layout(rng: random.Random, layers: int) -> tuple[dict[str, Any], int]:
    """A layout of up to four ranks for a model of ``layers`` layers, and its world size."""
    world = rng.choice([1, 2, 2, 4])
    tensor = rng.choice([size for size in (1, 2, 4) if world % size == 0])
    pipeline = rng.choice([size for size in (1, 2, 4) if world // tensor % size == 0 and layers % size == 0])
    layout: dict[str, Any] = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    if tensor > 1:
        layout["sequence_parallel"] = rng.random() < 0.5
    if pipeline > 1 and layers % (2 * pipeline) == 0 and rng.random() < 0.5:
        layout["virtual_pipeline_parallel_size"] = 2
    return layout, world


def table(tallies: list[Tally]) -> list[str]:
    """What was tried and what came of it."""
    rows = [("kind", "tried", "broke", "seconds", "as it should be")]
    for t in tallies:
        seen = ", ".join(f"{count} {name}" for name, count in sorted(t.seen.items(), key=lambda item: -item[1])[:6])
        rows.append((t.kind, str(t.tried), str(len(t.faults)), f"{t.seconds:.0f}", seen))
    return columns(rows, right=[1, 2, 3])


def torture(options: argparse.Namespace, folder: Path) -> list[Tally]:
    """Each kind in turn, until its number or its share of the time is reached."""
    rng = random.Random(options.seed)
    work = Torture(folder, rng)
    shares = {"kills": 0.4, "layouts": 0.2, "flips": 0.1, "hostile": 0.15, "inputs": 0.1, "disks": 0.05}
    tallies = []
    for kind in KINDS:
        wanted, tally, started = getattr(options, kind), Tally(kind), time.monotonic()
        limit_s = shares[kind] * options.seconds if options.seconds else float("inf")
        while (wanted is None or tally.tried < wanted) and time.monotonic() - started < limit_s:
            try:
                getattr(work, kind)(tally)
            except Exception as error:  # a fault of this program, or of what it looks at: both are to be seen
                tally.faults.append(f"{type(error).__name__}: {error}")
                tally.tried += 1
            if sys.stderr.isatty():
                print(f"{kind} {tally.tried}: {len(tally.faults)} broke", end="\r", file=sys.stderr, flush=True)
        tally.seconds = time.monotonic() - started
        tallies.append(tally)
        print(*table([tally])[1:], *tally.faults, sep="\n", flush=True)
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, metavar="N")
    parser.add_argument("--seconds", type=float, metavar="S", help="in all, shared among the kinds")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--output", metavar="FILE.json", help="the figures and faults")
    options = parser.parse_args()
    if options.seconds is None:
        for kind in KINDS:
            setattr(options, kind, getattr(options, kind) or 0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="growth_megatron_torture_"))
    tallies = torture(options, folder)
    print("", *table(tallies), sep="\n")
    if options.output:
        figures = {"seed": options.seed, "kinds": [asdict(tally) for tally in tallies]}
        Path(options.output).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if any(tally.faults for tally in tallies):
        print(f"kept: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
