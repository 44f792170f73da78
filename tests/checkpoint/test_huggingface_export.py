"""What is exported is bit for bit what is stored, loads in transformers, and appears whole or not at all.

The tokenizer that goes along gives the ids that the SentencePiece model gives.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.huggingface import writer as huggingface_export
from growth_megatron.checkpoint.huggingface.reader import INDEX_NAME, SINGLE_NAME, HuggingFaceCheckpoint
from growth_megatron.checkpoint.huggingface.tokenizer import tokenizer_files
from growth_megatron.checkpoint.huggingface.writer import ExportedWeights, export_huggingface
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.schema import ModelConfig
from growth_megatron.data.tokenizer import Tokenizer, train_tokenizer
from growth_megatron.errors import EXIT_USAGE, CheckpointError, GrowthError
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import MASTER_PREFIX, Region, TensorSpec
from tests.checkpoint.huggingface_models import CASES, SIZES, difference, logits_of, prompt, write_llama
from tests.checkpoint.written import geometry, write_checkpoint

safetensors_torch = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, as the safetensors library reads them."""
    files = [safetensors_torch.load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("shard_bytes", [huggingface_export.SHARD_BYTES, 9000])
@pytest.mark.parametrize("name", CASES)
def test_import_and_export_are_bit_equal(
    tmp_path: Path, name: str, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_export, "_BLOCK_BYTES", 1000)  # tensors of several blocks
    write_llama(tmp_path / "a", CASES[name])
    source = HuggingFaceCheckpoint(tmp_path / "a")
    result = export_huggingface(source, source.geometry, tmp_path / "b", shard_bytes=shard_bytes)
    assert_same(tensors_of(tmp_path / "b"), tensors_of(tmp_path / "a"))
    assert (INDEX_NAME in result.files) == (shard_bytes == 9000)
    assert result.bytes_written == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    tokens = prompt(source.geometry.vocab_size)
    assert torch.equal(logits_of(tmp_path / "b", tokens), logits_of(tmp_path / "a", tokens))
    assert HuggingFaceCheckpoint(tmp_path / "b").geometry == source.geometry


def test_files_hold_at_most_the_bytes_asked_for_and_the_index_lists_them(tmp_path: Path) -> None:
    write_llama(tmp_path / "a", {})
    source = HuggingFaceCheckpoint(tmp_path / "a")
    export_huggingface(source, source.geometry, tmp_path / "b", shard_bytes=20_000)
    files = [safetensors_torch.load_file(path) for path in (tmp_path / "b").glob("*.safetensors")]
    sizes = [sum(tensor.nbytes for tensor in file.values()) for file in files]
    assert len(files) > 3
    assert all(size <= 20_000 or len(file) == 1 for size, file in zip(sizes, files, strict=True))
    index = json.loads((tmp_path / "b" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"].keys() == tensors_of(tmp_path / "a").keys()


def test_padding_of_the_vocabulary_is_dropped(tmp_path: Path) -> None:
    model = geometry(vocab_size=29, vocab_multiple=16)  # 32 rows stored
    tensors = write_checkpoint(tmp_path / "checkpoint", model)
    export_huggingface(DistCheckpoint(tmp_path / "checkpoint"), model, tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    assert torch.equal(written["model.embed_tokens.weight"], tensors["embedding.word_embeddings.weight"][:29])
    assert torch.equal(written["lm_head.weight"], tensors["output_layer.weight"][:29])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 29


@pytest.mark.parametrize(
    "changes",
    [{"num_query_groups": 4}, {"num_query_groups": 1}, {"tie_embeddings": True}, {"head_dim": 6, "rope_base": 99.0}],
    ids=str,
)
def test_an_exported_checkpoint_computes_the_same_in_transformers(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = geometry(3, norm_epsilon=0.3, **changes)
    write_checkpoint(tmp_path / "checkpoint", model)
    source = DistCheckpoint(tmp_path / "checkpoint")
    export_huggingface(source, model, tmp_path / "out", dtype=torch.float32)
    tokens = prompt(model.vocab_size)[:, : model.sequence_length]
    expected = reference_logits(source, model, tokens)[..., : model.vocab_size]
    assert difference(logits_of(tmp_path / "out", tokens), expected) < 1e-5
    assert ("lm_head.weight" in tensors_of(tmp_path / "out")) != model.tie_embeddings
    loaded = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert loaded.tie_word_embeddings == model.tie_embeddings
    assert loaded.rope_parameters["rope_theta"] == model.rope_base


def test_the_type_is_the_stored_one_or_cast_from_the_masters(tmp_path: Path) -> None:
    model = geometry()
    tensors = write_checkpoint(tmp_path / "checkpoint", model)  # bfloat16, with masters of other values
    source = DistCheckpoint(tmp_path / "checkpoint")
    key, name = "decoder.layers.0.mlp.linear_fc2.weight", "model.layers.0.mlp.down_proj.weight"
    expected = {
        None: tensors[key],
        torch.bfloat16: tensors[key],
        torch.float32: tensors[MASTER_PREFIX + key],
        torch.float16: tensors[MASTER_PREFIX + key].half(),
    }
    for dtype, values in expected.items():
        result = export_huggingface(source, model, tmp_path / str(dtype), dtype=dtype)
        written = tensors_of(tmp_path / str(dtype))[name]
        assert written.dtype == values.dtype == result.dtype
        assert torch.equal(written, values)
        assert transformers.AutoConfig.from_pretrained(tmp_path / str(dtype)).dtype == values.dtype


class _Constant:
    """A model all of whose weights are one value."""

    def __init__(self, model: ModelConfig, value: float = 0.0) -> None:
        self._shapes, self._value = tensor_shapes(model), value

    def keys(self) -> list[str]:
        return list(self._shapes)

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(self._shapes[key], torch.float32)

    def read(self, key: str, region: Region) -> torch.Tensor:
        return torch.full([part.stop - part.start for part in region], self._value)


def test_a_value_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = geometry()
    with pytest.raises(CheckpointError, match="beyond 65504.*export as bfloat16"):
        export_huggingface(_Constant(model, 70000.0), model, tmp_path / "out", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused_wherever_it_lies(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Hugging Face's folder to folder growth, where the rows that are looked at beforehand do not show it."""
    write_llama(tmp_path / "hf", {})
    tensors = safetensors_torch.load_file(tmp_path / "hf" / SINGLE_NAME)
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = value
    safetensors_torch.save_file(tensors, tmp_path / "hf" / SINGLE_NAME, metadata={"format": "pt"})
    for target in (f"hf:{tmp_path / 'grown'}", str(tmp_path / "checkpoint")):
        assert main(["grow", f"hf:{tmp_path / 'hf'}", target, "--set", "num_layers=4"]) == EXIT_USAGE
        assert f"linear_fc2.weight is {value} at (5, 7)" in capsys.readouterr().err
    source = HuggingFaceCheckpoint(tmp_path / "hf")
    with pytest.raises(GrowthError, match=r"linear_fc2.weight is .* at \(5, 7\)"):
        export_huggingface(source, source.geometry, tmp_path / "exported")
    assert not {"grown", "checkpoint", "exported"} & {path.name for path in tmp_path.iterdir()}


def test_memory_stays_at_some_blocks_however_large_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_export, "_BLOCK_BYTES", 1 << 20)
    read_bytes = []

    class Counting(_Constant):
        def read(self, key: str, region: Region) -> torch.Tensor:
            values = super().read(key, region)
            read_bytes.append(values.nbytes)
            return values

    model = geometry(hidden_size=512, ffn_hidden_size=2048, vocab_size=4000)
    export_huggingface(Counting(model), model, tmp_path / "warm", dtype=torch.float32)
    tracemalloc.start()
    result = export_huggingface(Counting(model), model, tmp_path / "out", dtype=torch.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.bytes_written > 40 << 20
    assert max(read_bytes) <= 1 << 20
    assert peak < 1 << 20  # of Python's own; tensors are those counted above


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    write_llama(tmp_path / "a", {})
    source = HuggingFaceCheckpoint(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    export_huggingface(source, source.geometry, tmp_path / "b", progress=lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "b").values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


class _Dying(FileOperations):
    def __init__(self, calls: int) -> None:
        self.left = calls

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def write(self, path: Path, data: bytes) -> None:
        self._count()
        super().write(path, data)

    def sync_file(self, path: Path) -> None:
        self._count()
        super().sync_file(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)


def test_a_killed_export_leaves_no_folder_of_that_name_and_can_be_repeated(tmp_path: Path) -> None:
    write_llama(tmp_path / "a", {})
    source = HuggingFaceCheckpoint(tmp_path / "a")
    for calls in range(5):
        with pytest.raises(KeyboardInterrupt):
            export_huggingface(source, source.geometry, tmp_path / "b", files=_Dying(calls))
        assert not (tmp_path / "b").exists()
    export_huggingface(source, source.geometry, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert_same(tensors_of(tmp_path / "b"), tensors_of(tmp_path / "a"))


def test_wrong_targets_sources_and_too_little_space_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path / "a", {})
    source = HuggingFaceCheckpoint(tmp_path / "a")
    model = source.geometry
    (tmp_path / "file").touch()
    for target, words in [
        ("a", "a exists; name a new folder"),
        ("file", "file exists"),
        ("file/b", "file is not a folder"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            export_huggingface(source, model, tmp_path / target)
    with pytest.raises(CheckpointError, match=r"does not hold this model: decoder.layers.2.*is missing"):
        export_huggingface(source, model.model_copy(update={"num_layers": 3}), tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"linear_qkv.weight is \(96, 48\), not \(144, 48\)"):
        export_huggingface(source, model.model_copy(update={"num_query_groups": 4}), tmp_path / "b")
    odd = geometry(head_dim=4, num_attention_heads=3, num_query_groups=3)
    with pytest.raises(CheckpointError, match="hidden_size 8 is not a multiple of num_attention_heads 3"):
        export_huggingface(_Constant(odd), odd, tmp_path / "b")
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    with pytest.raises(CheckpointError, match=r"b needs .* KiB where 1.00 KiB are free"):
        export_huggingface(source, model, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


class _Usage:
    free = 1024


def test_tokenizer_files_of_a_hugging_face_source_go_along(tmp_path: Path) -> None:
    write_llama(tmp_path / "a", {"bos_token_id": 5, "eos_token_id": 6})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "a" / name).write_text(f"content of {name}")
    source = HuggingFaceCheckpoint(tmp_path / "a")
    result = export_huggingface(source, source.geometry, tmp_path / "b")
    assert result.tokenizer == str(tmp_path / "a")
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "content of chat_template.jinja"
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "b" / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (5, 6)


TEXT = """def grown(layers: list[int], times: int = 4) -> list[int]:
    # Stacking: layer j copies layer j mod l; 1234567890 and 3.14159
        return [layer for _ in range(times) for layer in layers]

<p>s></p> «Größe», naïve façade; 日本語のテキスト; Привет, мир! It's  two  spaces,   three.
"""


def _lines() -> list[str]:
    """``TEXT`` and many words of few syllables."""
    generator = random.Random(2)
    syllables = ["gro", "wth", "la", "yer", "stack", "in", "ter", "po", "late", "e", "n", "о", "日", "ü"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(3000)]
    return [TEXT] * 40 + [" ".join(words[i : i + 10]) for i in range(0, 3000, 10)]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("\n".join(_lines()))
    train_tokenizer([folder / "text"], folder / "tokenizer.model", 600)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def exported_tokenizer(sentencepiece: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = geometry(vocab_size=600)
    target = tmp_path_factory.mktemp("export") / "out"
    export_huggingface(_Constant(model), model, target, tokenizer=sentencepiece)
    return transformers.AutoTokenizer.from_pretrained(target)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  ",
        "\n",
        "a",
        " leading",
        "   three leading,  two within, trailing  ",
        "lines\n\n  and\ttabs\r\n",
        "1234567890 3.14 12a34",
        "日本語, Привет, naïve, ﬁ, e\u0301, \u00a0, \u2581 and \u200b",
        "🙂‍🌾 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ☃ \U0001f9ff",
        "\x00\x01\x7f",
        "<0x0A> <unk",
        TEXT * 3,
    ],
    ids=repr,
)
def test_the_exported_tokenizer_gives_the_same_ids_and_text(
    sentencepiece: Path, exported_tokenizer: Any, text: str
) -> None:
    ids = Tokenizer(sentencepiece).encode(text)
    assert exported_tokenizer(text).input_ids == ids
    # SentencePiece does not tell its mark of a space from a space
    assert exported_tokenizer.decode(ids) == Tokenizer(sentencepiece).decode(ids) == text.replace("\u2581", " ")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*" \n\t12aeg<>s/é日🙂", "  ", "layer", "def ", "mod"]), max_size=30).map("".join)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
)
def test_any_text_has_the_same_ids(sentencepiece: Path, exported_tokenizer: Any, text: str) -> None:
    if not any(special in text for special in ("<s>", "</s>", "<unk>")):
        assert exported_tokenizer(text).input_ids == Tokenizer(sentencepiece).encode(text)


def test_special_tokens_are_those_of_the_model(sentencepiece: Path, exported_tokenizer: Any) -> None:
    ours = Tokenizer(sentencepiece)
    assert (exported_tokenizer.bos_token_id, exported_tokenizer.eos_token_id) == (ours.bos_id, ours.eos_id) == (1, 2)
    assert exported_tokenizer.unk_token_id == 0
    assert len(exported_tokenizer) == ours.vocab_size
    assert exported_tokenizer("</s>").input_ids == [ours.eos_id]  # as everywhere in transformers
    assert exported_tokenizer.model_max_length == 8
    ids = tokenizer_files(sentencepiece, geometry(vocab_size=600)).ids
    assert (ids.bos, ids.eos) == (1, 2)


def test_negative_control_a_prefix_space_is_noticed(sentencepiece: Path, tmp_path: Path) -> None:
    for name, content in tokenizer_files(sentencepiece, geometry(vocab_size=600)).written.items():
        (tmp_path / name).write_bytes(content)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [prepend, document["normalizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    spoilt = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert spoilt("layer").input_ids != Tokenizer(sentencepiece).encode("layer")


def _sentencepiece(folder: Path, **options: Any) -> Path:
    import sentencepiece as library

    options = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        **options,
    }
    with (folder / "t.model").open("wb") as file:
        library.SentencePieceTrainer.train(sentence_iterator=iter(_lines()), model_writer=file, **options)
    return folder / "t.model"


def test_a_tokenizer_with_llamas_prefix_space_is_the_same_too(tmp_path: Path) -> None:
    path = _sentencepiece(tmp_path, add_dummy_prefix=True)
    model = geometry(vocab_size=400)
    export_huggingface(_Constant(model), model, tmp_path / "out", tokenizer=path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("", "a", " a", "layer by  layer\n\n x", "日本語 🙂", TEXT):
        ids = Tokenizer(path).encode(text)
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "unigram"}, "it is no byte-pair model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises characters"),
        ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
    ],
)
def test_a_tokenizer_that_cannot_be_translated_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    model = geometry(vocab_size=400)
    path = _sentencepiece(tmp_path, **options)
    with pytest.raises(CheckpointError, match=words):
        export_huggingface(_Constant(model), model, tmp_path / "out", tokenizer=path)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(sentencepiece: Path, tmp_path: Path) -> None:
    model = geometry(vocab_size=599)
    with pytest.raises(CheckpointError, match="has 600 entries, the model's vocabulary 599"):
        export_huggingface(_Constant(model), model, tmp_path / "out", tokenizer=sentencepiece)


def test_exported_weights_are_a_source(tmp_path: Path) -> None:
    write_llama(tmp_path / "a", {})
    source = HuggingFaceCheckpoint(tmp_path / "a")
    weights = ExportedWeights(source, source.geometry, torch.bfloat16)
    assert weights.keys() == source.keys()
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    region = (slice(5, 40), slice(3, SIZES["hidden_size"]))
    assert torch.equal(weights.read(key, region), source.read(key, region).bfloat16())
