"""Figures, text and picture of a run, from a metrics.jsonl whose numbers are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.errors import ConfigError, DataError
from growth_megatron.report import plots
from growth_megatron.report.curves import render_summary, summarise
from growth_megatron.report.plots import plot_loss, smooth

Record = dict[str, Any]


def model(layers: int) -> dict[str, int]:
    return {
        "num_layers": layers, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128, "vocab_size": 500,
    }  # fmt: skip


def train(step: int, stage: str, stage_step: int, flops: float, loss: float | None, step_time_s: float) -> Record:
    return {
        "kind": "train", "step": step, "stage": stage, "stage_step": stage_step, "consumed_tokens": 100 * step,
        "flops": flops, "loss": loss, "tokens_per_s": 100 / step_time_s, "step_time_s": step_time_s,
        "memory_bytes": 1000 * step,
    }  # fmt: skip


def validation(step: int, stage: str, flops: float, loss: float) -> dict[str, Any]:
    return {
        "kind": "validation", "step": step, "stage": stage, "consumed_tokens": 100 * step, "flops": flops,
        "validation_loss": loss,
    }  # fmt: skip


def growing_run(final_loss: float = 4.0) -> list[dict[str, Any]]:
    """22 steps at 1 FLOP, then 20 at 4; training is reported every 10 steps, so the ends are known by validation."""
    return [
        train(10, "base", 10, 10.0, 8.0, 0.5),
        train(20, "base", 20, 20.0, 6.0, 0.5),
        validation(22, "base", 22.0, 5.0),
        validation(22, "grown", 22.0, 7.0),
        {
            "kind": "growth", "step": 22, "operator": "stack", "source_geometry": model(2), "target_geometry": model(8),
            "optimizer_state": "reset", "validation_loss_before": 5.0, "validation_loss_after": 7.0,
        },
        train(30, "grown", 8, 54.0, 5.5, 2.0),
        train(40, "grown", 18, 94.0, 4.5, 2.0),
        validation(40, "grown", 94.0, 3.5),
        validation(42, "grown", 102.0, final_loss),
    ]  # fmt: skip


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_figures_of_each_stage_and_of_the_run(tmp_path: Path) -> None:
    summary = summarise(written(tmp_path, growing_run()))
    base, grown = summary.stages
    assert (base.steps, base.tokens, base.flops, base.seconds) == (22, 2200, 22.0, 10.0)
    assert (base.first_loss, base.last_loss, base.last_validation_loss) == (8.0, 6.0, 5.0)
    assert (grown.steps, grown.tokens, grown.flops, grown.seconds) == (20, 2000, 80.0, 36.0)
    assert (grown.best_validation_loss, grown.last_validation_loss) == (3.5, 4.0)
    assert (base.geometry, grown.geometry) == (model(2), model(8))
    assert base.parameters is not None
    assert grown.parameters is not None
    # four matrices of attention, three of the MLP, two norms a layer
    assert grown.parameters - base.parameters == 6 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)
    assert (summary.steps, summary.tokens, summary.flops, summary.seconds) == (42, 4200, 102.0, 46.0)
    assert summary.peak_memory_bytes == 40_000
    (growth,) = summary.growths
    assert (growth.step, growth.tokens, growth.flops) == (22, 2200, 22.0)
    assert (growth.loss_before, growth.loss_after) == (5.0, 7.0)


@pytest.mark.parametrize(("final_loss", "relation"), [(4.0, "is below"), (5.5, "is NOT below"), (5.0, "is equal to")])
def test_the_last_line_says_whether_growth_paid(tmp_path: Path, final_loss: float, relation: str) -> None:
    text = render_summary(summarise(written(tmp_path, growing_run(final_loss))))
    assert text.splitlines()[-1] == (
        f"grown model's validation loss {final_loss:.4f} {relation} the base's 5.0000, "
        "at 102 FLOPs in all (22 of them the base's)"
    )


def test_validation_records_without_a_stage_are_placed_by_their_step(tmp_path: Path) -> None:
    records = [{k: v for k, v in r.items() if k != "stage" or r["kind"] != "validation"} for r in growing_run()]
    base, grown = summarise(written(tmp_path, records)).stages
    assert base.last_validation_loss is None  # step 22 is beyond its last training record
    assert grown.best_validation_loss == 3.5


def test_a_run_without_growth_or_validation_is_summarised(tmp_path: Path) -> None:
    summary = summarise(written(tmp_path, [train(10, "main", 10, 10.0, 8.0, 0.5)]))
    assert summary.verdict == "validation loss n/a at 10 FLOPs"
    assert "main" in render_summary(summary)


def test_growth_without_validation_claims_nothing(tmp_path: Path) -> None:
    records = [r for r in growing_run() if r["kind"] != "validation"]
    for record in records:
        if record["kind"] == "growth":
            record["validation_loss_before"] = None
    assert "nothing can be said" in summarise(written(tmp_path, records)).verdict


def test_a_loss_that_was_not_finite_is_a_warning(tmp_path: Path) -> None:
    records = [
        *growing_run(),
        {"kind": "event", "step": 41, "event": "non_finite", "message": "loss of the train record is nan"},
    ]
    assert "warning: loss of the train record is nan" in render_summary(summarise(written(tmp_path, records)))


def test_a_run_that_has_not_trained_yet_is_refused(tmp_path: Path) -> None:
    written(tmp_path, [{"kind": "event", "message": "started"}])
    with pytest.raises(DataError, match="has no training step"):
        summarise(tmp_path)
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="has no training loss"):
        plot_loss(tmp_path, tmp_path / "x.png")


def test_a_record_that_lacks_what_every_one_has_is_named(tmp_path: Path) -> None:
    records = growing_run()
    del records[1]["consumed_tokens"]
    with pytest.raises(DataError, match="the train record of step 20 has no consumed_tokens"):
        summarise(written(tmp_path, records))
    records[1]["consumed_tokens"] = "many"
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a record of metrics"):
        summarise(written(tmp_path, records))


def test_the_plot_has_the_growth_and_names_at_the_ends_of_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    seen: list[Any] = []
    save = figure_module.Figure.savefig

    def keep(figure: Any, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(figure_module.Figure, "savefig", keep)
    written(tmp_path, growing_run())
    path = plot_loss(tmp_path, tmp_path / "plots" / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    (axis,) = seen[0].axes
    assert axis.get_xlabel() == "FLOPs of training, the base's counted"
    assert {text.get_text() for text in axis.texts} == {"training", "validation", "stack\n2 → 8 layers"}
    assert any(list(line.get_xdata()) == [22.0, 22.0] for line in axis.lines)


def test_a_run_with_a_null_loss_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written(tmp_path, [train(5, "base", 5, 5.0, None, 0.5), *growing_run()])
    assert plot_loss(tmp_path, tmp_path / "loss.png").exists()


def test_a_plot_without_matplotlib_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install matplotlib"):
        plot_loss(tmp_path, tmp_path / "x.png")


def test_smoothing_neither_lags_nor_changes_a_straight_line() -> None:
    line = [10.0 - 0.5 * x for x in range(11)]
    assert smooth(line, 3) == pytest.approx(line)
    assert smooth([0, 0, 3, 0, 0], 1) == pytest.approx([0, 1, 1, 1, 0])
