"""The page of a run: whole, alone, and nothing of the run's becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from growth_megatron.errors import ConfigError
from growth_megatron.report.curves import summarise
from growth_megatron.report.joined import joined_records
from growth_megatron.report.page import write_page
from growth_megatron.report.series import LARGEST_POINTS, page_series
from tests.report.test_curves import growing_run, train, written

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}"


class _Tags(HTMLParser):
    """Elements with their attributes, the text outside of scripts, and what each script element holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    @override
    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data


def _page(directory: Path) -> _Tags:
    records = joined_records(directory)
    return _Tags(write_page(summarise(directory, records), records).read_text(encoding="utf-8"))


def _hostile_run(folder: Path) -> Path:
    run = folder / "<script>alert(0)<b>"
    run.mkdir()
    records = [
        {k: v.replace("stack", HOSTILE) if isinstance(v, str) else v for k, v in r.items()} for r in growing_run()
    ]
    records += [
        {"kind": "event", "step": 40, "event": "skip", "message": HOSTILE},
        {"kind": "evaluation", "step": 42, "results": {HOSTILE: {HOSTILE: 0.5, f"{HOSTILE}_stderr": 0.1}}},
    ]
    for record in records:
        if record.get("stage") == "grown":
            record["stage"] = HOSTILE
    (run / "config.yaml").write_text(f"</pre>{HOSTILE}\n")
    return written(run, records)


def test_evaluations_of_other_settings_are_other_rows(tmp_path: Path) -> None:
    figures: list[tuple[float, dict[str, Any]]] = [
        (0.5, {"limit": None}),
        (1.0, {"limit": 0.01, "num_fewshot": 2}),
        (0.25, {"limit": None}),
    ]
    records = [
        {"kind": "evaluation", "step": 42, "results": {"sciq": {"acc": accuracy}}, **settings}
        for accuracy, settings in figures
    ]
    text = _page(written(tmp_path, [*growing_run(), *records])).text
    assert re.search(r"sciq\s*all documents\s*acc\s*0.2500\s*42\s*0.5000 \(42\)", text), text
    assert re.search(r"sciq\s*limit 0.01, 2-shot\s*acc\s*1.0000\s*42", text)


def test_an_event_that_is_told_again_is_one_row(tmp_path: Path) -> None:
    done = {"kind": "event", "step": 42, "event": "done", "message": "run complete: 42 steps"}
    assert _page(written(tmp_path, [*growing_run(), done, done])).text.count("run complete: 42 steps") == 1


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    expected, found = _page(written(plain, growing_run())), _page(_hostile_run(tmp_path))
    assert len(found.scripts) == len(expected.scripts) == 2
    assert found.scripts[1] == expected.scripts[1]
    assert {tag for tag, _ in found.tags} - {tag for tag, _ in expected.tags} <= {"pre", "details", "summary"}
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    assert "<script>alert(0)<b>" in found.text
    assert found.text.count(HOSTILE) >= 5  # operator, stage, message, task, configuration: as they are, as text
    assert json.loads(found.scripts[0])["growths"][0]["operator"] == HOSTILE


def test_the_page_loads_nothing_and_needs_no_other_file(tmp_path: Path) -> None:
    found = _page(written(tmp_path, growing_run()))
    assert not [tag for tag, attributes in found.tags if {"src", "href", "srcset", "data"} & set(attributes)]
    (policy,) = (a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", "".join(found.scripts))


def test_the_page_says_what_the_summary_says(tmp_path: Path) -> None:
    found = _page(written(tmp_path, growing_run()))
    data = json.loads(found.scripts[0])
    assert [stage["name"] for stage in data["stages"]] == ["base", "grown"]
    assert data["stages"][1]["loss"] == [5.5, 4.5]
    (growth,) = data["growths"]
    assert (growth["tokens"], growth["flops"], growth["before"], growth["after"]) == (2200, 22.0, 5.0, 7.0)
    assert "20 steps" not in found.text
    assert "18 steps, 1.80k tokens" in found.text  # the validation loss was back at step 40


def test_a_long_run_gives_a_small_page_and_keeps_its_ends() -> None:
    records = [train(step, "main", step, float(step), 5.0 - step / 1e5, 0.5) for step in range(1, 50_001)]
    (stage,) = page_series(records)["stages"]
    assert len(stage["loss"]) <= LARGEST_POINTS
    assert stage["step"][-1] == 50_000
    assert stage["loss"][-1] == pytest.approx(4.5, abs=1e-3)


def test_resumes_and_what_went_wrong_are_marked_and_a_stages_begin_is_not() -> None:
    def event(name: str, message: str) -> dict[str, Any]:
        return {"kind": "event", "step": 22, "event": name, "message": message}

    records = [
        *growing_run(),
        event("stage", "stage grown (2 of 2): 8 layers, steps 0 to 20 of 100 tokens, from x"),
        event("stage", "stage grown (2 of 2): 8 layers, steps 8 to 20 of 100 tokens, from x"),
        event("skip", "the loss is nan"),
        event("data", "data: x"),
    ]
    marks = page_series(records)["marks"]
    assert [(mark["what"], mark["tokens"]) for mark in marks] == [("resumed", 2200), ("step skipped", 2200)]


def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match="--no-page"):
        _page(written(tmp_path, growing_run()))
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"
    (tmp_path / "report.html").unlink()
    for _ in range(2):  # its own is replaced
        _page(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
