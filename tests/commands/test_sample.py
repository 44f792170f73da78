"""``sample``: greedy text is that of transformers, at any layout; what cannot be is said with what can."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from growth_megatron.__main__ import main
from growth_megatron.commands.sample import BETWEEN
from growth_megatron.errors import EXIT_OK, EXIT_USAGE
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")
PROMPTS = ["growth of", "a small model into one that", "model"]
GREEDY = ["--temperature", "0", "--max-tokens", "20"]


def expected(folder: Path) -> list[str]:
    """What transformers writes, prompt by prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        found = model.generate(ids, max_new_tokens=20, do_sample=False)[0]
        texts.append(tokenizer.decode(found, skip_special_tokens=True))
    return texts


def test_greedy_text_is_that_of_transformers_at_any_layout(
    small_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = f"\n{BETWEEN}\n".join(expected(small_folder)) + "\n"
    sample = ["sample", str(small_folder), *PROMPTS, *GREEDY]
    capsys.readouterr()
    assert main(sample) == EXIT_OK
    assert capsys.readouterr().out == wanted
    layouts = [["--tp", "2"], ["--pp", "2"], []]
    drawn = ["sample", str(small_folder), "growth", "--seed", "3", "--max-tokens", "8"]
    commands = [[*sample, *layout] for layout in layouts] + [[*drawn, *layout] for layout in layouts]
    outcomes = run_ranks("tests.workers:run_mains", 2, {"commands": commands})
    assert [printed.endswith(wanted) for _, printed in outcomes[0][:3]] == [True] * 3, outcomes[0]
    assert not any("growth" in printed for _, printed in outcomes[1]), "more than one rank tells"
    assert len({printed[printed.index("growth") :] for _, printed in outcomes[0][3:]}) == 1, (
        "the layouts draw differently"
    )


def test_lines_of_standard_input_are_prompts(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("growth of\nmodel\n"))
    assert main(["sample", str(small_folder), *GREEDY]) == EXIT_OK
    from_lines = capsys.readouterr().out
    assert main(["sample", str(small_folder), "growth of", "model", *GREEDY]) == EXIT_OK
    assert capsys.readouterr().out == from_lines
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["sample", str(small_folder)]) == EXIT_USAGE
    assert '"" as PROMPT begins a document' in capsys.readouterr().err
    for encoding, errors in (("utf-8", "strict"), ("ascii", "surrogateescape")):  # as Python opens it by locale
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe bad"), encoding, errors))
        assert main(["sample", str(small_folder)]) == EXIT_USAGE
        assert "standard input is not UTF-8" in capsys.readouterr().err
    assert main(["sample", str(small_folder), "", *GREEDY]) == EXIT_OK


@pytest.mark.parametrize(
    ("options", "words", "remedy"),
    [
        (["--temperature", "-1"], "--temperature is -1; allowed: 0 or more", ["--temperature", "0.5"]),
        (["--top-p", "0"], "--top-p is 0; allowed: above 0 and at most 1", ["--top-p", "0.1"]),
        (["--max-tokens", "0"], "--max-tokens is 0; allowed: 1 or more", []),
        (["--max-tokens", "64"], "above the model's length of 64; give at most 56", ["--max-tokens", "56"]),
        (["--tp", "2"], "1 ranks do not divide into --tp 2 x --pp 1", ["--tp", "1"]),
        (["--tokenizer", "nowhere"], "tokenizer nowhere does not exist", []),
    ],
)
def test_what_cannot_be_is_refused_and_the_advice_works(
    small_folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str, remedy: list[str]
) -> None:
    command = ["sample", str(small_folder), "growth of", "--max-tokens", "4"]
    assert main([*command, *options]) == EXIT_USAGE
    assert words in capsys.readouterr().err
    assert main([*command, *remedy]) == EXIT_OK
