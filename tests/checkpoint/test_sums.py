"""Data that are read are what was saved: rot of a source ends the command, and is never given fresh checksums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from growth_megatron.__main__ import main
from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.folder.manifest import FileEntry, read_manifest, validate_checkpoint
from growth_megatron.checkpoint.folder.sums import summed_beside
from growth_megatron.errors import DamagedError
from growth_megatron.growth.execute import grow_checkpoint
from growth_megatron.growth.layers import parse_layers
from growth_megatron.growth.plan import plan_depth
from tests.checkpoint.written import geometry, write_checkpoint

KEY = "decoder.layers.1.mlp.linear_fc2.weight"


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.flatten()[:6].view(torch.uint8).numpy().tobytes()


def _flip(folder: Path, content: bytes) -> str:
    """Change the lowest bit of ``content`` wherever it lies in a file of ``folder``; the file's name."""
    for file in sorted(folder.iterdir()):
        if content in (whole := file.read_bytes()):
            file.write_bytes(whole.replace(content, bytes([content[0] ^ 1]) + content[1:]))
            return file.name
    raise AssertionError("not there")


@pytest.fixture
def rotten(tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint with one wrong bit in one weight and its master; and the name of the first file with it."""
    tensors = write_checkpoint(tmp_path / "source", geometry(3))
    weights = [tensors[prefix + KEY] for prefix in ("", "optimizer.state.param.")]
    names = [_flip(tmp_path / "source", _bytes(tensor)) for tensor in weights]
    return tmp_path / "source", min(names)


@pytest.mark.parametrize(
    "command",
    [
        ["grow", "SOURCE", "TARGET", "--materialize", "--set", "num_layers=6"],
        ["grow", "SOURCE", "TARGET", "--set", "hidden_size=16"],
        ["grow", "SOURCE", "TARGET", "--verify-source", "--set", "num_layers=6"],
        ["grow", "SOURCE", "hf:TARGET", "--set", "num_layers=6"],
        ["export-hf", "SOURCE", "TARGET"],
        ["inspect", "SOURCE", "--tensor", KEY],
    ],
    ids=" ".join,
)
def test_a_wrong_bit_of_the_source_ends_what_reads_it(
    command: list[str], rotten: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, _ = rotten
    names = {"SOURCE": str(source), "TARGET": str(tmp_path / "target"), "hf:TARGET": f"hf:{tmp_path / 'target'}"}
    assert validate_checkpoint(source) is None
    assert main([names.get(word, word) for word in command]) == 2
    assert "does not match its checksum: it changed after it was saved" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"source", ".lock_target"}


def test_links_carry_the_sums_and_say_that_data_were_not_read(
    rotten: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, name = rotten
    assert main(["grow", str(source), str(tmp_path / "target"), "--set", "num_layers=6"]) == 0
    assert "linked (not re-read, --verify-source does; the source's checksums)" in capsys.readouterr().out
    assert read_manifest(tmp_path / "target").files[name] == read_manifest(source).files[name]
    assert main(["verify", str(tmp_path / "target"), "--full"]) == 2
    assert f"{name} does not match its checksum" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "target")]) == 0
    assert "sizes alone were looked at, contents are with --full" in capsys.readouterr().out


class _OneFileSystemEach(FileOperations):
    def link(self, source: Path, target: Path) -> bool:
        return False


def test_what_is_copied_instead_of_linked_is_summed_on_the_way(rotten: tuple[Path, str], tmp_path: Path) -> None:
    plan = plan_depth(geometry(3), geometry(5), parse_layers("1-23*2", 3))
    with pytest.raises(DamagedError, match="does not match its checksum"):
        grow_checkpoint(rotten[0], tmp_path / "target", plan, "carry", files=_OneFileSystemEach())
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_the_small_files_are_read_and_so_are_summed_by_links_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "source", geometry(3))
    content = (tmp_path / "source/common.pt").read_bytes()
    (tmp_path / "source/common.pt").write_bytes(content.replace(b"iteration", b"iterbtion"))
    assert main(["grow", str(tmp_path / "source"), str(tmp_path / "target"), "--set", "num_layers=6"]) == 2
    assert "common.pt does not match its checksum" in capsys.readouterr().err


def test_a_rotten_source_is_told_from_a_wrong_growth_by_full_verification(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = write_checkpoint(tmp_path / "source", geometry(3))
    grow = ["grow", str(tmp_path / "source"), str(tmp_path / "target"), "--materialize", "--set", "num_layers=6"]
    assert main(grow) == 0
    _flip(tmp_path / "source", _bytes(tensors[KEY]))
    assert main(["verify", str(tmp_path / "target"), "--full"]) == 0
    assert "is damaged: __0_" in capsys.readouterr().out


def test_an_error_meanwhile_ends_the_summing(tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(KeyError), summed_beside(tmp_path, {"endless": FileEntry(size_bytes=0, sha256="0" * 64)}):
        raise KeyError
