"""Models come in from Hugging Face folders and go out to them by the command line, and train in between."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from growth_megatron.__main__ import main, parser_for
from growth_megatron.checkpoint.folder.manifest import read_manifest, validate_checkpoint
from growth_megatron.checkpoint.huggingface import verify as huggingface_verify
from growth_megatron.checkpoint.huggingface.reader import HuggingFaceCheckpoint
from growth_megatron.checkpoint.huggingface.tokenizer import tokenizer_files
from growth_megatron.checkpoint.huggingface.writer import ExportedWeights
from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.progress_bar import bytes_progress
from growth_megatron.data.tokenizer import Tokenizer
from growth_megatron.errors import EXIT_FAULT, EXIT_OK, EXIT_USAGE, CheckpointError
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import split_state_key
from tests.checkpoint.huggingface_models import edit_json, logits_of, write_llama
from tests.checkpoint.interchange_workers import FIRST_VALIDATION
from tests.checkpoint.test_huggingface_export import assert_same, tensors_of
from tests.checkpoint.written import geometry, manifest_of, write_checkpoint
from tests.conftest import VOCABULARY, write_growing_config
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")

# write_growing_config's base stage
TRAINABLE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
MODELS: dict[str, dict[str, Any]] = {
    "float32": TRAINABLE,
    "bfloat16": {**TRAINABLE, "dtype": "bfloat16"},
    "float16": {**TRAINABLE, "dtype": "float16"},
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``NAME/hf`` and ``NAME/checkpoint`` for each of ``MODELS``."""
    folder = tmp_path_factory.mktemp("imported")
    for name, case in MODELS.items():
        write_llama(folder / name / "hf", case)
        assert main(["import-hf", str(folder / name / "hf"), str(folder / name / "checkpoint")]) == EXIT_OK
    return folder


@pytest.fixture(scope="module")
def trained(imported: Path, prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with runs that went on from the imported checkpoints: one of each model, and ``float32`` at TP2."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_growing_config(folder, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["stages"] = [{"name": "base", "model": {"num_layers": 2}, "training": {"steps": 2}}]
    content["model"] |= {"vocab_multiple": 4, "norm_epsilon": 1e-5}
    path.write_text(yaml.safe_dump(content))

    def run(model: str, name: str, *more: str) -> dict[str, Any]:
        resume = f"checkpoint.resume={imported / model / 'checkpoint'}"
        return {"config": str(path), "overrides": [f"run.directory={folder / name}", resume, *more]}

    worker = "tests.checkpoint.interchange_workers:train_after_validation"
    one = {"runs": [run(name, name) for name in MODELS]}
    assert run_ranks(worker, 1, one)[0] == [0] * len(MODELS)
    two = {"runs": [run("float32", "TP2", "parallel.tensor_parallel_size=2")]}
    assert run_ranks(worker, 2, two)[0] == [0]
    return folder


def _loss_of(folder: Path, samples: list[dict[str, list[int]]]) -> float:
    """Mean cross-entropy of transformers on ``samples``."""
    tokens = torch.tensor([sample["tokens"] for sample in samples])
    labels = torch.tensor([sample["labels"] for sample in samples])
    return float(torch.nn.functional.cross_entropy(logits_of(folder, tokens).flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize(("run", "model"), [*((name, name) for name in MODELS), ("TP2", "float32")])
def test_training_starts_at_the_loss_that_transformers_has(trained: Path, imported: Path, run: str, model: str) -> None:
    first = json.loads((trained / run / FIRST_VALIDATION).read_text())
    assert len(first["samples"]) == 8
    assert first["loss"] == pytest.approx(_loss_of(imported / model / "hf", first["samples"]), abs=1e-5)
    records = [json.loads(line) for line in (trained / run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "validation"][-1]
    assert last["step"] == 2
    assert last["validation_loss"] != first["loss"]


def test_an_imported_checkpoint_is_that_of_a_run_before_its_first_step(imported: Path) -> None:
    for name in MODELS:
        path = imported / name / "checkpoint"
        assert validate_checkpoint(path, full=True) is None
        manifest, source = read_manifest(path), HuggingFaceCheckpoint(imported / name / "hf")
        assert (manifest.step, manifest.stage, manifest.stage_step, manifest.consumed_tokens) == (0, 0, 0, 0)
        assert manifest.has_optimizer_state
        assert manifest.geometry == source.geometry
        stored = DistCheckpoint(path)
        assert len(stored.keys()) == 4 * len(tensor_shapes(source.geometry))
        for key in stored.keys():
            prefix, weight = split_state_key(key)
            values, expected = stored.read(key), source.read(weight)
            if "exp_avg" in prefix:
                assert not values.any()
            else:
                assert values.dtype == (torch.float32 if prefix else expected.dtype)
                assert torch.equal(values, expected.to(values.dtype))


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_are_bit_equal(imported: Path, tmp_path: Path, name: str, capsys: Any) -> None:
    assert main(["export-hf", str(imported / name / "checkpoint"), str(tmp_path / "out"), "--verify"]) == EXIT_OK
    assert_same(tensors_of(tmp_path / "out"), tensors_of(imported / name / "hf"))
    printed = capsys.readouterr().out
    assert "logits: transformers and this library differ by" in printed
    assert "tokenizer  none, but special ids" in printed
    assert "tokenizer: no token ids to compare" in printed


def test_a_trained_run_is_exported_with_its_tokenizer_and_verified(
    trained: Path, prepared_corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["export-hf", str(trained / "bfloat16"), str(tmp_path / "out"), "--verify", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "tokenizer  of the checkpoint" in printed
    assert "tokenizer: the same ids for 5 of 5 texts" in printed
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    text = "growth of a  small model\n"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text).input_ids == Tokenizer(prepared_corpus / "tokenizer.model").encode(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        model.generate(**theirs("growth", return_tensors="pt"), max_new_tokens=3, do_sample=False)


def test_an_export_of_other_weights_fails_the_verification_with_exit_code_1(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def swapped(self: ExportedWeights, key: str, region: Any) -> torch.Tensor:
        values = real(self, key, region)
        return values.flip(0) if key.endswith("0.mlp.linear_fc1.weight") else values

    real = ExportedWeights.read
    monkeypatch.setattr(ExportedWeights, "read", swapped)
    write, check = str(tmp_path / "out"), huggingface_verify.check_logits

    def check_with_the_true_weights(*arguments: Any) -> float:
        monkeypatch.setattr(ExportedWeights, "read", real)
        return check(*arguments)

    monkeypatch.setattr(huggingface_verify, "check_logits", check_with_the_true_weights)
    assert main(["export-hf", str(imported / "float32" / "checkpoint"), write, "--verify"]) == EXIT_FAULT
    assert "logits differ from the checkpoint's by" in capsys.readouterr().err


def test_a_folder_that_transformers_finds_incomplete_fails_the_verification(tmp_path: Path) -> None:
    write_llama(tmp_path, {})
    source = HuggingFaceCheckpoint(tmp_path)
    assert huggingface_verify.check_logits(tmp_path, source, source.geometry) < huggingface_verify.LIMIT
    edit_json(tmp_path / "config.json", num_hidden_layers=3)
    with pytest.raises(huggingface_verify.ExportMismatchError, match="does not find this model in it"):
        huggingface_verify.check_logits(tmp_path, source, source.geometry)


def test_a_tokenizer_with_other_ids_fails_the_verification(prepared_corpus: Path, tmp_path: Path) -> None:
    model = geometry(vocab_size=VOCABULARY)
    for name, content in tokenizer_files(prepared_corpus / "tokenizer.model", model).written.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert huggingface_verify.check_tokenizer(tmp_path, prepared_corpus / "tokenizer.model") == 5
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(huggingface_verify.ExportMismatchError, match="the exported tokenizer gives"):
        huggingface_verify.check_tokenizer(tmp_path, prepared_corpus / "tokenizer.model")


def test_without_transformers_verify_says_how_to_install_it(
    imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = ["export-hf", str(imported / "float32" / "checkpoint"), str(tmp_path / "out")]
    assert main([*arguments, "--verify"]) == EXIT_USAGE
    assert "pip install 'growth-megatron[hf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments) == EXIT_OK


def _with_config(folder: Path, prepared_corpus: Path, fingerprint: dict[str, Any] | None = None) -> Path:
    """A checkpoint with the configuration of a run in it."""
    folder.mkdir()
    path = write_growing_config(folder, prepared_corpus)
    model = geometry(vocab_size=VOCABULARY)
    write_checkpoint(folder / "checkpoint", model, manifest_of(model, data_fingerprint=fingerprint))
    path.rename(folder / "checkpoint" / "config.yaml")
    return folder / "checkpoint"


def test_a_tokenizer_that_is_gone_or_another_one_is_left_out_and_that_is_said(
    prepared_corpus: Path, tmp_path: Path, capsys: Any
) -> None:
    other = _with_config(tmp_path / "a", prepared_corpus, {"tokenizer_sha256": "0" * 64})
    assert main(["export-hf", str(other), str(tmp_path / "out_a")]) == EXIT_OK
    assert "is another file than the run was trained with; give --tokenizer" in capsys.readouterr().out
    gone = _with_config(tmp_path / "b", prepared_corpus)
    config = (gone / "config.yaml").read_text()
    (gone / "config.yaml").write_text(config.replace("tokenizer.model", "gone.model"))
    assert main(["export-hf", str(gone), str(tmp_path / "out_b")]) == EXIT_OK
    assert "gone.model, named in" in capsys.readouterr().out
    assert not (tmp_path / "out_b" / "tokenizer.json").exists()
    given = ["--tokenizer", str(prepared_corpus / "tokenizer.model")]
    assert main(["export-hf", str(gone), str(tmp_path / "out_c"), *given]) == EXIT_OK
    assert (tmp_path / "out_c" / "tokenizer.json").exists()
    assert main(["export-hf", str(gone), str(tmp_path / "out_d"), "--tokenizer", "nowhere.model"]) == EXIT_USAGE


def test_import_refuses_what_is_no_model_and_a_target_that_exists(imported: Path, tmp_path: Path, capsys: Any) -> None:
    checkpoint = imported / "float32" / "checkpoint"
    assert main(["import-hf", str(tmp_path), str(tmp_path / "new")]) == EXIT_USAGE
    assert "config.json is missing" in capsys.readouterr().err
    own = tmp_path / "own"
    own.mkdir()
    (own / "metadata.json").write_text("{}")
    for more in ([], ["--overwrite"]):
        assert main(["import-hf", str(imported / "float32" / "hf"), str(own), *more]) == EXIT_USAGE
        assert "exists; name a new folder, or remove it yourself" in capsys.readouterr().err
    assert list(own.iterdir()) == [own / "metadata.json"]
    assert main(["import-hf", str(imported / "float32" / "hf"), str(checkpoint)]) == EXIT_USAGE
    assert "exists; name a new folder, add --overwrite" in capsys.readouterr().err


def test_a_source_is_a_checkpoint_a_run_or_a_hugging_face_folder(tmp_path: Path) -> None:
    write_llama(tmp_path / "hf", {})
    model = geometry()
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints" / "step_00000100", model)
    (run / "latest").symlink_to("checkpoints/step_00000100")
    for path in (run, run / "latest", run / "checkpoints", run / "checkpoints" / "step_00000100"):
        located = find_origin(str(path))
        assert isinstance(located.tensors, DistCheckpoint)
        assert (located.path.name, located.geometry) == ("step_00000100", model)
        assert located.manifest == read_manifest(located.path)
    for prefix in ("", "hf:"):
        located = find_origin(f"{prefix}{tmp_path / 'hf'}")
        assert isinstance(located.tensors, HuggingFaceCheckpoint)
        assert (located.path, located.is_of_a_run, located.manifest.step) == (tmp_path / "hf", False, 0)
        assert located.geometry == located.tensors.geometry


def test_a_step_of_a_run_is_a_source(trained: Path) -> None:
    run = next(path.parent for path in trained.rglob("checkpoints"))
    newest = find_origin(run)
    assert find_origin(f"{run}@{newest.manifest.step}").identity == newest.identity


def test_a_source_that_is_both_or_neither_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "both", {})
    write_checkpoint(tmp_path / "both", geometry())
    with pytest.raises(CheckpointError, match=r"could be a checkpoint \(.metadata\) and a Hugging Face folder.*hf:"):
        find_origin(str(tmp_path / "both"))
    assert isinstance(find_origin(f"hf:{tmp_path / 'both'}").tensors, HuggingFaceCheckpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is neither a checkpoint or a run"):
        find_origin(str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="does not exist"):
        find_origin(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="config.json is missing"):
        find_origin(f"hf:{tmp_path / 'empty'}")
    write_checkpoint(tmp_path / "damaged", geometry())
    (tmp_path / "damaged" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="__0_0.distcp is missing"):
        find_origin(str(tmp_path / "damaged"))


@pytest.mark.parametrize("command", ["import-hf", "export-hf"])
def test_help_has_examples_that_parse(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    examples = [line.strip() for line in capsys.readouterr().out.split("examples:\n")[1].splitlines()]
    assert examples
    for example in examples:
        arguments = shlex.split(example)[1:]
        options = parser_for(arguments).parse_args(arguments)
        assert options.command == command


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys: Any) -> None:
    with bytes_progress("writing", interval_s=0) as report:
        report(1 << 20, 1 << 22)
    with bytes_progress("writing") as report:
        report(1 << 20, 1 << 22)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("writing: 1.00 MiB of 4.00 MiB (25 %), ")
    assert line.endswith(" s left")
