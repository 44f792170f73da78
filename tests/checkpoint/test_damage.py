"""Damage that sums do not show, since they were made after it: every command ends with a message, at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.manifest import _sum_of_fields
from tests.checkpoint.hostile import edit_metadata, sign
from tests.checkpoint.huggingface_models import write_llama
from tests.checkpoint.written import geometry, write_checkpoint

KEY = "decoder.layers.1.mlp.linear_fc2.weight"
SETTINGS = ["num_attention_heads=4", "rope_base=10000", "norm_epsilon=1e-5", "sequence_length=8"]
Damage = Callable[[Path], None]


def _common(content: Any) -> Damage:
    def damage(folder: Path) -> None:
        torch.save(content, folder / "common.pt")
        sign(folder)

    return damage


def _groups(groups: Any, **more: Any) -> Damage:
    return _common({"optimizer": {"optimizer": {"param_groups": groups}}, **more})


def _bytes(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)
        sign(folder)

    return damage


def _metadata(change: Callable[[Metadata], Any]) -> Damage:
    def damage(folder: Path) -> None:
        edit_metadata(folder, change)
        sign(folder)

    return damage


def _places(**changes: Any) -> Damage:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            for name, value in changes.items():
                setattr(info, name, value)

    return _metadata(change)


def _tensors(change: Callable[[TensorStorageMetadata], None]) -> Damage:
    def damage(metadata: Metadata) -> None:
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                change(entry)

    return _metadata(damage)


def _beyond_memory(entry: TensorStorageMetadata) -> None:
    entry.size = torch.Size([2**50] * len(entry.size))
    for chunk in entry.chunks:
        object.__setattr__(chunk, "sizes", entry.size)


def _layer_2_40(metadata: Metadata) -> None:
    old, new = "layers.1.", f"layers.{2**40}."
    state = {key.replace(old, new): entry for key, entry in metadata.state_dict_metadata.items()}
    data = {MetadataIndex(i.fqn.replace(old, new), i.offset, i.index): at for i, at in metadata.storage_data.items()}
    metadata.state_dict_metadata, metadata.storage_data = state, data


def _manifest(path: str, value: Any) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / "manifest.json").read_text())
        fields.pop("manifest_sha256")
        here = fields
        *way, last = path.split(".")
        for key in way:
            here = here[key]
        here[last] = value
        text = json.dumps({**fields, "manifest_sha256": _sum_of_fields(fields)})
        (folder / "manifest.json").write_text(text)

    return damage


def _nested_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format_version": 1, "a": ' + "[" * 10**5 + "]" * 10**5 + "}")


CHECKPOINTS: dict[str, Damage] = {
    "common.pt of bytes": _bytes("common.pt", b"\x80\x02no pickle"),
    "common.pt, deep": _bytes("common.pt", b"(" * 10**5 + b"."),
    "common.pt, a list": _common([1]),
    "groups, a number": _groups(5),
    "step, a word": _groups([{"step": "x"}]),
    "step, a list": _groups([{"step": [1]}]),
    "iteration below 0": _groups([{"step": 1}], iteration=-5),
    ".metadata of bytes": _bytes(".metadata", b"\x80\x02no pickle"),
    "offset, a word": _places(offset="x"),
    "offset beyond all files": _places(offset=2**70),
    "offset below 0": _places(offset=-5),
    "another file": _places(relative_path="another.distcp"),
    "no places": _metadata(lambda metadata: metadata.storage_data.clear()),
    "no data": _metadata(lambda metadata: setattr(metadata, "storage_data", None)),
    "size of words": _tensors(lambda entry: setattr(entry, "size", ["a"] * len(entry.size))),
    "sizes beyond memory": _tensors(_beyond_memory),
    "complex": _tensors(lambda entry: setattr(entry.properties, "dtype", torch.complex64)),
    "integers": _tensors(lambda entry: setattr(entry.properties, "dtype", torch.int8)),
    "layer 2^40": _metadata(_layer_2_40),
    "10^9 layers": _manifest("geometry.num_layers", 10**9),
    "10^9 wide": _manifest("geometry.hidden_size", 10**9),
    "a vocabulary of 2^62": _manifest("geometry.vocab_size", 2**62),
    "manifest, deep": _nested_manifest,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    write_checkpoint(folder, geometry(2))
    return folder


def _all_end(commands: list[list[str]], capfd: pytest.CaptureFixture[str]) -> list[int]:
    """Exit codes of ``commands``, each of which succeeds or says what is wrong."""
    codes = []
    for command in commands:
        codes.append(main(command))
        said = "".join(capfd.readouterr())
        assert codes[-1] == 0 or (codes[-1] == 2 and f"growth-megatron {command[0]}: " in said), (command, said)
    return codes


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_every_command_ends_on_a_damaged_checkpoint(
    damage: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    CHECKPOINTS[damage](source)
    foreign = shutil.copytree(source, tmp_path / "foreign")
    (foreign / "manifest.json").unlink()
    targets = (str(tmp_path / f"target_{number}") for number in range(9))
    own = [
        ["inspect", str(source)],
        ["inspect", str(source), "--tensor", KEY],
        ["verify", str(source), "--full"],
        ["grow", str(source), "--plan", "--set", "num_layers=4"],
        ["grow", str(source), next(targets), "--set", "num_layers=4"],
        [
            "grow",
            str(source),
            next(targets),
            "--optimizer-state",
            "carry",
            "--set",
            "hidden_size=16",
            "multipliers=true",
        ],
        ["export-hf", str(source), next(targets)],
    ]
    others = [
        ["import-megatron", str(foreign), next(targets), "--set", *SETTINGS],
        ["import-megatron", str(foreign), next(targets), "--weights-only", "--set", *SETTINGS],
    ]
    by_manifest = CHECKPOINTS[damage] in (_nested_manifest,) or "10^9" in damage or "2^62" in damage
    codes = _all_end(own if by_manifest else own + others, capfd)
    assert any(codes), "nobody noticed"


def test_a_grown_checkpoint_whose_source_has_an_endless_name_is_verified_without_it(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    assert main(["grow", str(checkpoint), str(target), "--set", "num_layers=4"]) == 0
    record = json.loads((target / "manifest.json").read_text())["lineage"][0]
    _manifest("lineage", [{**record, "source": "x" * 5000}])(target)
    assert _all_end([["verify", str(target), "--full"]], capfd) == [0]


def _config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


def _index(places: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return damage


def _deep(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_text("[" * 10**5 + "]" * 10**5)

    return damage


FOLDERS: dict[str, Damage] = {
    "10^9 layers": _config(num_hidden_layers=10**9),
    "10^9 wide": _config(hidden_size=10**9, head_dim=12),
    "a vocabulary of 2^62": _config(vocab_size=2**62),
    "architectures, a number": _config(architectures=1.5),
    "layer types, a number": _config(layer_types=5),
    "model type, a list": _config(model_type=["llama"]),
    "config.json, deep": _deep("config.json"),
    "an endless name": _index({"model.norm.weight": "x" * 5000}),
    "no names": _index(5),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_every_command_ends_on_a_damaged_hugging_face_folder(
    damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    write_llama(folder, {})
    FOLDERS[damage](folder)
    commands = [
        ["inspect", f"hf:{folder}"],
        ["import-hf", str(folder), str(tmp_path / "imported")],
        ["grow", f"hf:{folder}", f"hf:{tmp_path / 'grown'}", "--set", "num_layers=4"],
    ]
    assert _all_end(commands, capfd) == [2, 2, 2]
