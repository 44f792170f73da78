"""What a run is advised: near, before and behind what is published, and outside of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from growth_megatron.report.advice import Advice, advise
from growth_megatron.report.advice_text import own_curve
from growth_megatron.report.curves import summarise
from growth_megatron.report.joined import joined_records
from tests.command_line import run_command
from tests.conftest import VALID
from tests.report.test_power_law import law

BASE = {"num_layers": 6, "hidden_size": 2048, "num_attention_heads": 32, "ffn_hidden_size": 5632, "vocab_size": 32000}
"""Of the paper's 1.1B: grown by 4 it has 24 layers and 1364M parameters."""


def _run(folder: Path, tokens: float, model: dict[str, int] | None = None, rates: tuple[float, float] = (1, 1)) -> Path:
    """40 records of stage ``main`` up to ``tokens``, with a configuration; the rate goes from one to the other."""
    content = yaml.safe_load(VALID)
    content["model"] = {**(model or BASE), "sequence_length": 2048}
    content["stages"] = [{"name": "main"}]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    loss = law(0.0, -0.2)
    records = []
    for number in range(1, 41):
        seen = int(tokens * number / 40)
        records.append(
            {
                "kind": "train", "step": 100 * number, "stage": "main", "stage_step": 100 * number,
                "consumed_tokens": seen, "flops": 2.5e9 * seen, "loss": loss(2.5e9 * seen),
                "learning_rate": 1e-3 * (rates[0] if number < 35 else rates[1]), "tokens_per_s": 1.0,
            }
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _advice(run: Path, **options: Any) -> Advice:
    records = joined_records(run)
    return advise(summarise(run, records), records, **options)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (1e9, "train on to 12.8B tokens (11.8B, 47,"),
        (8e9, "grow now, by 4"),
        (40e9, "and expect less: 40.0B tokens are 3.1 times"),
    ],
)
def test_a_base_is_told_how_far_it_is_from_the_fits_tokens(tmp_path: Path, tokens: float, words: str) -> None:
    found = _advice(_run(tmp_path, tokens), tokens=1e11)
    assert found.grow is True
    assert words in found.verdict
    assert (found.factor, found.target.num_layers) == (4, 24)
    assert found.statements[0].inside
    assert "49.1%" in found.saving


def test_a_budget_that_is_spent_or_a_growth_behind_it_says_do_not_grow(tmp_path: Path) -> None:
    run = _run(tmp_path, 40e9)
    assert _advice(run, tokens=40e9).verdict.startswith("do not grow: the 40.0B tokens")
    growth = {"kind": "growth", "step": 2000, "operator": "stack", "source_geometry": BASE, "target_geometry": BASE}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(growth) + "\n")
    found = _advice(run)
    assert found.grow is False
    assert "do not grow again: it grew at step 2,000" in found.verdict


def test_where_nothing_is_published_there_is_no_figure_but_a_command(tmp_path: Path) -> None:
    found = _advice(_run(tmp_path, 1e6, {**BASE, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}))
    assert found.grow is None
    assert "growth-megatron probe" in found.verdict
    assert found.factor == 2
    assert "none is published" in found.saving
    assert not found.statements[0].inside
    assert "times below" in found.statements[0].this_run


def test_a_base_that_was_annealed_is_sent_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    run = _run(tmp_path, 8e9, rates=(1.0, 0.2))
    for step in (3000, 3400, 3500, 4000):
        (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (reason,) = [text for text in _advice(run, tokens=2.5e10).reasons if "learning rate" in text]
    assert "down to 20% of the peak" in reason
    assert "step_00003400 is from before that" in reason
    assert not [text for text in _advice(_run(tmp_path, 8e9), tokens=2.5e10).reasons if "learning rate" in text]


@pytest.mark.parametrize(("level", "answer"), [(0.9, "yes"), (1.1, "not yet")])
def test_a_grown_run_is_held_against_the_law_of_its_base(tmp_path: Path, level: float, answer: str) -> None:
    run = _run(tmp_path, 8e9)
    records = joined_records(run)
    last, grown = records[-1], []
    for number in range(1, 21):
        flops = last["flops"] * (1 + number / 10)
        grown.append(
            last
            | {"stage": "grown", "step": 4000 + number, "stage_step": number, "flops": flops,
               "loss": level * law(0.0, -0.2)(flops), "consumed_tokens": last["consumed_tokens"] + number}
        )  # fmt: skip
    growth = {"kind": "growth", "step": 4000, "operator": "stack", "source_geometry": BASE, "target_geometry": BASE}
    records = [*records, growth, *grown]
    assert f"has the growth paid? {answer}:" in own_curve(summarise(run, records), records)[-1]


def test_the_command_says_it_all_and_refuses_what_is_no_number(tmp_path: Path) -> None:
    run = _run(tmp_path, 8e9)
    said = run_command("advise", str(run), "--tokens", "1e11")
    assert said.code == 0, said.printed
    for words in (
        "advice: grow now",
        "arXiv 2510.06548",
        "constants are not included",
        "own curve: training loss",
        "b = -0.2",
    ):
        assert words in said.out
    for wrong in (["--tokens", "-1"], ["--tokens", "nan"], ["--factor", "1"], ["--factor", "1000000"]):
        assert run_command("advise", str(run), *wrong).code == 2
