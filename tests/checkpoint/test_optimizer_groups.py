"""The parameter groups of ``common.pt`` are those that the optimizer looks for when it loads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from growth_megatron.checkpoint.folder.manifest import Multipliers
from growth_megatron.checkpoint.torch_dist.optimizer_groups import (
    describe_multipliers,
    fresh_common,
    regroup,
)
from growth_megatron.errors import CheckpointError
from growth_megatron.model.architecture import without_layer_number
from tests.checkpoint.written import geometry
from tests.ranks import run_ranks

QKV = "decoder.layers.*.self_attention.linear_qkv.weight"
FC2 = "decoder.layers.*.mlp.linear_fc2.weight"
GAIN = "decoder.layers.*.mlp.linear_fc1.layer_norm_weight"
OUTPUT = "output_layer.weight"


def _groups(common: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = common["optimizer"]["optimizer"]["param_groups"]
    return groups


def _multipliers(common: dict[str, Any]) -> list[tuple[float, float, float]]:
    return [(g["lr_mult"], g["wd_mult"], g.get("eps_mult", 1.0)) for g in _groups(common)]


def _trained() -> dict[str, Any]:
    common = fresh_common()
    for group in _groups(common):
        group |= {"lr": 3e-3, "weight_decay": 0.1 * group["wd_mult"], "step": 70.0, "betas": (0.8, 0.9)}
    return common


def test_a_fresh_one_is_what_a_save_of_a_fresh_model_holds(tmp_path: Path) -> None:
    """All but the settings, which the engine puts in before each step, and the type of the step."""
    (saved,) = run_ranks("tests.train.multiplier_workers:common_of_a_fresh_save", 1, {"folder": str(tmp_path)})
    ours = fresh_common()
    assert ours.keys() == saved.keys()
    assert ours["content_metadata"] == saved["content_metadata"]
    assert ours["optimizer"]["param_state_sharding_type"] == saved["optimizer"]["param_state_sharding_type"]
    settings = {"lr", "max_lr", "min_lr", "weight_decay", "eps", "betas"}
    for mine, theirs in zip(_groups(ours), _groups(saved), strict=True):
        assert theirs.items() - settings_of(theirs, settings) <= mine.items() - settings_of(mine, settings)
        assert settings <= mine.keys()
        assert isinstance(mine["step"], int), "the Adam of apex and Transformer Engine counts in integers"
        assert mine["bias_correction"], "which the Adam of apex and Transformer Engine looks up in each group"


def settings_of(group: dict[str, Any], names: set[str]) -> set[tuple[str, Any]]:
    for name in names & group.keys():
        group[name] = 0.0
    return {(name, 0.0) for name in names}


def test_without_multipliers_there_are_the_two_groups_with_and_without_weight_decay() -> None:
    common = _trained()
    assert regroup(common, {}, geometry()) == common
    assert _multipliers(common) == [(1.0, 1.0, 1.0), (1.0, 0.0, 1.0)]


def test_each_distinct_combination_has_its_group_and_gains_no_weight_decay() -> None:
    multipliers = {
        QKV: Multipliers(learning_rate=0.5, weight_decay=2.0, epsilon=0.5),
        FC2: Multipliers(learning_rate=0.5, weight_decay=2.0, epsilon=0.5),
        OUTPUT: Multipliers(learning_rate=0.5, weight_decay=2.0),
        GAIN: Multipliers(weight_decay=3.0, epsilon=0.25),
    }
    grown = regroup(_trained(), multipliers, geometry())
    expected = {(1, 1, 1), (1, 0, 1), (0.5, 2, 0.5), (0.5, 2, 1), (1, 0, 0.25)}
    assert set(_multipliers(grown)) == expected
    assert len(_groups(grown)) == len(expected)
    for group, (lr, wd, eps) in zip(_groups(grown), _multipliers(grown), strict=True):
        assert (group["step"], group["betas"]) == (70.0, (0.8, 0.9))
        assert group["lr"] == pytest.approx(3e-3 * lr, rel=1e-15)
        assert group["weight_decay"] == pytest.approx(0.1 * wd, rel=1e-15)
        assert group["eps"] == pytest.approx(1e-8 * eps, rel=1e-15)


def test_groups_can_be_made_of_any_groups() -> None:
    """A second growth changes the multipliers of the first, an untied output comes, or they end."""
    plain = _trained()
    every = {without_layer_number(key): Multipliers(learning_rate=0.5, weight_decay=2.0) for key in (QKV, FC2, OUTPUT)}
    once = regroup(plain, every | {"embedding.word_embeddings.weight": Multipliers(epsilon=0.5)}, geometry())
    assert _groups(regroup(once, {}, geometry())) == _groups(plain)
    tied = regroup(once, {QKV: Multipliers(learning_rate=0.25)}, geometry(tie_embeddings=True))
    assert _multipliers(tied) == [(1.0, 1.0, 1.0), (0.25, 1.0, 1.0), (1.0, 0.0, 1.0)]


def test_the_input_stays_as_it_is() -> None:
    common = _trained()
    before = copy.deepcopy(common)
    grown = regroup(common, {QKV: Multipliers(learning_rate=0.5)}, geometry())
    _groups(grown)[0]["betas"] = None
    grown["content_metadata"]["x"] = 1
    assert common == before


@pytest.mark.parametrize(
    "unknown", ["output_layer.weight", "decoder.layers.0.mlp.linear_fc2.weight", "decoder.layers.*.mlp.linear_fc2"]
)
def test_a_multiplier_of_no_tensor_is_refused(unknown: str) -> None:
    with pytest.raises(CheckpointError, match=unknown.replace("*", "[*]")):
        regroup(fresh_common(), {unknown: Multipliers()}, geometry(tie_embeddings=True))


@pytest.mark.parametrize("common", [{}, {"optimizer": {"optimizer": {"param_groups": []}}}, {"optimizer": None}])
def test_a_file_without_groups_is_refused(common: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no parameter groups"):
        regroup(common, {}, geometry())


def test_names_lose_their_layer_number_alone() -> None:
    assert without_layer_number("decoder.layers.17.mlp.linear_fc2.weight") == FC2
    assert without_layer_number("embedding.word_embeddings.weight") == "embedding.word_embeddings.weight"
    assert without_layer_number(FC2) == FC2


def test_the_description_is_one_line_with_equal_factors_together() -> None:
    factors = Multipliers(learning_rate=0.5, weight_decay=2.0, epsilon=0.5)
    text = describe_multipliers({QKV: factors, FC2: factors, OUTPUT: Multipliers(learning_rate=0.5)})
    assert text.endswith("0.5, 2, 0.5: self_attention.linear_qkv, mlp.linear_fc2; 0.5, 1, 1: output_layer")
