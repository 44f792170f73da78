"""What an earlier version saved is resumed, grown and verified as if it were today's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from growth_megatron.checkpoint.folder.manifest import read_manifest, validate_checkpoint
from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.growth.verify import verify_checkpoints
from tests.command_line import run_commands

EARLIER = Path(__file__).parents[1] / "fixtures" / "earlier_version"
LOSSES = {4: 5.580777168273926, 5: 5.547748565673828, 6: 5.506982326507568}
"""Of the steps that the earlier version took after what is stored."""


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    shutil.copytree(EARLIER, tmp_path / "earlier")
    return tmp_path / "earlier"


def test_its_growth_is_still_what_its_record_says(earlier: Path) -> None:
    checks = list(verify_checkpoints(earlier / "run", full=True))
    outcomes = {(check.path.name, check.subject): check.outcome for check in checks}
    assert outcomes == {
        ("step_00000003", "files"): "OK",
        ("step_00000003_grown", "files"): "OK",
        ("step_00000003_grown", "plan"): "OK",
        ("step_00000003_grown", "tensors"): "OK",
        ("step_00000003_grown", "optimizer"): "OK",
        ("step_00000003_grown", "logits"): "SKIPPED",
    }


def test_its_identity_is_the_one_that_was_recorded(earlier: Path) -> None:
    checkpoints = earlier / "run" / "checkpoints"
    (record,) = read_manifest(checkpoints / "step_00000003_grown").lineage
    origin = find_origin(checkpoints / "step_00000003")
    assert origin.identity == record.source_manifest_sha256
    assert (origin.geometry.num_query_groups, origin.geometry.head_dim) == (2, 4)


def test_a_run_goes_on_from_it_before_and_after_its_growth(earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "before")
    shutil.rmtree(tmp_path / "before" / "run" / "checkpoints" / "step_00000003_grown")
    commands = [
        [
            "train",
            str(folder / "config.yaml"),
            f"run.directory={folder / 'run'}",
            f"data.tokenizer={folder / 'tokenizer.model'}",
            f"data.train.0.path={folder / 'train'}",
            f"data.validation.0.path={folder / 'validation'}",
        ]
        for folder in (earlier, tmp_path / "before")
    ]
    grow = ["grow", str(earlier / "run" / "checkpoints" / "step_00000003"), str(tmp_path / "wider")]
    sizes = ["--set", "hidden_size=16", "num_attention_heads=4", "--optimizer-state", "carry"]
    outcomes = run_commands([[*grow, *sizes], *commands])
    assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
    assert validate_checkpoint(tmp_path / "wider", full=True) is None
    for folder in (earlier, tmp_path / "before"):
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in records if line["kind"] == "train" and line["step"] > 3}
        assert losses == pytest.approx(LOSSES, abs=1e-6)
        assert sum(line["kind"] == "growth" for line in records) == 1
        assert len(read_manifest(folder / "run" / "latest").lineage) == 1
