"""megatron-core's own load takes what growth by links wrote, bit for bit: bfloat16 with masters, tied, irregular lists.

The matrix of layouts in float32 is in ``test_stack_layouts``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.torch_dist.reader import DistCheckpoint
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.plan import plan_depth
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.init import InitSource
from growth_megatron.model.reference import reference_logits
from growth_megatron.model.tensors import whole
from tests.ranks import run_ranks
from tests.workers import SMALL

LAYERS = [0, 1, 1, 0, 1, 0]
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "from PP2, tied, multi-query": {
        "saved": PP2,
        "model": {"tie_embeddings": True, "num_query_groups": 2, "head_dim": 16},
        "loads": [
            {"name": "carry_tp2", "layout": {**TP2, "sequence_parallel": True}, "policy": "carry"},
            {"name": "carry_dp2", "layout": {}, "policy": "carry"},
            {"name": "reset_vpp", "layout": {**PP2, "virtual_pipeline_parallel_size": 3}, "policy": "reset"},
        ],
    },
}


@pytest.fixture(scope="module", params=CASES)
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("grown")
    arguments = {"folder": str(folder), "layers": LAYERS, **CASES[request.param]}
    results = run_ranks("tests.growth.growth_workers:train_save_grow_load", 2, arguments)
    assert results[0] == results[1]
    return folder, {result["name"]: result for result in results[0]}


def test_weights_masters_and_moments_load_bit_equal_at_every_layout(grown: tuple[Path, dict[str, Any]]) -> None:
    folder, results = grown
    geometry = read_manifest(folder / "source").geometry
    plan = plan_depth(geometry, geometry.model_copy(update={"num_layers": len(LAYERS)}), LAYERS)
    for name in results:
        expected = GrownSource(DistCheckpoint(folder / "source"), plan, name.partition("_")[0])
        again = DistCheckpoint(folder / name)  # saved from the live model right after the load
        assert set(again.keys()) == set(expected.keys())
        for key in expected.keys():
            assert torch.equal(again.read(key), expected.read(key, whole(expected.spec(key).shape))), (name, key)


def test_the_moments_compared_are_not_zero_by_themselves(grown: tuple[Path, dict[str, Any]]) -> None:
    folder, results = grown
    for name in results:
        checkpoint = DistCheckpoint(folder / name)
        moments = [key for key in checkpoint.keys() if key.startswith("optimizer.state.exp_avg")]
        assert moments
        assert all((checkpoint.read(key).count_nonzero() == 0) == name.startswith("reset") for key in moments)


def test_the_step_goes_with_the_moments(grown: tuple[Path, dict[str, Any]]) -> None:
    """Adam corrects its bias by the step: kept moments with step 0, or zero ones with step 3, would be wrong."""
    _, results = grown
    for name, result in results.items():
        assert result["steps"] == [3.0 if name.startswith("carry") else 0.0]


def test_a_grown_source_loaded_into_a_live_model_on_two_ranks_is_the_source_models_function() -> None:
    source, tokens = {"num_layers": 2, "init_std": 0.2}, list(range(3, 35))
    target = {"num_layers": 3, "hidden_size": 96, "head_dim": 8, "num_attention_heads": 16, "num_query_groups": 8}
    arguments = {"layout": TP2, "source": source, "target": target, "tokens": tokens}
    halves = run_ranks("tests.growth.width_workers:grown_logits", 2, arguments)
    logits = torch.tensor(halves[0]), torch.tensor(halves[1])
    model = ModelConfig(**{**SMALL, **source})
    expected = reference_logits(InitSource(model, 7), model, torch.tensor([tokens]))[0]
    difference = (torch.cat(logits, dim=1) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5
