"""LLaMA 3 with scaled RoPE, Qwen2 and Qwen3 come in, train, grow and go out with the function that transformers has."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.huggingface.config import TokenIds, config_of_geometry
from growth_megatron.checkpoint.huggingface.reader import HuggingFaceCheckpoint
from growth_megatron.errors import EXIT_OK, CheckpointError
from growth_megatron.model.reference import reference_logits
from tests.checkpoint.huggingface_models import difference, edit_json, logits_of, prompt, write_llama
from tests.checkpoint.interchange_workers import FIRST_VALIDATION
from tests.checkpoint.test_huggingface_export import assert_same, tensors_of
from tests.conftest import VOCABULARY, write_growing_config
from tests.growth.in_memory import small
from tests.ranks import run_ranks

pytest.importorskip("transformers")

SCALED = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("Llama", {**SIZES, "rope_parameters": SCALED}),
    "qwen2": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 32}),
}
LAYOUTS = {"TP2": "parallel.tensor_parallel_size=2", "PP2": "parallel.pipeline_parallel_size=2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``FAMILY/hf``, as transformers writes it, and ``FAMILY/checkpoint``, as import-hf does."""
    folder = tmp_path_factory.mktemp("families")
    for name, (kind, case) in FAMILIES.items():
        write_llama(folder / name / "hf", case, kind)
        assert main(["import-hf", str(folder / name / "hf"), str(folder / name / "checkpoint")]) == EXIT_OK
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(models: Path, name: str) -> None:
    checkpoint = HuggingFaceCheckpoint(models / name / "hf")
    tokens = prompt(VOCABULARY)
    ours = reference_logits(checkpoint, checkpoint.geometry, tokens)
    assert difference(ours[..., :VOCABULARY], logits_of(models / name / "hf", tokens)) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_import_and_export_give_the_same_folder(models: Path, name: str, tmp_path: Path) -> None:
    assert main(["export-hf", str(models / name / "checkpoint"), str(tmp_path / "hf"), "--verify"]) == EXIT_OK
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(models / name / "hf"))
    theirs, ours = (
        json.loads((folder / "config.json").read_text()) for folder in (models / name / "hf", tmp_path / "hf")
    )
    assert ours["model_type"] == theirs["model_type"]
    assert ours["architectures"] == theirs["architectures"]
    tokens = prompt(VOCABULARY)
    assert torch.equal(logits_of(tmp_path / "hf", tokens), logits_of(models / name / "hf", tokens))


def test_an_imported_family_trains_from_its_own_loss_at_every_layout(
    models: Path, prepared_corpus: Path, tmp_path: Path
) -> None:
    path = write_growing_config(tmp_path, prepared_corpus)
    content = yaml.safe_load(path.read_text())
    content["stages"] = [{"name": "base", "model": {"num_layers": 2}, "training": {"steps": 2}}]
    content["model"] |= {"vocab_multiple": 4}
    path.write_text(yaml.safe_dump(content))
    settings = {
        "llama3": "model={norm_epsilon: 1e-5, rope_scaling: {type: llama3, factor: 4.0, "
        "original_max_position_embeddings: 16}}",
        "qwen2": "model={norm_epsilon: 1e-5, attention_bias: true, tie_embeddings: true}",
        "qwen3": "model={norm_epsilon: 1e-5, qk_norm: true, head_dim: 32}",
    }
    runs = []
    for name in FAMILIES:
        for layout, option in LAYOUTS.items():
            resume = f"checkpoint.resume={models / name / 'checkpoint'}"
            directory = f"run.directory={tmp_path / (name + layout)}"
            runs.append({"config": str(path), "overrides": [directory, resume, settings[name], option]})
    assert run_ranks("tests.checkpoint.interchange_workers:train_after_validation", 2, {"runs": runs})[0] == [0] * len(
        runs
    )
    for name in FAMILIES:
        losses = {layout: _losses(tmp_path / (name + layout)) for layout in LAYOUTS}
        first = json.loads((tmp_path / f"{name}TP2" / FIRST_VALIDATION).read_text())
        assert first["loss"] == pytest.approx(_transformers_loss(models / name / "hf", first["samples"]), rel=1e-5)
        assert losses["TP2"] == pytest.approx(losses["PP2"], abs=1e-5)
        assert losses["TP2"][-1] != losses["TP2"][0]


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def _transformers_loss(folder: Path, samples: list[dict[str, Any]]) -> float:
    tokens, labels = (torch.tensor([sample[name] for sample in samples]) for name in ("tokens", "labels"))
    return float(F.cross_entropy(logits_of(folder, tokens).flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_grows_from_folder_to_folder_and_keeps_its_function(models: Path, name: str, tmp_path: Path) -> None:
    source, target = models / name / "hf", tmp_path / "grown"
    wide = ["num_layers=3", "hidden_size=128", "num_attention_heads=8", "num_query_groups=4", "ffn_hidden_size=150"]
    arguments = ["grow", f"hf:{source}", f"hf:{target}", "--operator", "identity+split", "--set", *wide]
    if name != "qwen3":
        arguments.append("head_dim=16")
    assert main(arguments) == EXIT_OK
    tokens = prompt(VOCABULARY)
    assert difference(logits_of(target, tokens), logits_of(source, tokens)) < 1e-5


def test_the_type_of_a_grown_folder_can_be_chosen(models: Path, tmp_path: Path, capsys: Any) -> None:
    grow = ["grow", f"hf:{models / 'qwen2' / 'hf'}"]
    more = ["--set", "num_layers=3", "--dtype", "bfloat16"]
    written = []
    for dtype, name in (([], "as_it_is"), (more[2:], "smaller")):
        assert main([*grow, f"hf:{tmp_path / name}", *more[:2], *dtype]) == EXIT_OK
        written.append(re.findall(r"read, (\S+ \S+) written", capsys.readouterr().out))
    assert written[0] != written[1]
    exact, cast = tensors_of(tmp_path / "as_it_is"), tensors_of(tmp_path / "smaller")
    assert all(torch.equal(exact[key].bfloat16(), cast[key]) for key in exact)
    assert json.loads((tmp_path / "smaller" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert main([*grow, str(tmp_path / "checkpoint"), *more]) == 2
    assert "name one as hf:TARGET, or leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("Llama", {"model_type": "mixtral"}, "model_type is 'mixtral'; allowed: llama, mistral, qwen2, qwen3"),
        ("Llama", {"model_type": "qwen2_moe"}, "Models with experts, a sliding window or other parts"),
        ("Llama", {"attention_bias": True}, "gives the attention's output a bias"),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "RoPE is scaled"),
        ("Llama", {"rope_parameters": {"rope_type": "llama3"}}, "lacks factor, low_freq_factor, high_freq_factor"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 16}, "sliding_window is 16, allowed: null"),
        ("Qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "allowed: null"),
        ("Qwen3", {"attention_bias": True}, "gives the attention's output a bias"),
    ],
)
def test_a_model_with_other_parts_is_refused_by_name(
    kind: str, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_llama(tmp_path, {}, kind)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint(tmp_path)
    assert says in str(caught.value)


def test_a_geometry_without_a_model_in_transformers_is_not_exported() -> None:
    with pytest.raises(CheckpointError, match="attention_bias and qk_norm; transformers has no model"):
        config_of_geometry(small(hidden_size=24, attention_bias=True, qk_norm=True), torch.float32, TokenIds())


def test_head_channels_under_norms_of_q_and_k_grow_by_copies_alone(models: Path, tmp_path: Path) -> None:
    source = models / "qwen3" / "hf"
    assert main(["grow", f"hf:{source}", f"hf:{tmp_path / 'wide'}", "--set", "head_dim=64"]) == EXIT_OK
    tokens = prompt(VOCABULARY)
    assert difference(logits_of(tmp_path / "wide", tokens), logits_of(source, tokens)) < 1e-5
    gain = tensors_of(tmp_path / "wide")["model.layers.0.self_attn.q_norm.weight"]
    before = tensors_of(source)["model.layers.0.self_attn.q_norm.weight"]
    torch.testing.assert_close(gain[::2], before / math.sqrt(2))
    assert main(["grow", f"hf:{source}", f"hf:{tmp_path / 'z'}", "--operator", "zero", "--set", "head_dim=64"]) == 2
