"""No file of a checkpoint or of a Hugging Face folder runs code, in any command: all ways in, one by one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.manifest import FileEntry, read_manifest, validate_checkpoint, write_manifest
from tests.checkpoint.hostile import CHECKPOINTS, FOLDERS, hostile_checkpoint
from tests.checkpoint.huggingface_models import write_llama
from tests.conftest import write_growing_config
from tests.ranks import run_ranks

KEY = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def config(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_growing_config(tmp_path_factory.mktemp("hostile"), prepared_corpus)


@pytest.fixture(scope="module")
def checkpoint(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``train`` writes it after two steps."""
    run = tmp_path_factory.mktemp("run")
    ((code, printed),) = run_ranks("tests.workers:run_mains", 1, {"commands": [_train(config, run, steps=2)]})[0]
    assert code == 0, printed
    return run / "checkpoints/step_00000002"


def _train(config: Path, run: Path, steps: int) -> list[str]:
    one_stage = f"stages=[{{name: base, model: {{num_layers: 2}}, training: {{steps: {steps}}}}}]"
    return ["train", str(config), f"run.directory={run}", one_stage]


def _ends_with_a_message(code: int, printed: str, command: str) -> None:
    assert code in (0, 1, 2, 77), printed
    assert "Traceback" not in printed
    assert code == 0 or f"growth-megatron {command}: " in printed, printed


@pytest.mark.parametrize("sample", CHECKPOINTS)
def test_no_command_that_reads_a_checkpoint_runs_its_code(
    sample: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    hostile = str(hostile_checkpoint(checkpoint, tmp_path / "hostile", sample, marker))
    foreign = shutil.copytree(hostile, tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    settings = ["num_attention_heads=4", "rope_base=10000", "norm_epsilon=1e-5", "sequence_length=32"]
    commands = [
        ["inspect", hostile],
        ["inspect", hostile, "--tensor", KEY],
        ["verify", hostile, "--full"],
        ["grow", hostile, str(tmp_path / "linked"), "--set", "num_layers=4"],
        ["verify", str(tmp_path / "linked"), "--full"],
        ["grow", hostile, str(tmp_path / "written"), "--materialize", "--set", "num_layers=4"],
        ["grow", hostile, f"hf:{tmp_path / 'grown_hf'}", "--set", "num_layers=4"],
        ["export-hf", hostile, str(tmp_path / "exported")],
        ["import-megatron", str(foreign), str(tmp_path / "imported"), "--set", *settings],
        ["import-megatron", str(foreign), str(tmp_path / "weights"), "--weights-only", "--set", *settings],
    ]
    for command in commands:
        code = main(command)
        _ends_with_a_message(code, "".join(capfd.readouterr()), command[0])
        assert not marker.exists(), command


def test_no_checkpoint_that_train_resumes_from_runs_its_code_and_the_one_before_it_is_taken(
    checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    commands = []
    for number, sample in enumerate(CHECKPOINTS):
        run = tmp_path / f"alone_{number}"
        hostile_checkpoint(checkpoint, run / "checkpoints" / checkpoint.name, sample, tmp_path / "ran")
        beside = tmp_path / f"beside_{number}"
        shutil.copytree(checkpoint, beside / "checkpoints" / checkpoint.name)
        hostile_checkpoint(checkpoint, beside / "checkpoints/step_00000003", sample, tmp_path / "ran")
        commands += [_train(config, run, steps=3), _train(config, beside, steps=3)]
    outcomes: list[Any] = run_ranks("tests.workers:run_mains", 1, {"commands": commands})[0]
    for number, sample in enumerate(CHECKPOINTS):
        (alone, said), (beside, beside_said) = outcomes[2 * number : 2 * number + 2]
        assert (alone, "Traceback" in said, "weights_only" in said) == (77, False, False), f"{sample}: {said}"
        assert beside == 0, f"{sample}: {beside_said}"
        assert f"skipped {tmp_path / f'beside_{number}' / 'checkpoints/step_00000003'}: " in beside_said
    assert not (tmp_path / "ran").exists()


def test_several_ranks_agree_on_what_cannot_be_loaded(checkpoint: Path, config: Path, tmp_path: Path) -> None:
    """At TP2 the ranks read different tensors."""
    commands = []
    for number, sample in enumerate(("tensor chunk", "byte object, raw")):
        run = tmp_path / f"run_{number}"
        shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
        hostile_checkpoint(checkpoint, run / "checkpoints/step_00000003", sample, tmp_path / "ran")
        commands.append([*_train(config, run, steps=3), "parallel.tensor_parallel_size=2"])
    for outcomes in run_ranks("tests.workers:run_mains", 2, {"commands": commands}):
        assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("sample", FOLDERS)
def test_no_command_that_reads_a_hugging_face_folder_runs_its_code(
    sample: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    marker, folder = tmp_path / "ran", tmp_path / "hf"
    write_llama(folder, {})
    FOLDERS[sample](folder, marker)
    commands = [
        ["inspect", f"hf:{folder}"],
        ["import-hf", str(folder), str(tmp_path / "imported")],
        ["grow", f"hf:{folder}", f"hf:{tmp_path / 'grown'}", "--set", "num_layers=4"],
        ["export-hf", str(checkpoint), str(tmp_path / "exported"), "--tokenizer", str(folder), "--verify"],
        ["export-hf", str(checkpoint), str(tmp_path / "b"), "--tokenizer", str(folder / "tokenizer.model")],
    ]
    for command in commands:
        code = main(command)
        _ends_with_a_message(code, "".join(capfd.readouterr()), command[0])
        assert not marker.exists(), command


def test_negative_control_without_the_repair_a_byte_object_runs_its_code(
    checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    hostile = tmp_path / "run/checkpoints" / checkpoint.name
    hostile_checkpoint(checkpoint, hostile, "byte object, saved", tmp_path / "ran")
    arguments = {"commands": [_train(config, tmp_path / "run", steps=3)]}
    run_ranks("tests.workers:run_mains", 1, arguments, without=("_load_objects_as_data",))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/../../outside"])
def test_a_manifest_that_names_files_outside_is_refused_and_nothing_is_written(
    name: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile = shutil.copytree(checkpoint, tmp_path / "a/hostile")
    entry = FileEntry(size_bytes=0, sha256="0" * 64)
    manifest = read_manifest(hostile)
    write_manifest(hostile, manifest.model_copy(update={"files": {**manifest.files, name: entry}}))
    (tmp_path / "a/outside").touch()
    before = set(tmp_path.rglob("*"))
    for command in (
        ["grow", str(hostile), str(tmp_path / "b/target"), "--set", "num_layers=4"],
        ["verify", str(hostile)],
    ):
        assert main(command) == 2
        assert "outside of its folder; do not trust it" in "".join(capfd.readouterr())
    assert set(tmp_path.rglob("*")) == before


def test_what_else_stands_in_a_run_stops_none_that_has_a_checkpoint(
    checkpoint: Path, config: Path, tmp_path: Path
) -> None:
    """``latest`` as a folder is left alone; a run's own names are taken, whatever stands there."""
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
    (run / "latest").mkdir()
    (run / "latest/note").write_text("mine")
    for name in ("step_00000001", "step_00000004", ".tmp_step_00000006", ".trash_step_00000003"):
        (run / "checkpoints" / name).write_text("no folder")
    (run / "checkpoints/step_00000000").symlink_to("nowhere")
    (run / "checkpoints/step_00000006").symlink_to("elsewhere")
    commands = [[*_train(config, run, steps=6), "checkpoint.keep_last=1"]]
    ((code, printed),) = run_ranks("tests.workers:run_mains", 1, {"commands": commands})[0]
    assert code == 0, printed
    assert "skipped" in printed
    assert "step_00000004: not a folder" in printed
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name[0] != "."] == ["step_00000006"]
    assert validate_checkpoint(run / "checkpoints/step_00000006", full=True) is None
    assert not (run / "checkpoints/step_00000006").is_symlink()
    assert (run / "latest/note").read_text() == "mine"
