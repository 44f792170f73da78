"""A Hugging Face LLaMA read as megatron-core's tensors computes what transformers computes; others are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.checkpoint.huggingface.reader import INDEX_NAME, SINGLE_NAME, HuggingFaceCheckpoint
from growth_megatron.errors import CheckpointError
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import Region, TensorSpec
from tests.checkpoint.huggingface_models import CASES, difference, edit_json, logits_of, prompt, write_llama

safetensors_torch = pytest.importorskip("safetensors.torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, case in CASES.items():
        made[name] = tmp_path_factory.mktemp("model")
        write_llama(made[name], case)
    return made


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A sound folder to be spoilt."""
    write_llama(tmp_path / "model", {})
    return tmp_path / "model"


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    checkpoint = HuggingFaceCheckpoint(folders[name])
    tokens = prompt(checkpoint.geometry.vocab_size)
    assert (
        difference(reference_logits(checkpoint, checkpoint.geometry, tokens), logits_of(folders[name], tokens)) < 1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_all_tensors_are_there_with_their_shapes_and_stored_type(folders: dict[str, Path], name: str) -> None:
    checkpoint = HuggingFaceCheckpoint(folders[name])
    assert {key: checkpoint.spec(key).shape for key in checkpoint.keys()} == tensor_shapes(checkpoint.geometry)
    dtype = getattr(torch, CASES[name].get("dtype", "float32"))
    assert {checkpoint.spec(key).dtype for key in checkpoint.keys()} == {dtype}
    assert all(checkpoint.read(key).dtype == dtype for key in checkpoint.keys())


def test_the_geometry_is_that_of_the_configuration(folders: dict[str, Path]) -> None:
    model = HuggingFaceCheckpoint(folders["heads wider than hidden / heads"]).geometry
    assert (model.head_dim, model.num_query_groups, model.rope_base, model.norm_epsilon) == (24, 2, 500.0, 1e-5)
    assert (model.sequence_length, model.ffn_hidden_size, model.init_std, model.tie_embeddings) == (32, 80, 0.2, False)
    assert (model.vocab_size, model.vocab_multiple, model.padded_vocab_size) == (100, 4, 100)
    assert HuggingFaceCheckpoint(folders["MQA, vocabulary of 128s"]).geometry.vocab_multiple == 128
    assert HuggingFaceCheckpoint(folders["GQA, several files"]).geometry.vocab_multiple == 1
    assert HuggingFaceCheckpoint(folders["tied, bfloat16, several files"]).geometry.tie_embeddings


def test_a_configuration_of_transformers_4_is_understood(plain: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    (plain / "config.json").write_text(json.dumps({**config, "rope_theta": 777.0, "rope_scaling": None}))
    assert HuggingFaceCheckpoint(plain).geometry.rope_base == 777.0
    assert HuggingFaceCheckpoint(plain).geometry.head_dim == 12


def test_mistral_without_sliding_window_is_the_same_model(tmp_path: Path) -> None:
    write_llama(tmp_path, {"sliding_window": None, "head_dim": 24}, "Mistral")
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    tokens = prompt(97)
    assert difference(reference_logits(checkpoint, checkpoint.geometry, tokens), logits_of(tmp_path, tokens)) < 1e-5
    edit_json(tmp_path / "config.json", sliding_window=16)
    with pytest.raises(CheckpointError, match="sliding_window is 16, allowed: null"):
        HuggingFaceCheckpoint(tmp_path)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_region_is_the_same_as_slicing_the_tensor(folders: dict[str, Path], data: st.DataObject) -> None:
    checkpoint = HuggingFaceCheckpoint(folders[data.draw(st.sampled_from(sorted(folders)))])
    key = data.draw(st.sampled_from(checkpoint.keys()))
    region = []
    for size in checkpoint.spec(key).shape:
        start = data.draw(st.integers(0, size))
        region.append(slice(start, data.draw(st.integers(start, size))))
    part = checkpoint.read(key, tuple(region))
    assert torch.equal(part, checkpoint.read(key)[tuple(region)])
    assert part.untyped_storage().nbytes() == part.nbytes


def test_threads_may_read_at_once(folders: dict[str, Path]) -> None:
    checkpoint = HuggingFaceCheckpoint(folders["GQA, several files"])
    keys = checkpoint.keys() * 20
    expected = {key: checkpoint.read(key) for key in checkpoint.keys()}
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(checkpoint.read, keys))
    assert all(torch.equal(values, expected[key]) for key, values in zip(keys, found, strict=True))


class _Spoilt:
    """The checkpoint with one tensor's rows in another order."""

    def __init__(
        self, checkpoint: HuggingFaceCheckpoint, name: str, order: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._checkpoint, self._name, self._order = checkpoint, name, order

    def keys(self) -> list[str]:
        return self._checkpoint.keys()

    def spec(self, key: str) -> TensorSpec:
        return self._checkpoint.spec(key)

    def read(self, key: str, region: Region) -> torch.Tensor:
        values = self._checkpoint.read(key)
        return (self._order(values) if key.endswith(self._name) else values)[region]


def _as_thirds(fused: torch.Tensor) -> torch.Tensor:
    """q, k, v one below the other instead of per query group (2 groups of 2 heads of 12)."""
    q, k, v = fused.view(2, 4, 12, -1).split([2, 1, 1], dim=1)
    return torch.cat([part.reshape(-1, fused.shape[1]) for part in (q, k, v)])


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("linear_qkv.weight", _as_thirds),
        ("linear_fc1.weight", lambda fused: torch.cat(fused.chunk(2)[::-1])),
    ],
    ids=["q, k, v as thirds", "up above gate"],
)
def test_negative_control_another_order_of_rows_is_noticed(
    folders: dict[str, Path], name: str, order: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = folders["GQA, several files"]
    checkpoint = HuggingFaceCheckpoint(folder)
    tokens = prompt(97)
    logits = reference_logits(_Spoilt(checkpoint, name, order), checkpoint.geometry, tokens)
    assert difference(logits, logits_of(folder, tokens)) > 1e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; allowed: llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "allowed: LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 8.0, "rope_theta": 5e5}}, "RoPE is scaled (longrope)"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE is scaled (linear)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', allowed: silu"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 3}, "3 does not divide num_attention_heads 4"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has model.layers.1.input_layernorm.weight"),
        ({"hidden_size": 96}, "config.json says (97, 96)"),
        ({"vocab_size": 96}, "model.embed_tokens.weight is (97, 48)"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_a_configuration_of_another_model_is_refused(plain: Path, changes: dict[str, Any], words: str) -> None:
    edit_json(plain / "config.json", **changes)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint(plain)
    assert words in str(caught.value)


def test_everything_wrong_with_a_configuration_is_said_at_once(plain: Path) -> None:
    edit_json(plain / "config.json", attention_bias=True, hidden_act="relu")
    with pytest.raises(CheckpointError, match="hidden_act is 'relu'.*attention_bias is true"):
        HuggingFaceCheckpoint(plain)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(plain: Path) -> None:
    (plain / SINGLE_NAME).rename(plain / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only as pytorch_model.bin: pickles.*save_pretrained"):
        HuggingFaceCheckpoint(plain)
    (plain / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor"):
        HuggingFaceCheckpoint(plain)


def test_a_missing_folder_or_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is missing; .* is not a Hugging Face model folder"):
        HuggingFaceCheckpoint(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        HuggingFaceCheckpoint(tmp_path)


def test_an_index_with_missing_or_foreign_files_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path, {"shard": "20KB"})
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    lost = index["weight_map"]["model.norm.weight"]
    content = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=f"names {lost}, not in the folder"):
        HuggingFaceCheckpoint(tmp_path)
    (tmp_path / lost).write_bytes(content)
    edit_json(tmp_path / INDEX_NAME, weight_map={**index["weight_map"], "model.norm.weight": "../elsewhere"})
    with pytest.raises(CheckpointError, match="names '../elsewhere', outside of its folder; do not trust it"):
        HuggingFaceCheckpoint(tmp_path)
    other = next(place for place in index["weight_map"].values() if place != lost)
    edit_json(tmp_path / INDEX_NAME, weight_map={**index["weight_map"], "model.norm.weight": other})
    with pytest.raises(CheckpointError, match=f"says that model.norm.weight is in {other}, but it is not"):
        HuggingFaceCheckpoint(tmp_path)


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = safetensors_torch.load_file(folder / SINGLE_NAME)
    change(tensors)
    safetensors_torch.save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


def _bias(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)


def _eight_bits(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int8)


def _two_types(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_bias, "has model.layers.0.self_attn.q_proj.bias, which this model does not have"),
        (_eight_bits, "model.layers.1.mlp.up_proj.weight is of type I8"),
        (_two_types, "gate_proj.weight and model.layers.1.mlp.up_proj.weight are one tensor"),
        (lambda tensors: tensors.pop("lm_head.weight"), "lacks lm_head.weight; is tie_word_embeddings missing"),
        (lambda tensors: tensors.pop("model.norm.weight"), "lacks model.norm.weight"),
    ],
    ids=["bias", "int8", "two types", "no output", "no norm"],
)
def test_tensors_of_another_model_are_refused(
    plain: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    _rewrite(plain, change)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceCheckpoint(plain)
    assert words in str(caught.value)


def test_buffers_of_older_releases_and_a_stored_tied_output_are_passed_over(tmp_path: Path) -> None:
    write_llama(tmp_path, {"tie_word_embeddings": True})
    before = HuggingFaceCheckpoint(tmp_path).read("embedding.word_embeddings.weight")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    _rewrite(tmp_path, change)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert torch.equal(checkpoint.read("embedding.word_embeddings.weight"), before)
    assert "output_layer.weight" not in checkpoint.keys()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda content: content[:-1], "it is cut short, fetch it again"),
        (lambda content: content[:5], "not a safetensors file"),
        (lambda content: b"<html>" + bytes(100), "not a safetensors file"),
        (lambda content: struct.pack("<Q", 16) + b"{" * 16 + content, "damaged header"),
        (lambda content: content.replace(b"[97,48]", b"[97,49]", 1), "damaged header"),
    ],
    ids=["cut short", "cut in the length", "a web page", "no JSON", "shape and bytes differ"],
)
def test_a_damaged_file_is_refused(plain: Path, spoil: Callable[[bytes], bytes], words: str) -> None:
    path = plain / SINGLE_NAME
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=words):
        HuggingFaceCheckpoint(plain)


@pytest.mark.parametrize(
    ("by", "words"),
    [
        (-8, r"lies at \d+ to \d+, the tensor before it ends at \d+"),
        (8, r"lies at \d+ to \d+, the tensor before it ends at \d+"),
        (0, "8 bytes follow the last tensor"),
    ],
    ids=["over the tensor before it", "with a hole before it", "with something behind all"],
)
def test_tensors_that_overlap_or_lie_apart_are_refused(plain: Path, by: int, words: str) -> None:
    """safetensors itself writes and reads one tensor right after the other."""
    content = (plain / SINGLE_NAME).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    header[last]["data_offsets"] = [offset + by for offset in header[last]["data_offsets"]]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (plain / SINGLE_NAME).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(8))
    with pytest.raises(CheckpointError, match=words):
        HuggingFaceCheckpoint(plain)


def test_a_file_cut_short_after_it_was_opened_is_named(plain: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(plain)
    with (plain / SINGLE_NAME).open("r+b") as file:
        file.truncate(8 + len(checkpoint._files["model.norm.weight"].header))
    with pytest.raises(CheckpointError, match="it was cut short after it was opened"):
        checkpoint.read("decoder.final_layernorm.weight")


def test_a_region_outside_the_tensor_or_an_unknown_tensor_is_refused(folders: dict[str, Path]) -> None:
    checkpoint = HuggingFaceCheckpoint(folders["GQA, several files"])
    with pytest.raises(CheckpointError, match="is not within it"):
        checkpoint.read("decoder.final_layernorm.weight", (slice(0, 49),))
    with pytest.raises(CheckpointError, match="holds no tensor decoder.layers.2"):
        checkpoint.read("decoder.layers.2.mlp.linear_fc2.weight")


def test_the_identity_changes_with_the_files(plain: Path) -> None:
    before = HuggingFaceCheckpoint(plain).identity
    assert HuggingFaceCheckpoint(plain).identity == before
    _rewrite(plain, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48)}))
    assert HuggingFaceCheckpoint(plain).identity != before
