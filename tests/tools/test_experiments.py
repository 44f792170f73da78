"""The experiments spend what they say and can be started in their order; their figures follow from their runs."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from growth_megatron.data.prepare import prepare_data
from growth_megatron.data.tokenizer import train_tokenizer
from growth_megatron.growth.configuration import load_config
from growth_megatron.model.cost import flops_per_token
from growth_megatron.train.plan import total_flops
from tests.pool import ROOT

FOLDER = ROOT / "tools" / "experiments"


@pytest.fixture(scope="module")
def tools() -> Any:
    """The modules of tools/experiments, as their own scripts import them."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {
            name: importlib.import_module(name)
            for name in ("experiments", "released_width", "results", "run", "tables")
        }
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def listed(tools: Any) -> Any:
    experiments = tools["experiments"]
    plans = {
        kind: experiments.Plan(rate, 0.1) for kind, rate in zip(experiments.KINDS, experiments.RATES[1:4], strict=True)
    }
    tuned = experiments.Tuned({"depth": 8e-3, "width": 4e-3}, plans)
    runs = [*tools["run"].first_tuning(tuned), *experiments.nine_way(tuned), *experiments.ablations(tuned)]
    return [*runs, *experiments.longer(tuned, experiments.Plan(8e-3, 0.2))]


def test_each_run_is_listed_after_those_it_begins_from_and_is_the_same_each_time(listed: Any) -> None:
    known: dict[str, Any] = {}
    for run in listed:
        assert known.setdefault(run.name, run) == run
        assert set(run.needs) <= known.keys(), run.name
    assert len(known) > 120


def test_every_column_spends_the_flops_of_scratch_its_base_and_learned_maps_counted(
    tools: Any, listed: Any, tmp_path: Path
) -> None:
    whole = 1200 * 512 * flops_per_token(tools["experiments"].model_of(tools["experiments"].TARGET))
    (tmp_path / "configs").mkdir()
    bases = {run.name: run for run in listed if run.is_base}
    for run in listed:
        config = load_config(tools["run"].write_config(run, tmp_path)).config
        if not run.is_compared or run.column in ("scratch_0.6x", "scratch_1.4x"):
            continue
        spent = total_flops(config)
        if run.before:
            spent += run.unseen_flops
        elif config.checkpoint.mode == "branch":
            name, _, step = Path(config.checkpoint.resume).name.partition("@")
            base = load_config(tools["run"].write_config(bases[name], tmp_path)).config.stages[0]
            spent += int(step) * base.tokens_per_step * flops_per_token(base.model)
            learned = config.stages[0].growth
            if learned is not None and learned.operator == "learn":
                assert learned.learn is not None
                spent += learned.learn.steps * base.tokens_per_step * flops_per_token(config.stages[0].model)
        budget = 5 if run.group == "longer" else 1
        assert spent == pytest.approx(budget * whole, rel=0.01), run.name  # the work on learned maps is 0.6 %


def test_every_compared_column_has_its_row_in_a_table(tools: Any, listed: Any) -> None:
    rows = {
        "nine_way": tools["tables"].NINE_WAY,
        "ablations": tools["tables"].ABLATIONS,
        "longer": tools["tables"].LONGER,
    }
    assert [run.name for run in listed if run.is_compared and run.column not in rows[run.group]] == []


def test_a_finished_run_whose_settings_are_others_now_is_not_taken_for_done(tools: Any, tmp_path: Path) -> None:
    base = tools["experiments"].base_run("depth", 1, 8e-3, 4)
    tools["run"].write_config(base, tmp_path)
    tools["results"].write_text(tmp_path / "finished" / f"{base.name}.json", "{}")
    crew = tools["run"].Crew(tmp_path, 1)
    assert crew.work([base])
    with pytest.raises(SystemExit, match="differs from what this program would run now"):
        crew.work([tools["experiments"].base_run("depth", 1, 4e-3, 4)])


def test_a_speed_up_is_read_off_the_annealed_ends_of_scratch_and_never_extrapolated(tools: Any) -> None:
    scratch = [{"same_sources": loss, "flops": flops} for loss, flops in ((5.0, 60.0), (4.8, 100.0), (4.7, 150.0))]

    def speed_up(loss: float) -> Any:
        return tools["results"].annealed_speed_up({"same_sources": loss, "flops": 100.0}, scratch)

    assert speed_up(4.8) == pytest.approx(0.0)
    assert speed_up(4.75) == pytest.approx((100 * 150) ** 0.5 / 100 - 1)  # halfway in loss and in the cost's logarithm
    assert speed_up(5.0) == pytest.approx(-0.4)
    assert speed_up(5.1) == "< -40.0%"
    assert speed_up(4.6) == "> +50.0%"


def test_the_page_of_results_has_the_tables_that_follow_from_its_figures(tools: Any) -> None:
    found = json.loads((ROOT / "docs" / "results.json").read_text())
    page, tables = (ROOT / "docs" / "results.md").read_text(), tools["tables"]
    assert len(tables.tables(found)) == 6
    for table in tables.tables(found):
        assert table.count("\n") > 5
        assert table in page


def test_what_readme_says_of_savings_follows_from_the_figures(tools: Any) -> None:
    found = json.loads((ROOT / "docs" / "results.json").read_text())["against_best_scratch"]
    readme, needs = (ROOT / "README.md").read_text(), []
    for column, words in (
        ("nine_way/depth_direct", "fewer FLOPs"),
        ("nine_way/width_zero", "fewer"),
        ("nine_way/width_direct", "more"),
        ("longer/depth_direct_0.004", "fewer with half the rate"),
        ("longer/depth_direct", "fewer with the same rate"),
    ):
        pairs = found[column]["speed_ups"]["validation"]["flops"]["of"]
        mean = sum(each["baseline_cost"] / each["run_cost"] for each in pairs) / len(pairs)
        needs.append(f"{abs(1 - 1 / mean):.0%} {words}".replace("%", " %"))
    for need in needs:
        assert need in " ".join(readme.split()), need


def test_the_released_mapping_copies_by_one_draw_and_shares_what_reads_the_copies(tools: Any) -> None:
    numbers = torch.arange(1.0, 1000.0)
    square, fused = numbers[:16].view(4, 4), [numbers[k : k + 16].view(4, 4) for k in (0, 100, 200)]
    layer = dict(zip((f"self_attn.{letter}_proj.weight" for letter in "qkv"), fused, strict=True))
    weights = {"model.norm.weight": numbers[:4], "lm_head.weight": square, "mlp.down_proj.weight": square, **layer}
    wide = tools["released_width"].widened(weights, [2, 0, 2, 1], head_dim=2)
    assert wide["model.norm.weight"].tolist() == [1, 2, 3, 4, 3, 1, 3, 2]
    assert torch.allclose(wide["lm_head.weight"][0], torch.tensor([1 / 2, 2 / 2, 3 / 3, 4, 3 / 3, 1 / 2, 3 / 3, 2 / 2]))
    assert wide["mlp.down_proj.weight"].shape == (8, 8)
    # rows of q, k, v head by head: the first four are head 0's q and k, and every new row is one of them
    first = torch.cat([fused[0][:2], fused[1][:2]])[[2, 0, 2, 1]] / torch.tensor([2.0, 2.0, 3.0, 1.0])
    assert torch.equal(wide["self_attn.q_proj.weight"][4:, :4], torch.cat([first[:2], first[2:]]))
    assert torch.equal(wide["self_attn.k_proj.weight"][4:, :4], torch.cat([first[2:], first[:2]]))
    assert torch.equal(wide["self_attn.v_proj.weight"][4:, :4], torch.cat([first[:2], first[2:]]))


def test_runs_are_trained_evaluated_and_recorded_once(tools: Any, tmp_path: Path) -> None:
    _prepare(tools, tmp_path)
    experiments, results = tools["experiments"], tools["results"]
    base = experiments.base_run("depth", 1, 8e-3, 4)
    base.content["schedule"] = {"warmup_steps": 0}
    plan = experiments.Plan(8e-3, 0.0)
    grown = experiments.grown_run("nine_way", "depth_direct", base, {"operator": "stack"}, plan, at=4)
    grown.content["stages"][0]["training"]["steps"] = 3
    for run in (base, grown):
        run.content["evaluation"] = {"interval_steps": 2, "samples": 8}
    crew = tools["run"].Crew(tmp_path, 2)
    assert crew.work([base, grown]), (tmp_path / "logs" / f"{grown.name}.log").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "finished").iterdir()}
    assert {path.stem for path in before} == {base.name, grown.name}
    found = json.loads((tmp_path / "results.json").read_text())["columns"]["nine_way/depth_direct"]
    last = results.read_run(tmp_path / "runs" / grown.name).curves["validation"]
    assert found["flops"] == {"1": last.costs["flops"][-1]}
    assert 0 < abs(found["same_sources"]["1"] - last.losses[-1]) < 0.2  # on more samples than the run's own
    assert found["same_sources"] != found["other_source"]
    assert "| direct, depth (`stack`) | `depth_direct` | 1 |" in (tmp_path / "results.md").read_text()
    assert {"results.png", "comparison.png"} == {path.name for path in tmp_path.glob("*.png")}
    assert crew.work([base, grown])
    assert before == {path: path.stat().st_mtime_ns for path in before}


def _prepare(tools: Any, output: Path) -> None:
    """This checkout's pages as all of the sources."""
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", "docs/growth.md", "docs/paper.md")]
    text = output / "text.txt"
    text.write_text("\n".join(page.read_text() for page in pages))
    tokenizer = train_tokenizer([text], output / "data" / "tokenizer.model", tools["run"].VOCABULARY)
    names = tools["run"].TRAINED_ON
    for number, name in enumerate([*names, *(f"{name}_validation" for name in names), "git_validation"]):
        page, prefix = output / f"{number}.txt", output / "data" / name
        page.write_text(pages[number % 4].read_text() + f"\n{number}")
        prepare_data([page], tokenizer.path, prefix, workers=1, progress_stream=io.StringIO())
