"""Train what ``experiments.py`` lists and write what came of it: does growth pay, at a size that two cores can train?

    python tools/experiments/run.py [tuning|nine_way|ablations|longer|all] --output DIR [--workers 2] [--dry-run]

Fetches text and prepares data below DIR where they are not there yet, tunes learning rates first, and starts each run
as ``growth-megatron train``: DIR/configs/NAME.yaml, DIR/runs/NAME, DIR/logs/NAME.log. What is finished is skipped, what
was interrupted goes on: give the same command again. After each run DIR/results.json, results.md and the pictures
results.png, comparison.png and comparison_longer.png say all that is known by then.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import experiments  # type: ignore[import-not-found]
import results  # type: ignore[import-not-found]
import yaml
from experiments import COMMON, RATES, TUNING_SEED, Experiment, Plan, Tuned

from growth_megatron.errors import ConfigError, GrowthMegatronError
from growth_megatron.parallel.file_lock import locked

HERE = Path(__file__).resolve().parent
PHASES = ("tuning", "nine_way", "ablations", "longer", "all")
TRAINED_ON = ("speeches", "anarchism", "postgresql", "python")
VOCABULARY = yaml.safe_load(COMMON.read_text(encoding="utf-8"))["model"]["vocab_size"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CLI = ("nice", "-n", "19", sys.executable, "-m", "growth_megatron")


def prepare(output: Path) -> None:
    """Text, tokenizer and ``.bin`` files below ``output``; what is there is left alone."""
    text, data = output / "text", output / "data"
    subprocess.run([sys.executable, str(HERE / "fetch_text.py"), str(text)], check=True)
    data.mkdir(exist_ok=True)
    tokenizer = data / "tokenizer.model"
    if not tokenizer.is_file():
        folders = [str(text / name / "train") for name in TRAINED_ON]
        command = ["train-tokenizer", *folders, "--output", str(tokenizer), "--vocab-size", str(VOCABULARY)]
        subprocess.run([*CLI, *command], check=True)
    parts = [(text / name / "train", data / name) for name in TRAINED_ON]
    parts += [(text / name / "validation", data / f"{name}_validation") for name in (*TRAINED_ON, "git")]
    for folder, prefix in parts:
        if not prefix.with_name(prefix.name + ".idx").is_file():
            command = ["prepare-data", str(folder), "--tokenizer", str(tokenizer), "--output", str(prefix)]
            subprocess.run([*CLI, *command], check=True)


def write_config(run: Experiment, output: Path) -> Path:
    """The run's YAML, over a copy of ``common.yaml``; ends the program if it was begun with another one."""
    folder = output / "configs"
    folder.mkdir(exist_ok=True)
    path = folder / f"{run.name}.yaml"
    text = yaml.safe_dump({"base": COMMON.name, **run.content}, sort_keys=False, width=120)
    for file, content in ((folder / COMMON.name, COMMON.read_text(encoding="utf-8")), (path, text)):
        if not file.is_file():
            results.write_text(file, content)
        elif file.read_text(encoding="utf-8") != content:
            sys.exit(f"{file} differs from what this program would run now; give another --output")
    return path


@dataclass
class Job:
    """A run in progress: the process of its present command, then the commands that follow."""

    run: Experiment
    process: subprocess.Popen[bytes]
    later: list[list[str]]


@dataclass
class Crew:
    """Starts the runs it is given, in their order, as far as those that they need are finished."""

    output: Path
    workers: int
    jobs: list[Job] = field(default_factory=list)
    stopping: bool = False

    def work(self, runs: Sequence[Experiment]) -> bool:
        """Until all ``runs`` are finished; False if one failed or a signal came."""
        waiting = [run for run in runs if not results.is_finished(self.output, run)]
        for run in runs:  # finished ones too, before any is started: it may end the program
            write_config(run, self.output)
        failed, began = set[str](), time.monotonic()
        left = total = sum(results.steps_of(run) for run in waiting)
        while self.jobs or (waiting and not self.stopping):
            for run in [run for run in waiting if failed.intersection(run.needs)]:
                print(f"{run.name} is left out: it needs {', '.join(run.needs)}", flush=True)
                failed.add(run.name)
                waiting.remove(run)
            ready = [run for run in waiting if all(results.is_recorded(self.output, need) for need in run.needs)]
            for run in ready[: 0 if self.stopping else self.workers - len(self.jobs)]:
                waiting.remove(run)
                self._start(run)
            for job in self._ended():
                if self.stopping or not self._is_over(job):
                    continue
                if not self._record(job):
                    failed.add(job.run.name)
                left -= results.steps_of(job.run)
                hours = (time.monotonic() - began) * left / max(total - left, 1) / 3600
                done = sum(results.is_finished(self.output, run) for run in runs)
                print(f"{job.run.name}: done {done} of {len(runs)}, about {hours:.1f} h left", flush=True)
            time.sleep(0.5)
        return not failed and not self.stopping

    def stop(self, *_: object) -> None:
        """Has every run save and end; they go on where they were next time."""
        self.stopping = True
        for job in self.jobs:
            job.process.send_signal(signal.SIGTERM)

    def _start(self, run: Experiment) -> None:
        commands = [[*CLI, "train", f"configs/{run.name}.yaml"]]
        if run.before:
            commands.insert(0, _script(*run.before))
        if run.is_compared:
            commands.append(_script("held_out.py", f"runs/{run.name}"))
        self.jobs.append(Job(run, self._open(run, commands[0]), commands[1:]))

    def _open(self, run: Experiment, command: list[str]) -> subprocess.Popen[bytes]:
        self._log(run).parent.mkdir(exist_ok=True)
        with self._log(run).open("ab") as log:
            return subprocess.Popen(command, cwd=self.output, env=ENVIRONMENT, stdout=log, stderr=log)

    def _ended(self) -> list[Job]:
        ended = [job for job in self.jobs if job.process.poll() is not None]
        self.jobs = [job for job in self.jobs if job not in ended]
        return ended

    def _is_over(self, job: Job) -> bool:
        """Whether nothing of ``job`` follows; else it goes on."""
        if job.process.returncode or not job.later:
            return True
        self.jobs.append(Job(job.run, self._open(job.run, job.later[0]), job.later[1:]))
        return False

    def _record(self, job: Job) -> bool:
        """Whether it ended well; then its figures are written down."""
        if job.process.returncode:
            print(f"{job.run.name} ended with {job.process.returncode}; see {self._log(job.run)}", flush=True)
            return False
        results.record(self.output, job.run)
        results.write(self.output)
        return True

    def _log(self, run: Experiment) -> Path:
        return self.output / "logs" / f"{run.name}.log"


def _script(name: str, *arguments: str) -> list[str]:
    """The command of a script of this folder."""
    return ["nice", "-n", "19", sys.executable, str(HERE / name), *arguments]


def of_phase(phase: str, tuned: Tuned) -> list[Experiment]:
    """The runs after tuning at the plain budget; none twice."""
    chosen: list[Experiment] = []
    if phase in ("nine_way", "all"):
        chosen += experiments.nine_way(tuned)
    if phase in ("ablations", "all"):
        for seed in experiments.SEEDS:
            chosen += experiments.nine_way_bases(tuned, seed).values()
        chosen += experiments.ablations(tuned)
    return list({run.name: run for run in chosen}.values())


def tune(crew: Crew) -> Tuned | None:
    """Rates of the bases, then rate and warm-up of scratch, depth and width; None if a run failed.

    The latter step by step on their grid, until no neighbour is better.
    """
    if not crew.work(list(experiments.tuning_bases())):
        return None
    tuned: Tuned = experiments.untuned()
    bases = {}
    for kind in tuned.bases:
        bases[kind] = results.lowest(
            crew.output, {rate: experiments.base_run(kind, TUNING_SEED, rate) for rate in RATES}
        )
    plans = descended(crew, tuned.plans, lambda at: neighbouring(at, bases))
    return None if plans is None else Tuned(bases, plans)


Candidates = dict[str, dict[Plan, Experiment]]


def descended(
    crew: Crew, at: Mapping[str, Plan], near: Callable[[Mapping[str, Plan]], Candidates]
) -> Mapping[str, Plan] | None:
    """The plans reached from ``at`` by going to the best of those ``near`` until none is better; None: a run failed."""
    before: Mapping[str, Plan] | None = None
    while at != before:
        tried = near(at)
        if not crew.work([run for runs in tried.values() for run in runs.values()]):
            return None
        at, before = {kind: results.lowest(crew.output, runs) for kind, runs in tried.items()}, at
    return at


def near_longer(at: Mapping[str, Plan]) -> Candidates:
    """The runs of scratch at the longer budget that are near its plan."""
    return {"scratch": {plan: experiments.longer_tuning_run(plan) for plan in experiments.neighbours(at["scratch"])}}


def neighbouring(at: Mapping[str, Plan], bases: Mapping[str, float]) -> Candidates:
    """Of each kind the runs of its plan and of that plan's neighbours."""
    return {
        kind: {near: experiments.tuning_run(kind, near, bases) for near in experiments.neighbours(plan)}
        for kind, plan in at.items()
    }


def first_tuning(tuned: Tuned) -> list[Experiment]:
    """The runs of tuning that are known before any has ended, with ``tuned``'s rates of bases."""
    near = neighbouring(experiments.untuned().plans, tuned.bases)
    return [*experiments.tuning_bases(), *(run for runs in near.values() for run in runs.values())]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", nargs="?", default="all", choices=PHASES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time, one core each; default: 2")
    parser.add_argument("--dry-run", action="store_true", help="list the runs; nothing is fetched, written or started")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    if options.workers < 1:
        parser.error(f"--workers {options.workers} trains nothing; give 1 or more")
    if options.dry_run:
        untuned = experiments.untuned()
        runs = [*first_tuning(untuned), *of_phase(options.phase, untuned)]
        if options.phase in ("longer", "all"):
            runs += [*near_longer(untuned.plans)["scratch"].values()]
            runs += experiments.longer(untuned, untuned.plans["scratch"])
        for run in runs:
            state = "finished" if results.is_finished(output, run) else "to do"
            print(
                f"{run.name:44} {state:9} {results.steps_of(run):5.0f} steps' worth, from {', '.join(run.needs) or '-'}"
            )
        return 0
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(
            output / "lock", ConfigError(f"another process works in {output}; stop it, or give another --output")
        ):
            prepare(output)
            return work(output, options.phase, options.workers)
    except GrowthMegatronError as error:
        sys.exit(str(error))


def work(output: Path, phase: str, workers: int) -> int:
    """Tuning, then the runs of ``phase``; the exit code."""
    crew = Crew(output, workers)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, crew.stop)
    tuned = tune(crew)
    if tuned is None:
        return 1
    print(f"tuned: {tuned}", flush=True)
    complete = crew.work(of_phase(phase, tuned))
    if phase in ("longer", "all"):
        plans = descended(crew, {"scratch": experiments.untuned().plans["scratch"]}, near_longer)
        if plans is None:
            return 1
        print(f"tuned for the longer runs: {plans['scratch']}", flush=True)
        complete = crew.work(list(experiments.longer(tuned, plans["scratch"]))) and complete
    results.write(output)
    print(f"results: {output / 'results.json'}, results.md, results.png, comparison.png, comparison_longer.png")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
