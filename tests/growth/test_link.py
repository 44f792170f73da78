"""Growth by links: the grown checkpoint reads as the plan says, costs nothing, and survives everything."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import (
    checksum_files,
    list_files,
    read_identified_manifest,
    read_manifest,
    validate_checkpoint,
    write_manifest,
)
from growth_megatron.checkpoint.folder.run_directory import RunDirectory
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, read_common
from growth_megatron.errors import CheckpointError, GrowthError
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.layers import parse_layers
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.plan import plan_depth
from growth_megatron.growth.rules import AxisRule, GrowthPlan, TensorRule
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.tensors import whole
from tests.checkpoint import written
from tests.checkpoint.dying_files import DyingFiles, Killed
from tests.checkpoint.written import (
    geometry,
    manifest_of,
    model_tensors,
    stack,
    write_checkpoint,
    write_distributed,
)

LAYERS = parse_layers("1-23*2", 3)
SOURCE, TARGET = geometry(3), geometry(5)
MOMENTS = ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")


@pytest.fixture
def plan() -> GrowthPlan:
    return plan_depth(SOURCE, TARGET, LAYERS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source", SOURCE)
    return tmp_path / "source"


def assert_reads_as(checkpoint: Path, expected: GrownSource) -> None:
    read = DistCheckpoint(checkpoint)
    assert set(read.keys()) == set(expected.keys())
    for key in expected.keys():
        spec = expected.spec(key)
        assert read.spec(key) == spec
        assert torch.equal(read.read(key), expected.read(key, whole(spec.shape)))


@pytest.mark.parametrize("policy", ["reset", "carry"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_grown_checkpoint_reads_as_the_plan_says(
    tmp_path: Path, plan: GrowthPlan, policy: str, parts: int, stacked: bool
) -> None:
    write_checkpoint(tmp_path / "source", SOURCE, stacked=stacked, parts=parts)
    grow_checkpoint(tmp_path / "source", tmp_path / "target", plan, policy)
    expected = GrownSource(DistCheckpoint(tmp_path / "source"), plan, policy)
    assert_reads_as(tmp_path / "target", expected)
    assert validate_checkpoint(tmp_path / "target", full=True) is None


@pytest.mark.parametrize("policy", ["reset", "carry"])
def test_plain_torch_dcp_loads_it(source: Path, tmp_path: Path, plan: GrowthPlan, policy: str) -> None:
    grow_checkpoint(source, tmp_path / "target", plan, policy)
    expected = GrownSource(DistCheckpoint(source), plan, policy)
    loaded = {key: torch.full_like(tensor, 7.0) for key, tensor in model_tensors(TARGET).items()}
    dcp.load(loaded, checkpoint_id=tmp_path / "target", no_dist=True)
    for key, tensor in loaded.items():
        assert torch.equal(tensor, expected.read(key, whole(tuple(tensor.shape))))


def test_objects_of_layers_follow_their_layer(source: Path, tmp_path: Path, plan: GrowthPlan) -> None:
    grow_checkpoint(source, tmp_path / "target", plan, "carry")
    grown = DistCheckpoint(tmp_path / "target")
    name = "decoder.layers.{}.self_attention.linear_qkv._extra_state/shard_0_1"
    assert {key: grown.read_object(key) for key in grown.object_keys()} == {
        name.format(layer): f"state {of}".encode() for layer, of in enumerate(LAYERS)
    }


def test_objects_of_the_stacked_form_are_renumbered(tmp_path: Path, plan: GrowthPlan) -> None:
    key = "decoder.layers.mlp.linear_fc1._extra_state/shard_{}_{}"
    objects = {key.format(layer, 3): f"state {layer}".encode() for layer in range(3)} | {"rng/shard_0.0_1.1": b"rng"}
    write_distributed(tmp_path / "source", model_tensors(SOURCE), objects)
    _sign(tmp_path / "source")
    grow_checkpoint(tmp_path / "source", tmp_path / "target", plan, "carry")
    grown = DistCheckpoint(tmp_path / "target")
    assert {key: grown.read_object(key) for key in grown.object_keys()} == {
        **{key.format(layer, 5): f"state {of}".encode() for layer, of in enumerate(LAYERS)},
        "rng/shard_0.0_1.1": b"rng",
    }


def _sign(folder: Path, **changes: object) -> None:
    files = checksum_files(folder, list_files(folder))
    write_manifest(folder, manifest_of(SOURCE).model_copy(update={"files": files, **changes}))


def test_data_files_are_links_and_next_to_nothing_is_written(tmp_path: Path) -> None:
    big = geometry(3, hidden_size=128, ffn_hidden_size=512)
    write_checkpoint(tmp_path / "source", big)
    plan = plan_depth(big, big.model_copy(update={"num_layers": 24}), stack_layers(3, 24))
    for policy in ("carry", "reset"):
        result = grow_checkpoint(tmp_path / "source", tmp_path / policy, plan, policy)
        data = list((tmp_path / "source").glob("*.distcp"))
        assert all(path.samefile(tmp_path / policy / path.name) for path in data)
        assert result.bytes_linked == sum(path.stat().st_size for path in data) > 5e6
        assert result.bytes_copied == 0
        own = [path for path in result.path.iterdir() if path.stat().st_nlink == 1]
        assert result.bytes_written == sum(path.stat().st_size for path in own) < 200_000
    zeros = tmp_path / "reset/zeros.distcp"
    assert zeros.stat().st_size < 20_000  # a few shapes, one stored element each


def test_sums_of_linked_files_come_from_the_sources_manifest(source: Path, tmp_path: Path, plan: GrowthPlan) -> None:
    """So growing takes no time at any size; and damage in the source's data is not signed anew."""
    content = bytearray((source / "__0_0.distcp").read_bytes())
    content[1000] ^= 1
    (source / "__0_0.distcp").write_bytes(content)
    result = grow_checkpoint(source, tmp_path / "target", plan, "carry")
    assert result.manifest.files["__0_0.distcp"] == read_manifest(source).files["__0_0.distcp"]
    assert "does not match its checksum" in str(validate_checkpoint(tmp_path / "target", full=True))


def test_the_step_is_reset_or_kept_with_the_moments(source: Path, tmp_path: Path, plan: GrowthPlan) -> None:
    steps = {}
    for policy in ("reset", "carry"):
        grow_checkpoint(source, tmp_path / policy, plan, policy)
        common = read_common(tmp_path / policy)
        assert common["iteration"] == 100
        groups = common["optimizer"]["optimizer"]["param_groups"]
        assert [group["lr"] for group in groups] == [1e-3, 1e-3]
        steps[policy] = [group["step"] for group in groups]
    assert steps == {"reset": [0.0, 0.0], "carry": [100.0, 100.0]}
    assert isinstance(steps["reset"][0], float)


def test_the_manifest_says_where_it_came_from(source: Path, tmp_path: Path, plan: GrowthPlan) -> None:
    before = read_manifest(source)
    result = grow_checkpoint(source, tmp_path / "a", plan, "reset")
    manifest = read_manifest(tmp_path / "a")
    assert manifest == result.manifest
    assert (manifest.step, manifest.stage, manifest.stage_step) == (100, 1, 0)
    for same in ("consumed_samples", "consumed_tokens", "flops", "data_fingerprint", "config_hash"):
        assert getattr(manifest, same) == getattr(before, same)
    assert manifest.geometry == TARGET
    (record,) = manifest.lineage
    assert (record.operator, record.layers, record.optimizer_state, record.seed) == ("stack", LAYERS, "reset", 0)
    assert (record.source, record.source_manifest_sha256) == (str(source), read_identified_manifest(source)[1])
    assert (record.source_geometry, record.target_geometry) == (SOURCE, TARGET)
    again = plan_depth(TARGET, geometry(6), stack_layers(5, 6))
    second = grow_checkpoint(tmp_path / "a", tmp_path / "b", again, "carry", stage=0, config_hash="other").manifest
    assert second.lineage[0] == record
    assert second.lineage[1].source_manifest_sha256 == read_identified_manifest(tmp_path / "a")[1]
    assert (second.stage, second.config_hash) == (0, "other")


@pytest.mark.parametrize("policies", [("reset", "reset"), ("reset", "carry"), ("carry", "reset"), ("carry", "carry")])
def test_a_grown_checkpoint_grows_again(
    source: Path, tmp_path: Path, plan: GrowthPlan, policies: tuple[str, str]
) -> None:
    again = plan_depth(TARGET, geometry(7), (4, 3, 2, 1, 0, 0, 0))
    grow_checkpoint(source, tmp_path / "a", plan, policies[0])
    grow_checkpoint(tmp_path / "a", tmp_path / "b", again, policies[1])
    once = GrownSource(DistCheckpoint(source), plan, policies[0])
    assert_reads_as(tmp_path / "b", GrownSource(once, again, policies[1]))
    assert validate_checkpoint(tmp_path / "b", full=True) is None


def test_removing_the_source_harms_nothing(source: Path, tmp_path: Path, plan: GrowthPlan) -> None:
    shutil.copytree(source, tmp_path / "copy")
    grow_checkpoint(source, tmp_path / "target", plan, "carry")
    shutil.rmtree(source)
    assert validate_checkpoint(tmp_path / "target", full=True) is None
    assert_reads_as(tmp_path / "target", GrownSource(DistCheckpoint(tmp_path / "copy"), plan, "carry"))


class _OneFileSystemEach(FileOperations):
    def link(self, source: Path, target: Path) -> bool:
        return False


def test_where_links_cannot_be_made_data_are_copied_and_it_is_said(
    source: Path, tmp_path: Path, plan: GrowthPlan, caplog: pytest.LogCaptureFixture
) -> None:
    result = grow_checkpoint(source, tmp_path / "target", plan, "carry", files=_OneFileSystemEach())
    data = sum(path.stat().st_size for path in source.glob("*.distcp"))
    assert (result.bytes_linked, result.bytes_copied) == (0, data)
    assert result.bytes_written == sum(path.stat().st_size for path in (tmp_path / "target").iterdir())
    assert "cannot share files by hard links" in caplog.text
    assert_reads_as(tmp_path / "target", GrownSource(DistCheckpoint(source), plan, "carry"))


def test_copying_needs_the_space_before_it_starts(
    source: Path, tmp_path: Path, plan: GrowthPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="needs .* to copy the files of .* where 10 B are free"):
        grow_checkpoint(source, tmp_path / "target", plan, "carry", files=_OneFileSystemEach())
    assert not (tmp_path / "target").exists()


def test_only_errors_that_mean_no_links_are_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> None:
        def link(source: Path, target: Path) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", link)

    fails(errno.EXDEV)
    assert FileOperations().link(tmp_path / "a", tmp_path / "b") is False
    fails(errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        FileOperations().link(tmp_path / "a", tmp_path / "b")


def test_killed_at_any_file_operation_the_source_is_kept_and_a_rerun_completes(
    tmp_path: Path, plan: GrowthPlan
) -> None:
    """As in a run: after a kill the newest valid checkpoint is the source, or the grown one, whole."""
    expected = None
    for after in range(200):
        run = RunDirectory(tmp_path / str(after))
        source = run.checkpoint_path(100)
        write_checkpoint(source, SOURCE)
        target = run.checkpoint_path(100, grown=True)
        finished = False
        try:
            grow_checkpoint(source, target, plan, "reset", files=DyingFiles(after))
            finished = True
        except Killed:
            pass
        newest, skipped = run.newest_valid(full=True)
        assert newest == (target if finished or target.exists() else source)
        assert skipped == ()
        run.recover()
        if run.newest_valid()[0] == source:
            grow_checkpoint(source, target, plan, "reset", files=DyingFiles())
        assert run.newest_valid(full=True) == (target, ())
        assert sorted(path.name for path in target.parent.iterdir()) == [source.name, target.name]
        expected = expected or GrownSource(DistCheckpoint(source), plan, "reset")
        assert_reads_as(target, expected)
        if finished:
            assert after > 15
            return
    pytest.fail("the growth never ends")


def test_a_damaged_source_is_refused_and_nothing_is_written(source: Path, tmp_path: Path, plan: GrowthPlan) -> None:
    before = set(tmp_path.iterdir())
    size = (source / ".metadata").stat().st_size
    (source / ".metadata").write_bytes((source / ".metadata").read_bytes()[: size // 2])
    with pytest.raises(CheckpointError, match=r"cannot read .*: \.metadata has"):
        grow_checkpoint(source, tmp_path / "target", plan, "carry")
    (source / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        grow_checkpoint(source, tmp_path / "target", plan, "carry")
    assert set(tmp_path.iterdir()) == before


def test_a_plan_for_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    other = plan_depth(geometry(2), geometry(4), (0, 1, 0, 1))
    with pytest.raises(GrowthError, match="plan from the latter"):
        grow_checkpoint(source, tmp_path / "target", other, "carry")
    _sign(source, geometry=geometry(2))
    with pytest.raises(GrowthError, match="decoder.layers.2.* is no tensor of such a model"):
        grow_checkpoint(source, tmp_path / "target", other, "carry")
    assert not (tmp_path / "target").exists()


def test_a_plan_that_computes_values_is_written_not_linked(source: Path, tmp_path: Path, plan: GrowthPlan) -> None:
    key = "decoder.layers.4.mlp.linear_fc2.weight"
    fresh = TensorRule(key, (AxisRule(8), AxisRule(12)), fill="initial")
    rules = tuple(fresh if rule.target == key else rule for rule in plan.rules)
    computed = GrowthPlan("stack", SOURCE, TARGET, rules, LAYERS)
    result = grow_checkpoint(source, tmp_path / "computed", computed, "carry")
    assert (result.bytes_linked, result.bytes_copied) == (0, 0)
    assert_reads_as(tmp_path / "computed", GrownSource(DistCheckpoint(source), computed, "carry"))
    with pytest.raises(GrowthError, match="allowed: reset, carry"):
        grow_checkpoint(source, tmp_path / "t", plan, "half")


def test_weights_alone_grow_too_but_have_no_moments_to_carry(tmp_path: Path, plan: GrowthPlan) -> None:
    write_distributed(tmp_path / "source", model_tensors(SOURCE, optimizer=False))
    _sign(tmp_path / "source", has_optimizer_state=False)
    with pytest.raises(GrowthError, match="holds no optimizer state; use reset"):
        grow_checkpoint(tmp_path / "source", tmp_path / "target", plan, "carry")
    grow_checkpoint(tmp_path / "source", tmp_path / "target", plan, "reset")
    assert not (tmp_path / "target/zeros.distcp").exists()
    assert_reads_as(tmp_path / "target", GrownSource(DistCheckpoint(tmp_path / "source"), plan, "reset"))


def test_layers_stored_together_are_written_not_linked(
    tmp_path: Path, plan: GrowthPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "_cut", lambda tensor, parts, stacked: [((0,) * tensor.dim(), tensor)])
    write_distributed(tmp_path / "source", stack(model_tensors(SOURCE), 3))
    _sign(tmp_path / "source")
    result = grow_checkpoint(tmp_path / "source", tmp_path / "target", plan, "carry")
    assert result.bytes_linked == 0
    assert_reads_as(tmp_path / "target", GrownSource(DistCheckpoint(tmp_path / "source"), plan, "carry"))
