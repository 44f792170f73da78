"""``verify`` finds out whether a grown checkpoint is what its record says, and says what it could not look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.manifest import (
    GrowthRecord,
    checksum_files,
    list_files,
    read_identified_manifest,
    read_manifest,
    write_manifest,
)
from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint, read_common
from growth_megatron.checkpoint.verify import Check
from growth_megatron.commands.verify import verify
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import EXIT_USAGE, CheckpointError, NothingValidError
from growth_megatron.growth import verify as module
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.operators import choose
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.verify import verify_checkpoints
from growth_megatron.growth.view import GrownSource
from tests.checkpoint.huggingface_models import CASES, edit_json, write_llama
from tests.checkpoint.written import extra_states, geometry, manifest_of, model_tensors, write_distributed

MODEL = geometry(2)
WIDE = geometry(2, hidden_size=16, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=18)
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"
Change = Callable[[dict[str, torch.Tensor]], Any]


def _write(folder: Path, model: ModelConfig, tensors: dict[str, torch.Tensor], step: float, **changes: Any) -> Path:
    write_distributed(folder, tensors, extra_states(model), parts=2, step=step)
    manifest = manifest_of(model, **changes)
    write_manifest(folder, manifest.model_copy(update={"files": checksum_files(folder, list_files(folder))}))
    return folder


def _source(folder: Path, optimizer: bool = True, change: Change = lambda tensors: None) -> Path:
    """A checkpoint whose weights are its masters, rounded, with gains around one."""
    tensors = model_tensors(MODEL, optimizer=optimizer)
    for key, tensor in list(tensors.items()):
        if not key.startswith("optimizer.state.exp"):
            tensors[key] = tensor / 4 + (1 if tensor.dim() == 1 else 0)
    for key in [key for key in tensors if key.startswith("optimizer.state.param.")]:
        tensors[key.removeprefix("optimizer.state.param.")] = tensors[key].bfloat16()
    change(tensors)
    return _write(folder, MODEL, tensors, 100.0)


def _grown(
    source: Path,
    target: Path,
    growth: GrowthConfig,
    model: ModelConfig = WIDE,
    change: Change = lambda tensors: None,
    step: float | None = None,
    **changes: Any,
) -> Path:
    """``source`` grown as recorded, except for what ``change`` does to the tensors."""
    plan = plan_growth(MODEL, model, growth, seed=3)
    policy = choose(growth).state_policy
    view = GrownSource(DistCheckpoint(source), plan, policy)
    tensors = {}
    for key in view.keys():
        tensors[key] = view.read(key, tuple(slice(0, size) for size in view.spec(key).shape)).contiguous()
    change(tensors)
    record = GrowthRecord(
        operator=plan.operator,
        options=dict(plan.options),
        layers=plan.layers,
        optimizer_state=policy,
        step=100,
        source=str(source),
        source_manifest_sha256=read_identified_manifest(source)[1],
        source_geometry=MODEL,
        target_geometry=model,
        seed=3,
        library_version="test",
    )
    if step is None:
        step = 0.0 if policy == "reset" else 100.0
    return _write(target, model, tensors, step, **({"stage": 1, "stage_step": 0, "lineage": (record,)} | changes))


def _verified(path: Path, full: bool = False) -> tuple[dict[str, Check], CheckpointError | None]:
    """Checks by subject, and the error at their end."""
    checks: dict[str, Check] = {}
    try:
        for check in verify_checkpoints(path, full):
            checks[check.subject] = check
    except CheckpointError as error:
        return checks, error
    return checks, None


def _outcomes(checks: dict[str, Check]) -> dict[str, str]:
    return {subject: check.outcome for subject, check in checks.items()}


SPLIT = GrowthConfig(operator="split", optimizer_state="carry")
GROWTHS: dict[str, tuple[GrowthConfig, ModelConfig]] = {
    "split": (SPLIT, WIDE),
    "split, uneven, noise": (GrowthConfig(operator="split", shares="uneven", cancelling_noise=0.5), WIDE),
    "identity": (GrowthConfig(operator="identity", optimizer_state="carry"), geometry(4)),
    "sparkling": (GrowthConfig(operator="sparkling"), WIDE),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", GROWTHS)
def test_a_growth_that_keeps_the_function_passes_every_check(tmp_path: Path, name: str, full: bool) -> None:
    growth, model = GROWTHS[name]
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", growth, model)
    checks, error = _verified(target, full)
    assert error is None
    assert _outcomes(checks) == dict.fromkeys(("files", "plan", "tensors", "optimizer", "logits"), "OK"), checks
    assert 0 <= checks["logits"].figures["relative_difference"] <= 2e-6
    assert ("every value" in checks["tensors"].text) is full


@pytest.mark.parametrize("name", ["stack", "random", "noise"])
def test_a_growth_that_changes_the_function_is_compared_by_its_tensors(tmp_path: Path, name: str) -> None:
    growth = GrowthConfig(operator="stack", noise=0.2) if name == "noise" else GrowthConfig(operator=name)
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", growth, geometry(4))
    checks, error = _verified(target, full=True)
    assert error is None
    assert checks["tensors"].outcome == "OK"
    assert checks["logits"].outcome == "SKIPPED"
    assert "does not keep the function" in checks["logits"].text


@pytest.mark.parametrize(
    ("growth", "model"),
    [
        (GrowthConfig(operator="stack"), geometry(3)),
        (GrowthConfig(operator="stack", layers=(0, 1, 1), optimizer_state="carry"), geometry(3)),
        (GrowthConfig(operator="split", optimizer_state="carry", multipliers=True), WIDE),
        (GrowthConfig(operator="zero", optimizer_state="asymmetric"), WIDE),
        (GrowthConfig(operator="stack+random"), geometry(3, hidden_size=16, num_attention_heads=8, num_query_groups=4)),
    ],
    ids=["stack", "stack, carry", "split", "zero", "stack+random"],
)
def test_what_a_growth_writes_passes(tmp_path: Path, growth: GrowthConfig, model: ModelConfig) -> None:
    plan = plan_growth(MODEL, model, growth, seed=5)
    grow_checkpoint(_source(tmp_path / "source"), tmp_path / "target", plan, choose(growth).state_policy)
    checks, error = _verified(tmp_path / "target", full=True)
    assert error is None, checks
    assert _outcomes(checks)["tensors"] == _outcomes(checks)["optimizer"] == "OK"
    assert _outcomes(checks)["logits"] == ("OK" if plan.function_preserving else "SKIPPED")
    assert ("step 0 " in checks["optimizer"].text) is (choose(growth).state_policy == "reset")
    assert (" 0 multipliers" in checks["optimizer"].text) is not growth.multipliers
    if growth.multipliers:
        write_manifest(tmp_path / "target", read_manifest(tmp_path / "target").model_copy(update={"multipliers": {}}))
        assert _verified(tmp_path / "target")[0]["optimizer"].outcome == "FAILED"


@pytest.mark.parametrize("case", ["GQA, several files", "tied, bfloat16, several files"])
def test_what_grew_from_a_hugging_face_folder_passes(tmp_path: Path, case: str) -> None:
    pytest.importorskip("transformers")
    write_llama(tmp_path / "folder", CASES[case])
    source = find_origin(str(tmp_path / "folder"))
    model = source.geometry.model_copy(update={"ffn_hidden_size": 120, "hidden_size": 96, "head_dim": 12})
    plan = plan_growth(source.geometry, model, GrowthConfig(operator="split"), seed=5)
    grow_checkpoint(source, tmp_path / "target", plan, "reset")
    checks, error = _verified(tmp_path / "target", full=True)
    assert error is None, checks
    assert _outcomes(checks) == dict.fromkeys(("files", "plan", "tensors", "optimizer", "logits"), "OK")
    edit_json(tmp_path / "folder" / "config.json", rms_norm_eps=1e-6)
    checks, error = _verified(tmp_path / "target")
    assert (error, checks["growth"].outcome) == (None, "SKIPPED")


@pytest.mark.parametrize("prefix", ["", "optimizer.state.param.", "optimizer.state.exp_avg_sq."])
def test_one_changed_value_is_found_and_named(tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 40)  # so that a tensor is many blocks

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[prefix + FC1][5, 7] += 0.5

    target = _grown(_source(tmp_path / "source"), tmp_path / "target", SPLIT, change=change)
    checks, error = _verified(target, full=True)
    assert checks["files"].outcome == "OK"  # its checksums were made after the change
    assert checks["tensors"].outcome == "FAILED"
    assert f"1 of 60 tensors are not what the plan gives: {prefix}{FC1}[5, 7] is " in checks["tensors"].text
    assert error is not None
    assert "target (tensors" in str(error)
    assert error.exit_code == EXIT_USAGE
    # The function is that of the masters, so neither the rounded weight nor a moment shows in the logits.
    assert checks["logits"].outcome == ("FAILED" if "param" in prefix else "OK")


def test_a_tensor_that_is_wrong_as_a_whole_is_found_by_a_sample(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["optimizer.state.exp_avg." + FC1] *= 2
        tensors["optimizer.state.exp_avg_sq.output_layer.weight"].zero_()

    target = _grown(_source(tmp_path / "source"), tmp_path / "target", SPLIT, change=change)
    checks, error = _verified(target)
    assert error is not None
    assert checks["tensors"].figures["wrong_tensors"] == 2
    assert FC1 in checks["tensors"].text
    assert "output_layer" in checks["tensors"].text


def test_the_sample_is_small_spread_and_the_same_each_time() -> None:
    for rows in (1, 6, 7, 64, 1000):
        regions = list(module._sampled_rows("key", (rows, 3)))
        assert regions == list(module._sampled_rows("key", (rows, 3)))
        chosen = [row for rows_of, _ in regions for row in range(rows_of.start, rows_of.stop)]
        assert len(chosen) <= 6
        assert {0, rows - 1} <= set(chosen)
        assert all(any(4 * row // rows == quarter for row in chosen) for quarter in range(4)) or rows < 4
    assert list(module._sampled_rows("a", (1000, 3))) != list(module._sampled_rows("b", (1000, 3)))


def test_zero_with_another_sign_is_another_value(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["optimizer.state.exp_avg.decoder.final_layernorm.weight"][0] = -0.0

    growth = GrowthConfig(operator="split")
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", growth, change=change)
    checks, _ = _verified(target)
    assert "[0] is -0, the plan gives 0" in checks["tensors"].text


def test_a_plan_with_a_wrong_factor_fails_by_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are what the wrong plan gives; only the function tells."""

    def wrong(plan: GrowthPlan) -> GrowthPlan:
        (number,) = (
            number for number, rule in enumerate(plan.rules) if rule.target.endswith("1.mlp.linear_fc2.weight")
        )
        rows, columns = plan.rules[number].axes
        assert columns.scale is not None
        columns = replace(columns, scale=tuple(1.001 * scale for scale in columns.scale))
        rule = replace(plan.rules[number], axes=(rows, columns))
        return replace(plan, rules=(*plan.rules[:number], rule, *plan.rules[number + 1 :]))

    planned, recorded = plan_growth, module.plan_of_record
    monkeypatch.setitem(globals(), "plan_growth", lambda *given, **named: wrong(planned(*given, **named)))
    monkeypatch.setattr(module, "plan_of_record", lambda record: wrong(recorded(record)))
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", SPLIT)
    checks, error = _verified(target, full=True)
    assert _outcomes(checks)["tensors"] == "OK"
    assert checks["logits"].outcome == "FAILED"
    assert min(checks["logits"].figures.values()) > 1e-5
    assert "in float64" in checks["logits"].text
    assert "logits" in str(error)


def test_where_float32_is_too_coarse_float64_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", SPLIT)
    figure = _verified(target)[0]["logits"].figures["relative_difference"]
    assert figure > 0
    monkeypatch.setattr(module, "TOLERANCE", figure / 2)
    checks, error = _verified(target)
    assert error is None
    assert checks["logits"].figures["relative_difference_float64"] < 1e-12  # all factors are powers of two
    monkeypatch.setattr(module, "TOLERANCE", -1)
    assert _verified(target)[0]["logits"].outcome == "FAILED"


@pytest.mark.parametrize(("policy", "step"), [("reset", 100.0), ("carry", 0.0)])
def test_another_optimizer_step_is_noticed(tmp_path: Path, policy: str, step: float) -> None:
    growth = GrowthConfig(operator="split", optimizer_state=policy)
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", growth, step=step)
    checks, error = _verified(target)
    assert error is not None
    assert _outcomes(checks) == dict.fromkeys(("files", "plan", "tensors", "logits"), "OK") | {"optimizer": "FAILED"}
    assert f"step {step:g}, but {policy} gives" in checks["optimizer"].text


def test_weights_alone_are_compared_but_their_rounding_is_no_function(tmp_path: Path) -> None:
    growth = GrowthConfig(operator="split")
    target = _grown(_source(tmp_path / "source", optimizer=False), tmp_path / "target", growth)
    checks, error = _verified(target)
    assert error is None
    assert "15 weights and 0 tensors of optimizer state" in checks["tensors"].text
    assert checks["optimizer"].outcome == "SKIPPED"
    assert checks["logits"].outcome == "SKIPPED"


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.layers.7.mlp.linear_fc1.weight"] = tensors.pop(f"optimizer.state.exp_avg.{FC1}")
        tensors["optimizer.state.param.output_layer.weight"] = tensors["output_layer.weight"]

    target = _grown(_source(tmp_path / "source"), tmp_path / "target", SPLIT, change=change)
    checks, _ = _verified(target)
    for words in (
        f"optimizer.state.exp_avg.{FC1} is missing",
        "decoder.layers.7.mlp.linear_fc1.weight is not of this model",
        "optimizer.state.param.output_layer.weight is (32, 16) in torch.bfloat16",
    ):
        assert words in checks["tensors"].text


def test_later_checkpoints_have_trained_on(tmp_path: Path) -> None:
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", SPLIT)
    for changes in ({"step": 120, "stage_step": 20}, {"step": 100, "stage_step": 5}, {"step": 120, "stage_step": 0}):
        write_manifest(target, read_manifest(target).model_copy(update=changes))
        checks, error = _verified(target)
        assert error is None
        assert _outcomes(checks) == {"files": "OK", "growth": "SKIPPED"}
        assert "trained on since its growth at step 100" in checks["growth"].text


def test_a_checkpoint_that_was_not_grown_has_no_such_checks(tmp_path: Path) -> None:
    assert set(_verified(_source(tmp_path / "source"), full=True)[0]) == {"files"}


def test_a_source_that_is_gone_damaged_or_another_is_no_fault(tmp_path: Path) -> None:
    source = _source(tmp_path / "a" / "source")
    target = _grown(source, tmp_path / "b" / "target", SPLIT)
    (source / "common.pt").rename(tmp_path / "common.pt")
    checks, error = _verified(target)
    assert (error, checks["growth"].outcome) == (None, "SKIPPED")
    assert "is damaged: common.pt is missing" in checks["growth"].text
    (tmp_path / "common.pt").rename(source / "common.pt")
    write_manifest(source, read_manifest(source).model_copy(update={"consumed_tokens": 1}))
    checks, error = _verified(target)
    assert (error, checks["growth"].outcome) == (None, "SKIPPED")
    assert "another checkpoint now than it was at the growth" in checks["growth"].text
    shutil.rmtree(source)
    checks, error = _verified(target)
    assert (error, checks["growth"].outcome) == (None, "SKIPPED")
    assert f"the source {source} is no longer there" in checks["growth"].text


def test_a_run_that_was_moved_finds_its_source_beside_the_grown_one(tmp_path: Path) -> None:
    _grown(_source(tmp_path / "old" / "source"), tmp_path / "old" / "target", SPLIT)
    (tmp_path / "old").rename(tmp_path / "new")
    assert _outcomes(_verified(tmp_path / "new" / "target")[0])["tensors"] == "OK"


@pytest.mark.parametrize("changed", ["operator", "geometry"])
def test_a_record_that_gives_no_plan_is_a_fault(tmp_path: Path, changed: str) -> None:
    target = _grown(_source(tmp_path / "source"), tmp_path / "target", SPLIT)
    manifest = read_manifest(target)
    changes: dict[str, Any] = {"geometry": geometry(2)}
    if changed == "operator":
        changes = {"lineage": (manifest.lineage[0].model_copy(update={"operator": "fold"}),)}
    write_manifest(target, manifest.model_copy(update=changes))
    checks, error = _verified(target)
    assert error is not None
    assert checks["plan"].outcome == "FAILED"
    assert ("fold" in checks["plan"].text) is (changed == "operator")


def test_a_whole_run_is_gone_through_and_damage_comes_first(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    _grown(_source(checkpoints / "step_00000090"), checkpoints / "step_00000100", SPLIT)
    subjects = [check.subject for check in verify_checkpoints(tmp_path / "run")]
    assert subjects == ["files", "plan", "tensors", "optimizer", "logits", "files"]
    for folder in checkpoints.iterdir():
        (folder / "common.pt").unlink()
    with pytest.raises(NothingValidError):
        list(verify_checkpoints(tmp_path / "run"))


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _source(tmp_path / "source")
    verify(_grown(source, tmp_path / "good", SPLIT), full=False, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["OK"] * 5
    assert "differ from the source's by" in lines[-1]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"optimizer.state.param.{FC1}"] *= 1.5

    bad = _grown(source, tmp_path / "bad", SPLIT, change=change)
    with pytest.raises(CheckpointError):
        verify(bad, full=False, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], "bad (tensors)" in answer["error"]) == (False, True)
    found = {check["subject"]: check for check in answer["checks"]}
    assert {subject for subject, check in found.items() if check["outcome"] == "FAILED"} == {"tensors", "logits"}
    assert found["logits"]["relative_difference"] > 2e-6
    verify(source, full=True, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["error"], len(answer["checks"])) == (True, None, 1)


def test_values_that_are_not_numbers_are_equal_but_no_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _source(
        tmp_path / "source", change=lambda tensors: tensors[f"optimizer.state.param.{FC1}"].fill_(float("nan"))
    )
    target = _grown(source, tmp_path / "target", SPLIT)
    with pytest.raises(CheckpointError, match=r"target \(logits\)"):
        verify(target, full=True, as_json=True)
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert answer["checks"][-1]["relative_difference"] is None


def test_the_written_step_is_the_one_that_is_read(tmp_path: Path) -> None:
    assert set(module._steps(read_common(_source(tmp_path / "source")))) == {100.0}


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bfloat16"]])
@pytest.mark.parametrize("source", ["checkpoint", "hf"])
def test_a_grown_hugging_face_folder_is_compared_with_its_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, dtype: list[str]
) -> None:
    pytest.importorskip("transformers")
    write_llama(tmp_path / "hf", {"vocab_size": 100})
    assert main(["import-hf", f"hf:{tmp_path / 'hf'}", str(tmp_path / "checkpoint")]) == 0
    target, wide = tmp_path / "grown", ["num_layers=3", "hidden_size=96", "num_attention_heads=8"]
    named = "hf:" * (source == "hf") + str(tmp_path / source)
    how = ["--operator", "identity+split", "--set", *wide, *dtype]
    assert main(["grow", named, f"hf:{target}", *how]) == 0
    for path in (str(target), f"hf:{target}"):
        capsys.readouterr()
        assert main(["verify", path, "--full"]) == 0
        lines = [(line.split()[0], line.split()[2]) for line in capsys.readouterr().out.splitlines()]
        logits = "SKIPPED" if dtype else "OK"
        assert lines == [("OK", "files:"), ("OK", "plan:"), ("OK", "tensors:"), (logits, "logits:")]
    file = target / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(target), "--full"]) == EXIT_USAGE
    assert "1 of " in (printed := capsys.readouterr().out)
    assert "tensors are not what the plan gives" in printed
    (target / "growth_record.json").unlink()
    assert main(["verify", str(target)]) == 0
