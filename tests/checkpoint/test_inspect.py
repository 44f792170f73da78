"""``inspect`` and ``verify``: what they say is what is there, of checkpoints, links and runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from growth_megatron.checkpoint.folder.manifest import (
    MANIFEST_NAME,
    GrowthRecord,
    read_manifest,
    write_manifest,
)
from growth_megatron.checkpoint.huggingface.reader import HuggingFaceCheckpoint
from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.checkpoint.verify import verify_files
from growth_megatron.commands.inspect import describe_checkpoint, describe_tensor, growth_line, render_description
from growth_megatron.config.lines import compact_layers, geometry_changes
from growth_megatron.config.schema import ParallelConfig
from growth_megatron.errors import CheckpointError, NothingValidError
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.layers import parse_layers
from growth_megatron.growth.operators.stack import stack_layers
from growth_megatron.growth.plan import plan_depth
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.cost import parameter_count
from tests.checkpoint.huggingface_models import CASES, write_llama
from tests.checkpoint.written import PREFIXES, geometry, manifest_of, write_checkpoint

MODEL = geometry(3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    layout = ParallelConfig(tensor_parallel_size=2, sequence_parallel=True, pipeline_parallel_size=3)
    write_checkpoint(tmp_path / "checkpoint", MODEL, manifest_of(MODEL, layout=layout, world_size=12), parts=2)
    return tmp_path / "checkpoint"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 30):
        path = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        write_checkpoint(path, MODEL, manifest_of(MODEL, step))
    (tmp_path / "run" / "latest").symlink_to("checkpoints/step_00000030")
    return tmp_path / "run"


def _damage(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])


def _flip(checkpoint: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def _verified(path: Path, full: bool = False) -> tuple[list[str], CheckpointError | None]:
    lines: list[str] = []
    try:
        for check in verify_files(path, full):
            lines.append(check.line)
    except CheckpointError as error:
        return lines, error
    return lines, None


def test_a_description_says_what_the_manifest_and_the_files_say(checkpoint: Path) -> None:
    description = describe_checkpoint(checkpoint)
    assert json.loads(json.dumps(description)) == description
    manifest = read_manifest(checkpoint)
    for name in ("step", "stage", "stage_step", "consumed_samples", "consumed_tokens", "flops", "world_size"):
        assert description[name] == getattr(manifest, name)
    assert description["problem"] is None
    assert description["geometry"]["num_layers"] == 3
    assert description["geometry"]["padded_vocab_size"] == 32
    assert description["parameters"] == parameter_count(MODEL).total
    assert description["layout"]["tensor_parallel_size"] == 2
    on_disk = {file.name: file.stat().st_size for file in checkpoint.iterdir() if file.name != MANIFEST_NAME}
    assert description["files"] == on_disk
    assert description["bytes"] == sum(on_disk.values())
    assert description["lineage"] == []


@pytest.mark.parametrize("stacked", [False, True])
def test_the_table_of_tensors_counts_every_tensor(tmp_path: Path, stacked: bool) -> None:
    write_checkpoint(tmp_path / "c", MODEL, stacked=stacked, parts=2)
    table = describe_checkpoint(tmp_path / "c")["tensors"]
    assert sum(row["count"] for row in table) == len(PREFIXES) * len(tensor_shapes(MODEL))
    rows = {row["key"]: row for row in table}
    assert len(rows) == len(table) == len(PREFIXES) * 9
    fc1 = rows["optimizer.state.exp_avg.decoder.layers.*.mlp.linear_fc1.weight"]
    assert (fc1["count"], fc1["shape"], fc1["dtype"], fc1["chunks"]) == (3, [24, 8], "float32", 6)
    assert rows["embedding.word_embeddings.weight"]["dtype"] == "bfloat16"
    # Weights first, in the model's order.
    assert [row["key"] for row in table][:2] == [
        "embedding.word_embeddings.weight",
        "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
    ]
    assert table[9]["key"].startswith("optimizer.")


def test_the_text_names_everything_a_person_asks(checkpoint: Path) -> None:
    text = render_description(describe_checkpoint(checkpoint))
    for words in (
        "whole",
        "step 100; step 100 of stage 1",
        "400 samples, 3,200 tokens, 1.500e+11 FLOPs",
        "3 layers, hidden 8, 4 heads in 2 groups of 2 channels, ffn 12, vocabulary 30 (padded to 32)",
        "TP 2 +SP PP 3 DP 2 (12 ranks)",
        "5 files",
        "decoder.layers.*.mlp.linear_fc1.weight",
        "24 x 8",
        "and 3 byte objects",
    ):
        assert words in text, text
    assert text == "\n".join(line.rstrip() for line in text.splitlines())


def test_lineage_and_shared_files_of_a_grown_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    layers = parse_layers("1-23*2", 3)
    plan = plan_depth(MODEL, geometry(5), layers)
    grow_checkpoint(checkpoint, tmp_path / "grown", plan, "reset")
    manifest = read_manifest(tmp_path / "grown")
    losses = {"validation_loss_before": 2.5, "validation_loss_after": 2.75}
    newest = manifest.lineage[-1].model_copy(update=losses)
    write_manifest(tmp_path / "grown", manifest.model_copy(update={"lineage": (newest,)}))
    description = describe_checkpoint(tmp_path / "grown")
    assert [record["layers"] for record in description["lineage"]] == [list(layers)]
    assert description["shared_bytes"] == sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    text = render_description(description)
    line = next(line for line in text.splitlines() if line.startswith("lineage"))
    assert "step 100: stack: layers 3 -> 5; optimizer state reset" in line
    assert "layers 0-2, 1-2, 75.0 % connected; validation loss 2.5000 -> 2.7500" in line
    assert str(checkpoint) in line
    assert "shared with other checkpoints" in text
    (fc1,) = (row for row in description["tensors"] if row["key"] == "decoder.layers.*.mlp.linear_fc1.weight")
    assert fc1["count"] == 5


def test_a_growth_in_width_names_every_size_that_changed() -> None:
    target = geometry(
        3, hidden_size=16, num_attention_heads=8, num_query_groups=4, ffn_hidden_size=18, norm_epsilon=5e-6
    )
    record = GrowthRecord(
        operator="zero",
        optimizer_state="asymmetric",
        step=2000,
        source="runs/a",
        source_manifest_sha256="0",
        source_geometry=MODEL,
        target_geometry=target,
        seed=0,
        library_version="test",
        layers=(0, 1, 2),
    )
    changes = "hidden 8 -> 16, heads 4 -> 8, groups 2 -> 4, ffn 12 -> 18, norm epsilon 1e-05 -> 5e-06"
    assert growth_line(record) == f"step 2,000: zero: {changes}; optimizer state asymmetric, from runs/a"
    assert geometry_changes(geometry(tie_embeddings=True), geometry(3)) == ["layers 2 -> 3", "embeddings untied"]
    assert geometry_changes(MODEL, MODEL) == []


def test_a_hugging_face_folder_is_described_by_its_sizes_and_tensors(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_llama(tmp_path, CASES["GQA, several files"])
    description = describe_checkpoint(tmp_path)
    assert json.loads(json.dumps(description)) == description
    assert description["kind"] == "huggingface"
    assert description["geometry"]["ffn_hidden_size"] == 80
    assert sum(row["count"] for row in description["tensors"]) == len(tensor_shapes(geometry(2)))
    assert description["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    text = render_description(description)
    for words in ("Hugging Face", "2 layers, hidden 48, 4 heads in 2 groups", "decoder.layers.*.mlp.linear_fc1.weight"):
        assert words in text, text
    assert text == "\n".join(line.rstrip() for line in text.splitlines())
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    shown = describe_tensor(tmp_path, key)
    assert (shown["shape"], shown["dtype"], shown["chunks"]) == ([160, 48], "float32", [])
    assert shown["rms"] == pytest.approx(float(HuggingFaceCheckpoint(tmp_path).read(key).square().mean().sqrt()))


@pytest.mark.parametrize("name", ["", "latest", "checkpoints", "checkpoints/step_00000030"])
def test_a_run_stands_for_its_newest_checkpoint(run: Path, name: str) -> None:
    description = describe_checkpoint(run / name)
    assert description["path"] == str(run / "checkpoints" / "step_00000030")
    assert description["skipped"] == []


def test_the_checkpoints_folder_is_known_from_within(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (run, run / "checkpoints"):
        monkeypatch.chdir(folder)
        assert find_origin(".").path.resolve() == run / "checkpoints" / "step_00000030"


def test_a_damaged_newest_one_is_passed_over_and_named(run: Path) -> None:
    _damage(run / "checkpoints" / "step_00000030")
    text = render_description(describe_checkpoint(run))
    assert "step_00000020" in text.splitlines()[0]
    assert "passed over" in text
    assert "__0_0.distcp has" in text


def test_a_damaged_checkpoint_is_described_as_such(checkpoint: Path) -> None:
    _damage(checkpoint)
    description = describe_checkpoint(checkpoint)
    assert "__0_0.distcp has" in description["problem"]
    assert "DAMAGED: __0_0.distcp" in render_description(description)


def test_what_is_no_checkpoint_says_so(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("gone")
    wrong = {
        run / "checkpoints" / "step_00000031": "does not exist.*; the newest there: step_00000030, step_00000020",
        tmp_path / "nowhere": "does not exist; give a checkpoint or a run directory$",
        tmp_path / "dangling": "points at .*gone, which does not exist",
        run / "checkpoints" / "step_00000030" / "common.pt": "is a file",
        tmp_path / "empty": "holds no checkpoint yet",
        tmp_path: "is neither a checkpoint or a run .* nor a Hugging Face folder",
    }
    for path, words in wrong.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            describe_checkpoint(path)
        assert caught.value.exit_code == 2
    (run / "checkpoints" / "step_00000030" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata is missing"):
        describe_checkpoint(run / "checkpoints" / "step_00000030")


@pytest.mark.parametrize("full", [False, True])
def test_verify_of_a_whole_run_has_a_line_for_each(run: Path, full: bool) -> None:
    lines, error = _verified(run, full)
    assert error is None
    assert [line.split()[0] for line in lines] == ["OK"] * 3
    assert ["step_00000030" in lines[0], "step_00000010" in lines[2]] == [True, True]
    assert all(("checksums" if full else "sizes") in line for line in lines)


def test_verify_of_a_link_is_of_that_checkpoint(run: Path) -> None:
    _damage(run / "checkpoints" / "step_00000010")
    lines, error = _verified(run / "latest")
    assert error is None
    assert len(lines) == 1


def test_verify_names_all_before_it_fails(run: Path) -> None:
    _damage(run / "checkpoints" / "step_00000030")
    lines, error = _verified(run)
    assert [line.split()[0] for line in lines] == ["FAILED", "OK", "OK"]
    assert "__0_0.distcp has" in lines[0]
    assert error is not None
    assert error.exit_code == 2
    assert "1 of 3 checkpoints damaged (step_00000030)" in str(error)
    for step in (10, 20):
        (run / "checkpoints" / f"step_{step:08d}" / "manifest.json").unlink()
    lines, error = _verified(run)
    assert len(lines) == 3
    assert isinstance(error, NothingValidError)
    assert error.exit_code == 77


def test_a_changed_byte_is_found_by_full_alone(checkpoint: Path) -> None:
    _flip(checkpoint)
    assert _verified(checkpoint)[1] is None
    lines, error = _verified(checkpoint, full=True)
    assert lines[0].startswith("FAILED")
    assert "checksum" in lines[0]
    assert error is not None
    assert error.exit_code == 2


def test_an_interrupted_save_is_mentioned_and_no_fault(run: Path) -> None:
    (run / "checkpoints" / ".tmp_step_00000040").mkdir()
    lines, error = _verified(run)
    assert error is None
    assert lines[-1].startswith("SKIPPED")
    assert "unfinished" in lines[-1]


def test_verify_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for path, words in ((tmp_path, "holds no checkpoint yet"), (tmp_path / "x", "does not exist")):
        lines, error = _verified(path)
        assert lines == []
        assert error is not None
        assert words in str(error)
        assert error.exit_code == 2


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (stack_layers(4, 24), "0-3 x6"),
        (stack_layers(4, 10), "0-3 x2, 0-1"),
        (parse_layers("1-234*7-56", 6), "0-3, 1-3 x5, 1-5"),
        ((0, 0, 1, 1), "0, 0-1, 1"),
        ((2,), "2 x1"),
        ((1, 2, 3), "1-3 x1"),
        ((3, 2, 1), "3, 2, 1"),
    ],
)
def test_compact_layers(layers: tuple[int, ...], text: str) -> None:
    assert compact_layers(layers) == text
