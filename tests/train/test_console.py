"""What is shown of a run, in lines and live, while it goes and by ``watch``."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from growth_megatron.config.run_schema import LoggingConfig
from growth_megatron.config.units import count, duration
from growth_megatron.train.console import LineConsole, LiveConsole, sparkline
from growth_megatron.train.metrics import MetricsLogger
from growth_megatron.train.position import Position
from growth_megatron.train.record_text import event_line
from tests.command_line import run_command
from tests.pool import TIMEOUT_S
from tests.train.test_metrics import STAGES, train_fields


def shown(console: LiveConsole) -> str:
    screen = io.StringIO()
    RichConsole(file=screen, width=80).print(console.view())
    return screen.getvalue()


def test_lines_are_aligned_and_carry_units(capsys: pytest.CaptureFixture[str]) -> None:
    console = LineConsole(Position(STAGES))
    console.record({"kind": "train"} | train_fields(9, loss=10.5, tokens_per_s=999.0, mfu=None))
    console.record({"kind": "train"} | train_fields(20, loss=3.25, tokens_per_s=123_456.0, mfu=0.4123))
    first, second = capsys.readouterr().out.splitlines()
    assert first.split("  ETA")[0] == (
        "step  9/60  base  9/20  loss 10.5000  lr 3.00e-04  grad norm   1.250  tokens/s   999  "
        "TFLOP/s per device 0.0213  MFU    n/a  memory    1.50 GiB"
    )
    assert "tokens/s  123k" in second
    assert "MFU 41.2 %" in second
    assert first.index("memory") == second.index("memory")


def test_a_run_that_branched_off_is_shown_by_its_own_stages_and_the_step_it_ends_at(
    capsys: pytest.CaptureFixture[str],
) -> None:
    position = Position(STAGES)
    LineConsole(position).record({"kind": "train"} | train_fields(109) | {"stage": "base", "stage_step": 9})
    assert capsys.readouterr().out.startswith("step 109/160  base   9/20  ")
    position.move(110, "base")  # a step without a record
    assert position.stage_step == 10
    LineConsole(position).record({"kind": "train"} | train_fields(125) | {"stage": "grown", "stage_step": 5})
    assert capsys.readouterr().out.startswith("step 125/160  grown   5/40  ")


def test_events_are_lines_of_their_own() -> None:
    checkpoint = {
        "kind": "checkpoint", "step": 20, "path": "runs/a/checkpoints/step_00000020", "seconds": 2.0,
        "blocking_seconds": 0.5, "bytes": 3_000_000_000,
    }  # fmt: skip
    assert event_line(checkpoint) == (
        "checkpoint  step 20  saved runs/a/checkpoints/step_00000020  2.79 GiB in 2.0s (1.40 GiB/s), training waited 0.5s"  # noqa: E501
    )
    growth = {
        "kind": "growth", "step": 20, "operator": "stack", "source_geometry": {"num_layers": 6, "hidden_size": 64},
        "target_geometry": {"num_layers": 24, "hidden_size": 64}, "validation_loss_before": 4.0,
        "validation_loss_after": 4.5, "optimizer_state": "reset", "seconds": 0.02, "bytes_written": 15_600,
    }  # fmt: skip
    assert event_line(growth) == (
        "growth      step 20  stack: 6 layers x 64 -> 24 layers x 64, validation loss 4.0000 -> 4.5000, "
        "optimizer state reset, 0.0s, 15.23 KiB written"
    )
    assert event_line({"kind": "validation", "step": 20, "validation_loss": None}) == (
        "validation  step 20  validation loss n/a"
    )


def test_figures_of_tasks_are_a_line() -> None:
    figures = {"arc_easy": {"acc": 0.25, "acc_norm": 0.5}, "pages": {"word_perplexity": 31.5}}
    record = {"kind": "evaluation", "step": 200, "results": figures, "seconds": 12.0}
    assert event_line(record) == "evaluation  step 200  arc_easy acc 0.2500, pages word_perplexity 31.5000  in 12s"


def test_the_live_view_shows_both_bars_and_survives_markup_in_events() -> None:
    screen = io.StringIO()
    output = RichConsole(file=screen, force_terminal=True, width=120, color_system=None)
    console = LiveConsole(output, Position(STAGES, {"base": 20e9, "grown": 40e9}))
    console.record({"kind": "train"} | train_fields(10))
    console.record({"kind": "event", "message": "[/bold] not markup"})
    console.progress(11, "base")
    console.close()
    text = screen.getvalue()
    assert "[/bold] not markup" in text
    for part in ("stage base", "11/20 steps", "11/60 steps", "4.9000", "12.3k"):
        assert part in text


def test_a_stage_that_begins_has_neither_figures_nor_pace_of_the_one_before() -> None:
    position = Position(STAGES, interval_steps=10, growths={"grown": "8 -> 32 layers"})
    console = LiveConsole(RichConsole(file=io.StringIO(), width=80), position)
    for step in (5, 15):
        position.take({"kind": "train", "time": float(step)} | train_fields(step))
    assert "grows 8 -> 32 layers in 5 steps, about 5.0s" in shown(console)
    assert "4.8500" in shown(console)
    position.take({"kind": "event", "event": "stage", "step": 20, "stage": "grown"})
    assert "first figures at step 30" in shown(console)
    assert "4.8500" not in shown(console)
    assert position.stage_eta_s({}) is None


def test_a_validation_loss_is_set_against_the_growth_before_it_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    growth = {"operator": "stack", "validation_loss_before": 4.0, "validation_loss_after": 5.0}
    for loss, session in ((4.5, 1), (3.75, 2)):
        with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger:
            logger.rewind(20 + session)
            if session == 1:
                logger.log("growth", step=20, **growth)
            logger.log("validation", step=21 + session, validation_loss=loss)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation")]
    assert lines[0].endswith("validation loss 4.5000  (-0.5000 since the growth, +0.5000 to before it)")
    assert lines[1].endswith("validation loss 3.7500  (-1.2500 since the growth, -0.2500 to before it)")


@pytest.mark.parametrize("width", [80, 130])
def test_the_live_view_fits_the_terminal_and_lines_are_cut_at_words(width: int) -> None:
    screen = io.StringIO()
    output = RichConsole(file=screen, width=width)
    name = "a_stage_with_a_long_name_of_its_own"
    position = Position({name: 300_000, "grown": 10}, {name: 9e19, "grown": 1e19}, growths={"grown": "wide " * 30})
    console = LiveConsole(output, position)
    for step in range(1, 200):
        position.take({"kind": "train", "time": float(step)} | train_fields(step, name, mfu=0.5))
    message = " ".join(f"word{number}" for number in range(40))
    console.take({"kind": "event", "step": 3, "message": message})
    output.print(console.view())
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    told = [line for line in lines if "word" in line]
    assert [word for line in told for word in line.split()][3:] == message.split()
    assert all(line.startswith(" " * 12) for line in told[1:])
    for part in ("loss 4.99", "TFLOP/s/device", "50.0 %", "300,000 steps"):
        assert part in screen.getvalue()


def test_a_sparkline_falls_as_the_loss_does() -> None:
    assert sparkline([8.0, 7, 6, 5, 4, 3, 2, 1], 8)[-1] == "▁"
    heights = ["▁▂▃▄▅▆▇█".index(bar) for bar in sparkline([float(-n) for n in range(1000)], 50)]
    assert len(heights) == 50
    assert heights == sorted(heights, reverse=True)
    assert sparkline([2.0, 2.0], 9) == "▁▁"
    assert sparkline([2.0, 1.0], 9) == "█▁"


def test_watch_shows_a_run_that_is_done_and_follows_one_that_goes_on_through_a_resume(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, LoggingConfig(), Position(STAGES)) as logger:
        for step in range(1, 6):
            logger.log("train", **train_fields(step))
        logger.log("validation", step=5, validation_loss=4.25)
        with subprocess.Popen(
            [sys.executable, "-m", "growth_megatron", "watch", str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as watching:
            assert watching.stdout is not None
            assert "validation loss 4.2500" in [next(watching.stdout) for _ in range(6)][-1]
            logger.rewind(3)
            logger.log("train", **train_fields(4, loss=1.5))
            logger.log("event", step=4, event="done", message="run complete")
            rest = watching.stdout.read()
            assert watching.wait(TIMEOUT_S) == 0
    assert "run complete" in rest
    assert "4.9500" not in rest
    once = run_command("watch", str(tmp_path), "--once")
    assert once.code == 0, once.err
    assert "event       step 4  run complete" in once.out
    assert "loss" in once.out.splitlines()[-1]
    assert "1.5000" in once.out
    nothing = run_command("watch", str(tmp_path / "no"), "--once")
    assert (nothing.code, nothing.out) == (2, "")
    assert "is no run directory; give the run.directory" in nothing.err


def test_remaining_time_of_a_growing_run_goes_by_flops_also_where_it_branched_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("growth_megatron.train.position.time.monotonic", lambda: now[0])
    costs = {"base": 20e9, "grown": 40 * 4e9}  # a grown step costs four times as much
    for before in (0, 1000):  # steps of another run that this one branched off, which cost 1e15
        position = Position(STAGES, costs)
        for step in range(1, 11):
            now[0] += 1.0
            flops = step * 1e9 + (1e15 if before else 0.0)
            fields: dict[str, Any] = {"step": before + step, "stage": "base", "stage_step": step, "flops": flops}
            position.take({"kind": "train"} | fields)
        assert position.stage_eta_s(fields) == pytest.approx(10)
        assert position.run_eta_s(fields) == pytest.approx(10 + 160)


def test_a_stage_that_only_the_records_know_counts_for_nothing_in_the_remaining_time() -> None:
    position = Position(STAGES, {"base": 20e9, "grown": 40e9})
    position.take({"kind": "train", "step": 1, "stage": "of_an_earlier_configuration", "flops": 1e9, "time": 0.0})
    for step in (2, 3, 4):
        record = {"kind": "train", "step": step, "stage": "base", "flops": step * 1e9, "time": float(step)}
        position.take(record)
    assert position.run_eta_s(record) == pytest.approx(16 + 40)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (7, "7"), (999.4, "999"), (1500, "1.50k"), (12345, "12.3k"), (6.74e9, "6.74B")]
)
def test_counts_have_three_digits(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (12.2, "12s"), (245, "4m 05s"), (12000, "3h 20m"), (100_000, "1d 03h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
