"""Speed-ups at equal loss: exact on curves whose costs are known, never extrapolated, over seeds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from growth_megatron.errors import DataError
from growth_megatron.report.compare import compare, cost_of, read_run, render_comparison, speed_up
from growth_megatron.report.plots import apart
from tests.command_line import run_command


def _run(
    folder: Path, *, cheaper: float = 1.0, steps: int = 40, floor: float = 0.0, seed: int = 0, first: int = 1,
    before: tuple[dict[str, object], ...] = (), done: bool = True,
) -> Path:  # fmt: skip
    """A run whose loss at C FLOPs is (1e15 / (C * cheaper)) ** 0.1 + floor; held out every fourth step."""
    folder.mkdir()
    lines = list(before)
    for step in range(first, steps + 1):
        flops = 1e15 * step * (1 + 0.01 * seed)
        shared = {
            "step": step,
            "stage": "main",
            "consumed_tokens": 1000 * step,
            "flops": flops,
            "flops_6nd": 0.9 * flops,
        }
        loss = (1e15 / (flops * cheaper)) ** 0.1 + floor
        lines.append({"kind": "train", **shared, "stage_step": step, "loss": loss})
        if step % 4 == 0:
            lines.append({"kind": "validation", **shared, "validation_loss": loss})
    if done:
        lines.append({"kind": "event", "step": steps, "event": "done", "message": "run complete"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_run_that_needs_half_the_flops_is_a_speed_up_of_a_hundred_percent(tmp_path: Path) -> None:
    grown, scratch = read_run(_run(tmp_path / "grown", cheaper=2.0)), read_run(_run(tmp_path / "scratch"))
    for loss in ("validation", "train"):
        for cost in ("flops", "flops_6nd", "consumed_tokens"):
            found = speed_up(grown, scratch, loss, cost)
            assert found.value == pytest.approx(1.0, rel=0.02), (loss, cost)
            back = speed_up(scratch, grown, loss, cost)
            assert back.value == pytest.approx(-0.5, rel=0.02)
            assert back.loss == found.loss == max(grown.curves[loss].best, scratch.curves[loss].best)


def test_a_run_is_as_fast_as_itself(tmp_path: Path) -> None:
    run = read_run(_run(tmp_path / "run"))
    assert speed_up(run, run, "validation", "flops").value == 0.0


def test_a_loss_between_two_records_lies_between_their_costs_and_one_never_reached_is_refused(tmp_path: Path) -> None:
    curve = read_run(_run(tmp_path / "run")).curves["validation"]
    middle = (curve.losses[3] + curve.losses[4]) / 2
    cost = cost_of(curve, "flops", middle)
    assert cost == pytest.approx(math.sqrt(curve.costs["flops"][3] * curve.costs["flops"][4]))
    with pytest.raises(ValueError, match="the lowest loss is"):
        cost_of(curve, "flops", 0.01)


def test_seeds_give_a_mean_and_a_spread_and_a_sentence(tmp_path: Path) -> None:
    grown = [read_run(_run(tmp_path / f"g{seed}", cheaper=1.5 + 0.1 * seed, seed=seed)) for seed in range(3)]
    scratch = [read_run(_run(tmp_path / f"s{seed}", seed=seed)) for seed in range(3)]
    figures = compare({"stack": grown}, scratch)
    found = figures["groups"]["stack"]["speed_ups"]["validation"]["flops"]
    assert found["mean"] == pytest.approx(0.6, abs=0.03)
    assert found["least"] < found["mean"] < found["most"]
    text = render_comparison(figures)
    assert "stack comes to a held-out loss of" in text
    assert "fewer FLOPs than the baseline" in text
    assert "over 3 pairs of runs" in text
    lines = text.splitlines()
    for line, loss in ((lines[1], "held-out loss"), (lines[2], "smoothed training loss")):  # both, side by side
        kind = "validation" if loss == "held-out loss" else "train"
        mean = figures["groups"]["stack"]["speed_ups"][kind]["flops"]["mean"]
        assert re.search(rf"{loss} +{re.escape(f'{mean:+.1%}')} \(", line), line
    assert f"with {1 - 1 / (1 + found['mean']):.1%} fewer FLOPs" in text  # of the mean speed-up beside it
    assert "(each with each)" in render_comparison(compare({"stack": grown[:2]}, scratch))
    assert "warning" not in text


def test_a_run_that_grew_out_of_another_has_that_ones_curve_before_its_own(tmp_path: Path) -> None:
    _run(tmp_path / "parent", steps=20)
    source = str(tmp_path / "parent" / "checkpoints" / "step_00000012")
    branch = {"kind": "event", "step": 12, "event": "branch", "source": source, "message": "branched off"}
    joined = read_run(_run(tmp_path / "child", first=13, before=(branch,)))
    whole = read_run(_run(tmp_path / "whole"))
    assert joined.curves["validation"] == whole.curves["validation"]


def test_what_was_reached_before_the_growth_or_by_a_run_that_is_not_complete_is_told(tmp_path: Path) -> None:
    growth = {"kind": "growth", "step": 10, "operator": "stack"}
    grown = read_run(_run(tmp_path / "grown", before=(growth,), cheaper=2.0))
    assert grown.grown_at == pytest.approx({"flops": 1e16, "flops_6nd": 9e15, "consumed_tokens": 10_000})
    scratch = read_run(_run(tmp_path / "scratch"))
    short = read_run(_run(tmp_path / "short", steps=12, done=False))
    early, late = "was there before it grew", "is not complete, its last record is of step 12"
    told = render_comparison(compare({"grown": [grown]}, [short]))
    assert early in told
    assert f"warning: {tmp_path / 'short'} {late}" in told
    told = render_comparison(compare({"grown": [grown]}, [scratch]))
    assert early not in told
    assert late not in told


def test_a_run_that_never_comes_to_the_baselines_loss_is_judged_where_it_was(tmp_path: Path) -> None:
    worse, scratch = read_run(_run(tmp_path / "worse", floor=0.1)), read_run(_run(tmp_path / "scratch"))
    found = speed_up(worse, scratch, "validation", "flops")
    assert found.loss == worse.curves["validation"].best
    assert found.value < 0
    assert "more FLOPs than the baseline" in render_comparison(compare({"worse": [worse]}, [scratch]))


def test_the_command_prints_and_writes_figures_and_a_picture(tmp_path: Path) -> None:
    _run(tmp_path / "grown", cheaper=2.0)
    _run(tmp_path / "scratch")
    outcome = run_command(
        "compare",
        f"stack={tmp_path / 'grown'}",
        "--baseline",
        str(tmp_path / "scratch"),
        "--output",
        str(tmp_path / "out"),
    )
    assert outcome.code == 0, outcome.printed
    assert "speed-up of +" in outcome.out
    figures = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert figures["groups"]["stack"]["runs"] == [str(tmp_path / "grown")]
    for name in ("comparison.png", "comparison_6nd.png", "comparison_tokens.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000
        assert f"plot: {tmp_path / 'out' / name}\n" in outcome.out


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_compared(tmp_path: Path) -> None:
    run = _run(tmp_path / "run")
    outcome = run_command("compare", str(run), "--baseline", str(run), "--output", str(run / "metrics.jsonl"))
    assert outcome.code == 2
    assert "--output" in outcome.printed
    assert outcome.out == ""


def test_a_group_and_the_baseline_of_one_name_are_refused(tmp_path: Path) -> None:
    stack, scratch = _run(tmp_path / "stack"), _run(tmp_path / "scratch")
    for runs, baseline in ((f"a={stack}", f"a={scratch}"), (f"baseline={stack}", f"{scratch}")):
        outcome = run_command("compare", runs, "--baseline", baseline)
        assert outcome.code == 2
        assert "names a group and the baseline" in outcome.printed


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_run(tmp_path)
    _run(tmp_path / "short", steps=1)
    with pytest.raises(DataError, match="fewer than two losses"):
        read_run(tmp_path / "short")
    outcome = run_command("compare", str(tmp_path / "nowhere"), "--baseline", str(tmp_path / "short"))
    assert outcome.code == 2
    assert "Traceback" not in outcome.printed


def test_labels_of_ends_that_lie_together_are_written_one_above_the_other():
    assert apart([1.0, 1.01, 1.02, 2.0], 0.5) == [1.0, 1.5, 2.0, 2.5]
    assert apart([1.0, 2.0], 0.5) == [1.0, 2.0]
