"""The runs of a probe: each candidate by ``growth-megatron train``, one after the other, and the best gone on with.

Owns: the processes, what is left in the folder, that what is done is not done again.
Does not own: the configurations (``commands.probe_configs``), figures and ranking (``report.probe``).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from growth_megatron.checkpoint.folder.manifest import Manifest
from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.commands.parsing import output_folder
from growth_megatron.commands.probe_configs import ProbeConfig, probe_config, read_candidates
from growth_megatron.config.units import duration
from growth_megatron.errors import EXIT_OK, EXIT_STOPPED_EARLY, ConfigError, GrowthMegatronError
from growth_megatron.report.probe import Candidate, candidate, ranked, render_ranking
from growth_megatron.train.metrics import FILE_NAME, read_metrics
from growth_megatron.train.record_text import geometry

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def probe(
    checkpoint: str, file: Path, steps: int, output: Path | None, ranks: int | None, overrides: Sequence[str]
) -> int:
    """Train the candidates of ``file`` for ``steps`` each, print the ranking; returns an exit code.

    Raises: GrowthMegatronError: a candidate cannot be, before any is trained; or its run failed.
    """
    candidates = read_candidates(file)
    origin = find_origin(checkpoint)
    folder = output or _folder(origin.path, origin.manifest.step)
    configs = [probe_config(name, sections, origin, steps, overrides, folder) for name, sections in candidates.items()]
    output_folder(str(folder), "--output")
    for config in configs:
        _write_config(folder, config.name, config.probe)
    found: list[Candidate] = []
    for number, config in enumerate(configs, 1):
        print(f"candidate {number} of {len(configs)}, {config.name}: ", end="", flush=True)
        came = _candidate(folder, config, origin.manifest, steps, ranks)
        if came is None:
            print(f"stopped; re-run the same command to go on, finished candidates are kept in {folder}")
            return EXIT_STOPPED_EARLY
        found.append(came)
    order = ranked(found)
    best = next(config for config in configs if config.name == order[0].name)
    print("\n" + render_ranking(order, origin.manifest.validation_loss))
    print(_go_on(folder, best, steps, ranks))
    return EXIT_OK


def _folder(checkpoint: Path, step: int) -> Path:
    run = checkpoint.resolve().parent.parent
    return run.with_name(f"{run.name}_probe_{step}")


def _write_config(folder: Path, name: str, text: str) -> None:
    """``DIR/NAME.yaml``, which stays what it is once its run has begun."""
    path = folder / f"{name}.yaml"
    begun = (folder / name).exists()
    if begun and not (path.exists() and path.read_text(encoding="utf-8") == text):
        raise ConfigError(
            f"{folder / name} was begun with other settings than candidate {name} has now (see {path}); give it "
            "another name, or another --output"
        )
    path.write_text(text, encoding="utf-8")


def _candidate(folder: Path, config: ProbeConfig, source: Manifest, steps: int, ranks: int | None) -> Candidate | None:
    """The figures of a candidate, trained unless it was; None if that was stopped early.

    Raises: GrowthMegatronError with the last lines of its log if it failed.
    """
    began = time.monotonic()
    came = _figures(folder, config, source, steps)
    trained = came is None
    if came is None:
        log = folder / f"{config.name}.log"
        code = _train(folder / f"{config.name}.yaml", _ranks(config, ranks), log)
        if code == EXIT_STOPPED_EARLY:
            return None
        came = _figures(folder, config, source, steps)
        if code != EXIT_OK or came is None:
            print("failed", flush=True)
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
            raise GrowthMegatronError(f"candidate {config.name} ended with exit code {code}; {log} ends with\n{tail}")
    took = f"in {duration(time.monotonic() - began)}" if trained else "already done"
    print(f"{came.model}, {steps} steps, loss {came.score:.4f}, {took}", flush=True)
    return came


def _figures(folder: Path, config: ProbeConfig, source: Manifest, steps: int) -> Candidate | None:
    directory = folder / config.name
    if not (directory / FILE_NAME).is_file():
        return None
    model = geometry(config.loaded.config.stages[0].model.model_dump())
    return candidate(config.name, model, read_metrics(directory), source.step, steps, source.validation_loss)


def _train(config: Path, ranks: int, log: Path) -> int:
    """``growth-megatron train`` with its output in ``log``; signals go on to it, so that it saves and ends."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "growth_megatron", "train", str(config)]
    signals: list[int] = []
    with log.open("ab") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:

        def hand_on(number: int, _: FrameType | None) -> None:
            signals.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in _SIGNALS}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return EXIT_STOPPED_EARLY if signals and code != EXIT_OK else code  # torchrun has another code of its own


def _ranks(config: ProbeConfig, asked: int | None) -> int:
    return asked or config.loaded.config.stages[0].parallel.model_parallel_size


def _go_on(folder: Path, best: ProbeConfig, steps: int, asked: int | None) -> str:
    """Write ``DIR/train.yaml``, the whole stage of the best candidate; returns the sentence with its command."""
    path, ranks = folder / "train.yaml", _ranks(best, asked)
    head = f"# The whole stage of {best.name}, whose first {steps} steps are done. Change what you like.\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(head + best.loaded.text, encoding="utf-8")
    beside.replace(path)
    start = "growth-megatron" if ranks == 1 else f"torchrun --nproc-per-node {ranks} -m growth_megatron"
    return f"go on with {best.name} where its probe ended: {start} train {shlex.quote(str(path))}"
