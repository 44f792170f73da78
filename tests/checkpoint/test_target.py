"""Targets that cannot be written, or where the room ends: every command that writes one says so, and leaves nothing."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from growth_megatron.__main__ import main
from tests.checkpoint.huggingface_models import write_llama
from tests.checkpoint.written import geometry, write_checkpoint

SETTINGS = ["num_attention_heads=4", "rope_base=10000", "norm_epsilon=1e-5", "sequence_length=8"]
COMMANDS = {
    "by links": ["grow", "CHECKPOINT", "TARGET", "--set", "num_layers=4"],
    "written": ["grow", "CHECKPOINT", "TARGET", "--set", "hidden_size=16"],
    "to hf": ["grow", "CHECKPOINT", "hf:TARGET", "--set", "num_layers=4"],
    "export-hf": ["export-hf", "CHECKPOINT", "TARGET"],
    "import-hf": ["import-hf", "HF", "TARGET"],
    "import-megatron": ["import-megatron", "FOREIGN", "TARGET", "--set", *SETTINGS],
    "weights": ["import-megatron", "FOREIGN", "TARGET", "--weights-only", "--set", *SETTINGS],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("sources")
    for name in ("checkpoint", "foreign"):
        write_checkpoint(folder / name, geometry(2))
    (folder / "foreign/manifest.json").unlink()
    write_llama(folder / "hf", {})
    return {"CHECKPOINT": str(folder / "checkpoint"), "FOREIGN": str(folder / "foreign"), "HF": str(folder / "hf")}


def _run(name: str, sources: dict[str, str], target: Path) -> int:
    words = {**sources, "TARGET": str(target), "hf:TARGET": f"hf:{target}"}
    return main([words.get(word, word) for word in COMMANDS[name]])


@contextmanager
def _largest_file(size_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_target_that_cannot_be_written_is_named(
    name: str, sources: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(name, sources, Path("/proc/target")) == 2  # not even root may write there
    assert "/proc/target" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_where_the_room_ends_the_command_says_so_and_a_second_one_succeeds(
    name: str, sources: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with _largest_file(2000):
        code = _run(name, sources, tmp_path / "target")
    said = capsys.readouterr().err
    assert (code, "Traceback" in said) == (2, False), said
    assert "cannot write" in said
    assert not (tmp_path / "target").exists()
    if name not in ("written", "import-hf", "weights"):  # these go on from what is complete
        assert {path.name for path in tmp_path.iterdir()} == {".lock_target"}
    assert _run(name, sources, tmp_path / "target") == 0
    assert {path.name for path in tmp_path.iterdir()} == {".lock_target", "target"}
