"""The model computes LLaMA's function: compared with the plain forward over the same global tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.reference import reference_logits
from tests.ranks import run_ranks
from tests.workers import SMALL, Varied

CASES: list[dict[str, Any]] = [
    {},
    {"num_query_groups": 8, "tie_embeddings": True},
    {"num_query_groups": 2, "head_dim": 16, "rope_base": 500.0, "norm_epsilon": 1e-2},
    {"attention_bias": True},
    {"qk_norm": True, "head_dim": 16},
    {"rope_scaling": {"type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}},
]


def _expected(case: dict[str, Any], tokens: list[int]) -> torch.Tensor:
    model = ModelConfig(**{**SMALL, "init_std": 0.2, **case})
    return reference_logits(Varied(model, 7), model, torch.tensor([tokens]))[0]


@pytest.fixture(scope="module")
def computed() -> list[list[list[float]]]:
    cases = [{**case, "init_std": 0.2} for case in CASES]
    return run_ranks("tests.workers:logits", 1, {"models": cases, "tokens": list(range(3, 35))})[0]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_logits_equal_a_plain_llama(number: int, computed: list[list[list[float]]]) -> None:
    expected = _expected(CASES[number], list(range(3, 35)))
    difference = (torch.tensor(computed[number]) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5


def test_negative_control_each_part_of_a_family_is_seen() -> None:
    plain = _expected(CASES[0], list(range(3, 35)))
    for case in ({"attention_bias": True}, {"qk_norm": True}, CASES[-1]):
        assert (_expected(case, list(range(3, 35))) - plain).abs().max() > 1e-3


def test_negative_control_another_rope_base_is_noticed(computed: list[list[list[float]]]) -> None:
    expected = _expected({"rope_base": 9000.0}, list(range(3, 35)))
    assert (torch.tensor(computed[0]) - expected).abs().max() / expected.abs().max() > 1e-4
