"""``inspect --tensor``: figures are those of the whole tensor, however it is stored; a wrong key is put right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.commands import tensor_statistics as module
from growth_megatron.commands.inspect import describe_tensor
from growth_megatron.commands.tensor_statistics import render_tensor, tensor_statistics
from growth_megatron.errors import CheckpointError
from tests.checkpoint.written import geometry, manifest_of, write_checkpoint, write_distributed

MODEL = geometry(3)
FC1 = "decoder.layers.2.mlp.linear_fc1.weight"


@pytest.mark.parametrize("prefix", ["", "optimizer.state.param.", "optimizer.state.exp_avg_sq."])
@pytest.mark.parametrize(("stacked", "parts"), [(False, 1), (False, 3), (True, 2)])
def test_figures_are_those_of_the_whole_tensor(
    tmp_path: Path, stacked: bool, parts: int, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 40)  # so that blocks are merged
    tensors = write_checkpoint(tmp_path / "c", MODEL, stacked=stacked, parts=parts)
    shown = describe_tensor(tmp_path / "c", prefix + FC1)
    assert json.loads(json.dumps(shown)) == shown
    values = tensors[prefix + FC1].double()
    assert (shown["shape"], shown["elements"]) == ([24, 8], 192)
    assert shown["dtype"] == ("float32" if prefix else "bfloat16")
    assert (shown["min"], shown["max"]) == (values.min(), values.max())
    assert shown["mean"] == pytest.approx(float(values.mean()), rel=1e-12)
    assert shown["std"] == pytest.approx(float(values.std(correction=0)), rel=1e-12)
    assert shown["rms"] == pytest.approx(float(values.square().mean().sqrt()), rel=1e-12)
    assert (shown["zeros"], shown["non_finite"]) == (0, 0)
    assert shown["first_values"] == values[0].tolist()
    assert [chunk["sizes"] for chunk in shown["chunks"]] == [[24 // parts, 8]] * parts
    for chunk in shown["chunks"]:
        size = (tmp_path / "c" / chunk["file"]).stat().st_size
        assert 0 <= chunk["file_offset"] < chunk["file_offset"] + chunk["file_bytes"] <= size


def test_values_that_are_zero_or_not_finite_are_counted_apart(tmp_path: Path) -> None:
    values = torch.tensor([[0.0, -0.0, 3.0], [float("nan"), float("-inf"), -1.0]])
    none = torch.full((2,), float("nan"))
    write_distributed(tmp_path, {"some": values, "none": none, "empty": torch.zeros(0, 3)})
    shown = tensor_statistics(DistCheckpoint(tmp_path), "some")
    assert (shown["min"], shown["max"], shown["mean"]) == (-1, 3, 0.5)
    assert (shown["zeros"], shown["non_finite"]) == (2 / 6, 2)
    shown = tensor_statistics(DistCheckpoint(tmp_path), "none")
    assert (shown["min"], shown["rms"], shown["non_finite"]) == (None, None, 2)
    assert shown["first_values"] == ["nan", "nan"]
    assert "none: no finite value" in render_tensor(shown)
    assert tensor_statistics(DistCheckpoint(tmp_path), "empty")["elements"] == 0


def test_a_large_mean_costs_the_deviation_no_digits(tmp_path: Path) -> None:
    values = 1e4 + torch.arange(1000.0, dtype=torch.float64).view(10, 100) * 1e-6
    write_distributed(tmp_path, {"x": values}, parts=5)
    shown = tensor_statistics(DistCheckpoint(tmp_path), "x")
    assert shown["std"] == pytest.approx(float(values.std(correction=0)), rel=1e-6)


def test_the_text_says_it_all(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "c", MODEL, manifest_of(MODEL), parts=2)
    text = render_tensor(describe_tensor(tmp_path / "c", FC1))
    for words in (
        FC1,
        "24 x 8, bfloat16: 192 elements, 384 B",
        "1 of 12 x 8 in __0_",
        "min ",
        "rms ",
        "non-finite    none",
    ):
        assert words in text, text
    assert text == "\n".join(line.rstrip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (
            "decoder.layers.7.mlp.linear_fc1.weight",
            "name one layer out of 0 to 2, as in decoder.layers.0.mlp.linear_fc1",
        ),
        (
            "decoder.layers.*.mlp.linear_fc1.weight",
            "name one layer out of 0 to 2, as in decoder.layers.0.mlp.linear_fc1",
        ),
        ("decoder.layers.1.mlp.linear_fc1.wieght", r"did you mean decoder.layers.1.mlp.linear_fc1.weight( or |\?)"),
        ("decoder.layers.9.mlp.linear_fc1.wieght", r"did you mean decoder.layers.0.mlp.linear_fc1.weight( or |\?)"),
        ("mlp.linear_fc2.weight", r"did you mean decoder.layers.0.mlp.linear_fc2.weight or "),
        ("optimizer.state.exp_avg.output_layer", r"did you mean optimizer.state.exp_avg.output_layer.weight\?"),
        ("zzz", "growth-megatron inspect lists the tensors"),
    ],
)
def test_a_wrong_key_is_told_what_was_meant(tmp_path: Path, key: str, words: str) -> None:
    write_checkpoint(tmp_path / "c", MODEL)
    with pytest.raises(CheckpointError, match=words) as caught:
        describe_tensor(tmp_path / "c", key)
    assert caught.value.exit_code == 2


def test_a_hole_is_no_tensor(tmp_path: Path) -> None:
    write_distributed(tmp_path, {"x": torch.ones(4, 2)}, parts=2)
    checkpoint = DistCheckpoint(tmp_path)
    checkpoint.metadata.state_dict_metadata["x"].chunks.pop()  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="holes"):
        tensor_statistics(checkpoint, "x")
