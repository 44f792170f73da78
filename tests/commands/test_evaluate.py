"""``evaluate``: a table, a file of figures, a line in the run's metrics; what is wrong is said with what is right."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from growth_megatron.__main__ import main
from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from growth_megatron.train.metrics import read_metrics
from tests.evaluate.small_tasks import write_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def run(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, and ``tasks`` beside it."""
    folder = tmp_path_factory.mktemp("command")
    checkpoint = folder / "run" / "checkpoints" / "step_00000000"
    checkpoint.parent.mkdir(parents=True)
    assert main(["import-hf", str(small_folder), str(checkpoint)]) == EXIT_OK
    (folder / "run" / "metrics.jsonl").write_text('{"kind": "event", "step": 0, "event": "x", "message": "y"')  # cut
    write_tasks(folder / "tasks")
    return folder / "run"


def test_figures_are_printed_written_and_added_to_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run.parent / "figures.json"
    tasks = ["--tasks", "small_choice, small_word", "--include-path", str(run.parent / "tasks")]
    assert main(["evaluate", str(run), *tasks, "--limit", "4", "--num-fewshot", "1", "--json", str(file)]) == EXIT_OK
    written = json.loads(file.read_text())
    assert (written["limit"], written["num_fewshot"], written["step"]) == (4, 1, 0)
    assert written["n-samples"]["small_word"] == {"original": 9, "effective": 4}
    assert written["n-shot"] == {"small_choice": 1, "small_word": 1}
    printed = capsys.readouterr().out
    accuracy = written["results"]["small_choice"]["acc"]
    assert f"small_choice          4         1  acc (higher is better)  {'':4}  {accuracy:.4f}".split() == next(
        line.split()[:-1] for line in printed.splitlines() if line.startswith("small_choice")
    )
    (record,) = read_metrics(run)
    assert (record["kind"], record["step"], record["limit"]) == ("evaluation", 0, 4)
    assert {"consumed_tokens", "flops", "flops_6nd"} < record.keys()
    assert record["results"] == written["results"]


def test_of_a_hugging_face_folder_nothing_is_added_anywhere(
    run: Path, small_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "metrics.jsonl").read_bytes(), sorted(small_folder.iterdir())
    tasks = ["--tasks", str(run.parent / "tasks" / "small_word.yaml"), "--limit", "0.5"]
    assert main(["evaluate", f"hf:{small_folder}", *tasks]) == EXIT_OK
    in_fp32 = float(capsys.readouterr().out.splitlines()[1].split()[-2])
    assert main(["evaluate", f"hf:{small_folder}", *tasks, "--precision", "bf16"]) == EXIT_OK
    in_bf16 = float(capsys.readouterr().out.splitlines()[1].split()[-2])
    assert in_bf16 == pytest.approx(in_fp32, rel=0.05)
    assert in_bf16 != in_fp32
    assert before == ((run / "metrics.jsonl").read_bytes(), sorted(small_folder.iterdir()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--limit", "0"], "--limit 0 is no number of documents; give a whole number, or a share below 1"),
        (["--limit", "2.5"], "--limit 2.5 is no number"),
        (["--num-fewshot", "-1"], "--num-fewshot -1 is negative"),
        (["--batch-tokens", "0"], "--batch-tokens 0 is not positive"),
        (["--json", "/nowhere/a.json"], "/nowhere is no folder; make it, or name another file"),
        (["--json", "/"], "--json /: it is a folder; name a file"),
        (["--tasks", " ,"], "--tasks names no task"),
        (["--num-fewshot", "50"], "more examples asked for than a task has documents"),
        (["--pp", "2"], "1 ranks do not divide into --tp 1 x --pp 2; give sizes from 1 whose product divides"),
        (["--include-path", "nowhere"], "include path nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    tasks = ["--tasks", "small_word", "--include-path", str(run.parent / "tasks")]
    assert main(["evaluate", str(run), *tasks, *options]) == EXIT_USAGE
    assert words in capsys.readouterr().err
    assert len(read_metrics(run)) == 1, "a record of no figures"


def test_a_layout_that_does_not_divide_the_model_names_what_does(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from growth_megatron.parallel import collectives

    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    tasks = ["--tasks", "small_word", "--include-path", str(run.parent / "tasks")]
    assert main(["evaluate", str(run), *tasks, "--tp", "3"]) == EXIT_USAGE
    assert "--tp 3 --pp 1: 3 does not divide num_attention_heads 4" in capsys.readouterr().err


def test_without_lm_eval_its_installation_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert main(["evaluate", str(run), "--tasks", "arc_easy"]) == EXIT_USAGE
    assert "evaluate needs the package lm-eval: pip install 'growth-megatron[eval]'" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_says_so_and_takes_one(
    small_folder: Path, tmp_path: Path, prepared_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in small_folder.iterdir():
        if not file.name.startswith(("tokenizer", "special")):
            (bare / file.name).write_bytes(file.read_bytes())
    assert main(["sample", str(bare), "growth"]) == EXIT_USAGE
    assert "has no tokenizer.json or tokenizer.model" in capsys.readouterr().err
    tokenizer = str(prepared_corpus / "tokenizer.model")
    assert main(["sample", str(bare), "growth", "--max-tokens", "2", "--tokenizer", tokenizer]) == EXIT_OK
