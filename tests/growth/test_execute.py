"""Which executor serves, what is refused before the first byte, and that sources stay as they are."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from growth_megatron.checkpoint.folder.manifest import (
    Multipliers,
    checksum_files,
    list_files,
    read_manifest,
    validate_checkpoint,
    write_manifest,
)
from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, read_common
from growth_megatron.commands.import_hf import import_hf
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.tensors import MASTER_PREFIX, whole
from tests.checkpoint.written import geometry, manifest_of, model_tensors, write_checkpoint, write_distributed

SOURCE = geometry(2)
WIDER = {"hidden_size": 16, "num_attention_heads": 8, "num_query_groups": 4}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", SOURCE)
    return tmp_path / "source"


def _plan(changes: dict[str, Any], **growth: Any) -> GrowthPlan:
    return plan_growth(SOURCE, SOURCE.model_copy(update=changes), GrowthConfig(**growth), 3)


def _everything(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = DistCheckpoint(path)
    return {key: checkpoint.read(key) for key in checkpoint.keys()}


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("operator", ["stack", "identity", "interpolate"])
@pytest.mark.parametrize("policy", ["reset", "carry", "asymmetric"])
def test_written_and_linked_growth_hold_the_same(source: Path, tmp_path: Path, operator: str, policy: str) -> None:
    plan = _plan({"num_layers": 4}, operator=operator)
    linked = grow_checkpoint(source, tmp_path / "linked", plan, policy)
    written = grow_checkpoint(source, tmp_path / "written", plan, policy, materialize=True)
    assert linked.bytes_linked > 0
    assert written.bytes_linked == 0
    ours, theirs = _everything(tmp_path / "linked"), _everything(tmp_path / "written")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    objects = [set(DistCheckpoint(tmp_path / name).object_keys()) for name in ("linked", "written")]
    assert objects[0] == objects[1]
    kept = {"files"}
    assert linked.manifest.model_dump(exclude=kept) == written.manifest.model_dump(exclude=kept)


def test_a_wider_checkpoint_reads_as_its_plan_says_and_the_source_is_not_touched(source: Path, tmp_path: Path) -> None:
    before = _sums(source)
    plan = _plan({**WIDER, "num_layers": 3}, operator="zero+split", shares="uneven", cancelling_noise=0.5)
    grow_checkpoint(source, tmp_path / "grown", plan, "carry")
    assert validate_checkpoint(tmp_path / "grown", full=True) is None
    view = GrownSource(DistCheckpoint(source), plan, "carry")
    grown = _everything(tmp_path / "grown")
    assert grown.keys() == set(view.keys())
    for key, tensor in grown.items():
        assert torch.equal(tensor, view.read(key, whole(view.spec(key).shape))), key
    assert _sums(source) == before


@pytest.mark.parametrize("changes", [{"num_layers": 4}, WIDER])
@pytest.mark.parametrize("prefix", ["", MASTER_PREFIX, "optimizer.state.exp_avg_sq."])
def test_a_source_that_diverged_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], prefix: str
) -> None:
    tensors = model_tensors(SOURCE)
    tensors[f"{prefix}decoder.layers.1.mlp.linear_fc1.weight"][0, 3] = float("nan")
    write_distributed(tmp_path / "source", tensors)
    manifest = manifest_of(SOURCE, files=checksum_files(tmp_path / "source", list_files(tmp_path / "source")))
    write_manifest(tmp_path / "source", manifest)
    with pytest.raises(GrowthError, match=r"linear_fc1.weight holds values that are not finite; grow an earlier"):
        grow_checkpoint(tmp_path / "source", tmp_path / "grown", _plan(changes), "carry")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_appears_at_the_target_meanwhile_is_not_replaced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "grown"

    def meanwhile(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "mine").write_text("kept")

    with pytest.raises(CheckpointError, match="exists; name a new folder"):
        grow_checkpoint(source, target, _plan(WIDER), "carry", progress=meanwhile)
    assert (target / "mine").read_text() == "kept"


def test_multipliers_multiply_over_growths_and_end_with_a_reset(source: Path, tmp_path: Path) -> None:
    once = _plan({"ffn_hidden_size": 24}, optimizer_state="carry", multipliers=True)
    first = grow_checkpoint(source, tmp_path / "once", once, "carry").manifest
    down = "decoder.layers.*.mlp.linear_fc2.weight"
    assert first.multipliers[down] == Multipliers(learning_rate=0.5, weight_decay=2.0)
    config = GrowthConfig(optimizer_state="carry", multipliers=True)
    twice = plan_growth(once.target_geometry, once.target_geometry.model_copy(update={"ffn_hidden_size": 48}), config)
    second = grow_checkpoint(tmp_path / "once", tmp_path / "twice", twice, "carry").manifest
    assert second.multipliers[down] == Multipliers(learning_rate=0.25, weight_decay=4.0)
    groups = read_common(tmp_path / "twice")["optimizer"]["optimizer"]["param_groups"]
    assert {group["lr_mult"] for group in groups} == {1.0, 0.25}
    deeper = plan_growth(
        twice.target_geometry, twice.target_geometry.model_copy(update={"num_layers": 4}), GrowthConfig()
    )
    assert (
        grow_checkpoint(tmp_path / "twice", tmp_path / "kept", deeper, "carry").manifest.multipliers
        == second.multipliers
    )
    reset = grow_checkpoint(tmp_path / "twice", tmp_path / "reset", deeper, "reset").manifest
    assert reset.multipliers == {}
    groups = read_common(tmp_path / "reset")["optimizer"]["optimizer"]["param_groups"]
    assert {group["lr_mult"] for group in groups} == {1.0}


def test_a_hugging_face_folder_grows_as_its_imported_checkpoint_does(source: Path, tmp_path: Path) -> None:
    from growth_megatron.checkpoint.huggingface.writer import export_huggingface

    located = find_origin(str(source))
    export_huggingface(located.tensors, SOURCE, tmp_path / "hf", dtype=torch.float32, tokenizer=None)
    folder = find_origin(f"hf:{tmp_path / 'hf'}")
    plan = plan_growth(
        folder.geometry, folder.geometry.model_copy(update={**WIDER, "num_layers": 4}), GrowthConfig(shares="uneven")
    )
    grown = grow_checkpoint(folder, tmp_path / "grown", plan, "reset")
    import_hf(tmp_path / "hf", tmp_path / "imported")
    again = grow_checkpoint(tmp_path / "imported", tmp_path / "again", plan, "reset")
    ours, theirs = _everything(tmp_path / "grown"), _everything(tmp_path / "again")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    objects = [set(DistCheckpoint(tmp_path / name).object_keys()) for name in ("grown", "again")]
    assert objects[0] == objects[1]
    assert grown.manifest.geometry == again.manifest.geometry == read_manifest(tmp_path / "grown").geometry
    with pytest.raises(GrowthError, match="holds no optimizer state; use reset"):
        grow_checkpoint(folder, tmp_path / "carried", plan, "carry")
