"""Initial weights are one global model, the same at every layout."""

from __future__ import annotations

import pytest
import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.init import InitSource
from tests.ranks import run_ranks
from tests.workers import SMALL


def _whole(source: InitSource, key: str) -> torch.Tensor:
    return source.read(key, tuple(slice(0, size) for size in source.spec(key).shape))


def test_a_region_is_that_part_of_the_tensor() -> None:
    source = InitSource(ModelConfig(**SMALL), 1)
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(source.read(key, (slice(3, 9), slice(64, 128))), _whole(source, key)[3:9, 64:128])


def test_deviations_are_as_configured_and_gains_one() -> None:
    source = InitSource(ModelConfig(**SMALL), 1)
    assert _whole(source, "decoder.layers.0.mlp.linear_fc1.weight").std() == pytest.approx(0.02, rel=0.05)
    assert _whole(source, "decoder.layers.0.mlp.linear_fc2.weight").std() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert torch.equal(_whole(source, "decoder.final_layernorm.weight"), torch.ones(64))


def test_a_tied_model_has_no_output_tensor() -> None:
    keys = tensor_shapes(ModelConfig(**SMALL, tie_embeddings=True)).keys()
    assert "output_layer.weight" not in keys
    assert set(tensor_shapes(ModelConfig(**SMALL))) - set(keys) == {"output_layer.weight"}


def test_every_layout_starts_bit_equal() -> None:
    """Sums of each rank's shards, hashed by global position, agree between one rank and TP2 x PP2."""
    model = ModelConfig(**SMALL)
    whole = InitSource(model, 7)
    ranks = run_ranks(
        "tests.workers:initial_shards", 4, {"layout": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}
    )
    seen = set()
    for shards in ranks:
        for key, region, values in shards:
            expected = whole.read(key, tuple(slice(start, stop) for start, stop in region))
            assert torch.equal(torch.tensor(values).reshape(expected.shape), expected), key
            seen.add(key)
    assert seen == set(tensor_shapes(model))
