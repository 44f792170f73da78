"""Real weights, a real tokenizer and real text, from import to export: a layer of SmolLM2 135M.

The model comes from the package index (``tools/fetch_model.py``); where it cannot be had, these tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from growth_megatron.config.schema import DataConfig
from growth_megatron.data.dataset import build_train_dataset
from growth_megatron.errors import EXIT_OK
from growth_megatron.train.metrics import read_metrics
from tests.command_line import Outcome, run_command
from tests.pool import ROOT, TIMEOUT_S, environment
from tests.ranks import run_ranks

LENGTH, BATCH, STEPS = 16, 2, 10
WIDER = ["num_attention_heads=18", "num_query_groups=6", "ffn_hidden_size=3072"]


def _run(*arguments: object) -> Outcome:
    outcome = run_command(*map(str, arguments))
    assert outcome.code == EXIT_OK, outcome.printed
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``real`` as fetched, ``base`` imported, ``grown`` to 2 layers of twice the heads and ffn, ``data`` prepared."""
    path = tmp_path_factory.mktemp("real")
    command = [sys.executable, str(ROOT / "tools" / "fetch_model.py"), str(path / "real"), "--layers", "1"]
    fetched = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S)
    if "could not download" in fetched.stderr:
        pytest.skip(fetched.stderr.strip())
    assert fetched.returncode == 0, fetched.stderr
    _run("import-hf", path / "real", path / "base")
    _run("grow", path / "base", path / "grown", "--operator", "identity+split", "--set", "num_layers=2", *WIDER)
    _run("prepare-data", _text(path), "--tokenizer", path / "grown", "--output", path / "data")
    return path


def _text(path: Path) -> Path:
    text = path / "text.txt"
    text.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return text


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """``tp1`` and ``tp2``: 10 steps from ``grown``, as its train.yaml goes on."""
    settings = [
        f"data.train.0.path={folder / 'data'}", "data.validation_fraction=0", f"model.sequence_length={LENGTH}",
        f"training.global_batch_size={BATCH}", f"training.steps={STEPS}", "training.precision=fp32",
        "logging.interval_steps=1", "schedule.warmup_steps=0", "checkpoint.interval_steps=",
    ]  # fmt: skip
    for ranks in (1, 2):
        overrides = [*settings, f"run.directory={folder / f'tp{ranks}'}", f"parallel.tensor_parallel_size={ranks}"]
        one = {"config": str(folder / "grown" / "train.yaml"), "overrides": overrides}
        assert run_ranks("tests.workers:train_all", ranks, {"runs": [one]})[0] == [EXIT_OK]
    return folder


def _losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]


def test_import_and_export_keep_the_logits_and_the_token_ids(folder: Path) -> None:
    said = _run("export-hf", folder / "base", folder / "base_hf", "--verify").out
    assert "tokenizer: the same ids for 5 of 5 texts" in said
    assert "logits: transformers and this library differ by" in said


def test_the_first_loss_is_that_of_transformers_before_the_growth(runs: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(runs / "real", dtype=torch.float32)
    data = DataConfig.model_validate({"train": [{"path": str(runs / "data")}]})
    seed = yaml.safe_load((runs / "grown" / "train.yaml").read_text())["run"]["seed"]
    stream = build_train_dataset(data, LENGTH, seed, runs / "cache")
    tokens, labels = (
        torch.stack([torch.as_tensor(stream[i][name]) for i in range(BATCH)]) for name in ("tokens", "labels")
    )
    with torch.no_grad():
        logits = model(tokens.long()).logits  # [b, s, vocabulary]
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.long().flatten()))
    assert abs(_losses(runs / "tp1")[0] - expected) <= 1e-5 * expected


def test_two_tensor_parallel_ranks_train_alike(runs: Path) -> None:
    one, two = _losses(runs / "tp1"), _losses(runs / "tp2")
    assert len(one) == len(two) == STEPS
    assert max(abs(a - b) / a for a, b in zip(one, two, strict=True)) <= 1e-5


def test_the_trained_model_is_exported_with_its_tokenizer(runs: Path) -> None:
    said = _run("export-hf", runs / "tp2" / "latest", runs / "trained_hf", "--verify").out
    assert "tokenizer: the same ids for 5 of 5 texts" in said
    assert (runs / "trained_hf" / "tokenizer.json").is_file()


def test_it_is_grown_in_all_widths_and_keeps_its_function(folder: Path) -> None:
    sizes = ["hidden_size=1152", "num_attention_heads=18", "num_query_groups=6", "ffn_hidden_size=3072"]
    _run("grow", f"hf:{folder / 'real'}", f"hf:{folder / 'wide'}", "--operator", "split", "--set", *sizes)
    said = _run("verify", f"hf:{folder / 'wide'}", "--full").out
    assert "logits: differ from the source's by" in said, said
