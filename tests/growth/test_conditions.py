"""What a growth cannot be asked for: every refusal says what is allowed, and the nearest possible value works."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.errors import EXIT_USAGE, GrowthError
from growth_megatron.growth.conditions import check_growth, growth_problems, width_changes, zero_width_norm_epsilon
from growth_megatron.growth.operators import choose, names_by_side, registry


def model(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "head_dim": 4,
        "ffn_hidden_size": 40,
        "vocab_size": 500,
    }
    return ModelConfig(**(fields | changes))


def problems(changes: dict[str, Any], source: dict[str, Any] | None = None, **growth: Any) -> dict[str, str]:
    before = model(**(source or {}))
    after = ModelConfig(**(before.model_dump() | changes))
    found = growth_problems(before, after, GrowthConfig(**growth))
    assert len(dict(found)) == len(found)  # one for each key
    return dict(found)


# operator, what the target changes, the key reported, words of the message
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("stack", {"hidden_size": 48}, "model.hidden_size", "changes num_layers alone, so keep 24; or use direct"),
    ("identity", {"num_query_groups": 6}, "model.num_query_groups", "identity changes num_layers alone, so keep 2"),
    ("solar", {"num_attention_heads": 12}, "model.num_attention_heads", "so keep 6; or use direct"),
    ("midas", {"head_dim": 8}, "model.head_dim", "so keep 4; or use direct"),
    ("gradual", {"ffn_hidden_size": 80}, "model.ffn_hidden_size", "so keep 40; or use direct"),
    ("direct", {"hidden_size": 20}, "model.hidden_size", "20 is less than the source's 24; a growth keeps or"),
    ("zero", {"ffn_hidden_size": 39}, "model.ffn_hidden_size", "39 is less than the source's 40"),
    ("split", {"num_attention_heads": 4}, "model.num_attention_heads", "4 is less than the source's 6"),
    ("random", {"head_dim": 2}, "model.head_dim", "2 is less than the source's 4; a growth keeps or raises it"),
    ("split", {"num_query_groups": 1}, "model.num_query_groups", "1 is less than the source's 2: keys and values"),
    ("zero", {"num_query_groups": 1}, "model.num_query_groups", "keep or raise it"),
    ("hypercloning", {"num_query_groups": 1}, "model.num_query_groups", "keep or raise it"),
    ("direct", {"vocab_size": 501}, "model.vocab_size", "makes vocab_size 501, the source has 500; growth keeps it"),
    ("zero", {"vocab_multiple": 100}, "model.vocab_multiple", "makes padded_vocab_size 500, the source has 512"),
    ("stack", {"rope_base": 5e5}, "model.rope_base", "makes rope_base 500000.0, the source has 10000.0"),
    ("stack", {"tie_embeddings": True}, "model.tie_embeddings", "its weights would be lost; set it to false"),
    ("direct", {"norm_epsilon": 1e-6}, "model.norm_epsilon", "1e-06 would change the function; allowed: 1e-05"),
    ("zero", {"norm_epsilon": 1e-6}, "model.norm_epsilon", "allowed: 1e-05"),
    (
        "zero", {"norm_epsilon": 1e-6, "hidden_size": 48}, "model.norm_epsilon",
        "1e-06 would change the function; allowed: 1e-05 or 5e-06",
    ),
    ("random", {"norm_epsilon": 5e-6, "hidden_size": 48}, "model.norm_epsilon", "allowed: 1e-05"),
    ("split", {"num_layers": 8}, "model.num_layers", "split changes the width alone, so keep 4; or use stack+split"),
    ("sparkling", {"num_layers": 8}, "model.num_layers", "so keep 4; or use stack+sparkling"),
    (
        "stack", {"num_layers": 2}, "model.num_layers",
        "2 is less than the source's 4; to drop layers, list those to keep in growth.layers (--layers), as 0,1",
    ),
    ("solar", {"num_layers": 7}, "model.num_layers", "even number up to 8, twice the source's 4; nearest possible: 8"),
    ("solar", {"num_layers": 12}, "model.num_layers", "nearest possible: 8"),
    ("split", {"head_dim": 6}, "model.head_dim", "6 is not a multiple of the source's 4"),
    ("zero", {"head_dim": 10}, "model.head_dim", "nearest possible: 8 or 12"),
    (
        "zero", {"num_query_groups": 3}, "model.num_attention_heads",
        "6 heads in 3 groups are 2 a group, which cannot hold the 3 heads of each of the source's 2 groups; zero adds "
        "new groups beside the old, so at least 9 heads, or use split",
    ),
    (
        "random", {"num_query_groups": 4, "num_attention_heads": 8}, "model.num_attention_heads",
        "so at least 12 heads, or use split",
    ),
    (
        "split", {"num_query_groups": 3}, "model.num_attention_heads", "nearest possible: 9 heads, or 2 groups",
    ),
    ("hypercloning", {"hidden_size": 36}, "model.hidden_size", "so a multiple of 24; nearest: 24 or 48"),
    ("hypercloning", {"ffn_hidden_size": 100}, "model.ffn_hidden_size", "a multiple of 40; nearest: 80 or 120"),
    ("hypercloning", {"num_attention_heads": 8}, "model.num_attention_heads", "nearest: 6 or 12"),
    ("hypercloning", {"head_dim": 8}, "model.head_dim", "hypercloning clones heads whole, so keep 4; or use split"),
    ("masked", {"head_dim": 8}, "model.head_dim", "no mask hides; keep 4, or use split"),
    ("masked", {"num_query_groups": 6}, "model.num_attention_heads", "masked adds new groups beside the old"),
    ("masked", {"norm_epsilon": 5e-6, "hidden_size": 48}, "model.norm_epsilon", "allowed: 1e-05"),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "changes", "key", "says"), REFUSED)
def test_what_is_impossible_is_refused_with_what_is_allowed(
    operator: str, changes: dict[str, Any], key: str, says: str
) -> None:
    found = problems(changes, operator=operator)
    assert set(found) == {key}
    assert says in found[key]
    target = ModelConfig(**(model().model_dump() | changes))
    with pytest.raises(GrowthError) as caught:
        check_growth(model(), target, GrowthConfig(operator=operator))
    assert str(caught.value) == f"{key.partition('.')[2]}: {found[key]}"
    assert caught.value.exit_code == EXIT_USAGE


def test_the_fewest_heads_that_copied_groups_can_share_are_named() -> None:
    source = {"num_attention_heads": 10, "hidden_size": 40}
    message = problems({"num_query_groups": 5}, source, operator="split")["model.num_attention_heads"]
    assert "10 heads in 5 groups are 2 a group" in message  # a source group of 5 heads may have but two copies
    assert message.endswith("nearest possible: 15 heads, or 2 groups")
    assert not problems({"num_query_groups": 5, "num_attention_heads": 15}, source, operator="split")


@pytest.mark.parametrize(
    ("layers", "operator", "after", "says"),
    [
        ((0, 1), "split", 4, "split changes the width alone; remove it, or use direct"),
        ((0, 1, 2), "stack", 4, "gives 3 layers but the target model has 4; change the list, or set num_layers to 3"),
        ((0, 1, 2, 4), "direct", 4, "entry 3 is 4; allowed: 0 to 3, the source has 4 layers counted from 0"),
        ("12-34*2-5", "stack", 7, "there is no layer 5; allowed: 1 to 4"),
        ("0,1,x,3", "stack", 4, "column 5: 'x' is not a layer number or a range; allowed: the paper's notation"),
        ((0, 1, 1, 3, 3), "identity", 5, "keeps every source layer and adds new ones, but the list leaves out [2]"),
        ((0, 1), "zero", 2, "leaves out [2, 3]; name them too"),
        ("1111", "random", 4, "leaves out [1, 2, 3]; name them too"),
    ],
)  # fmt: skip
def test_a_layer_list_that_cannot_be_is_refused(layers: Any, operator: str, after: int, says: str) -> None:
    found = problems({"num_layers": after}, operator=operator, layers=layers)
    assert set(found) == {"growth.layers"}
    assert says in found["growth.layers"]


def test_the_layers_to_keep_that_a_message_names_are_accepted() -> None:
    for after in (2, 3):
        message = problems({"num_layers": after}, operator="stack")["model.num_layers"]
        kept = re.search(r"growth.layers \(--layers\), as (.*)", message)
        assert kept
        assert not problems({"num_layers": after}, operator="stack", layers=kept[1])
    message = problems({"num_layers": 5}, {"num_layers": 9}, operator="stack")["model.num_layers"]
    assert message.endswith("as 0,1,2,3,...")


def test_every_problem_is_named_at_once() -> None:
    changes = {"vocab_size": 501, "num_layers": 7, "head_dim": 6, "num_query_groups": 1, "norm_epsilon": 1e-4}
    found = problems(changes, operator="direct", layers=(0, 1))
    keys = {"model.vocab_size", "growth.layers", "model.head_dim", "model.num_query_groups", "model.norm_epsilon"}
    assert set(found) == keys
    with pytest.raises(GrowthError) as caught:
        check_growth(model(), ModelConfig(**(model().model_dump() | changes)), GrowthConfig(layers=(0, 1)))
    assert all(f"{key.partition('.')[2]}: {text}" in str(caught.value) for key, text in found.items())


POSSIBLE: list[tuple[str, dict[str, Any]]] = [
    ("direct", {}),
    ("direct", {"num_layers": 9, "hidden_size": 25, "ffn_hidden_size": 41, "head_dim": 12, "num_attention_heads": 8}),
    ("split", {"num_query_groups": 6}),
    ("split", {"num_query_groups": 4, "num_attention_heads": 8}),
    ("split", {"num_query_groups": 3, "num_attention_heads": 9}),
    ("zero", {"num_query_groups": 3, "num_attention_heads": 9}),
    ("zero", {"hidden_size": 48, "norm_epsilon": 5e-6}),
    ("zero", {"hidden_size": 36, "norm_epsilon": 1e-5 * 2 / 3}),
    ("zero", {"hidden_size": 48}),
    ("direct", {"vocab_multiple": 64}),  # pads to the same
    ("identity+zero", {"hidden_size": 48, "num_layers": 5, "norm_epsilon": 5e-6}),
    ("hypercloning", {"hidden_size": 72, "num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 40}),
    ("stack", {"sequence_length": 1024, "init_std": 0.01}),
    ("solar", {"num_layers": 8}),
]


@pytest.mark.parametrize(("operator", "changes"), POSSIBLE)
def test_what_is_possible_is_not_refused(operator: str, changes: dict[str, Any]) -> None:
    assert not problems(changes, operator=operator)


def test_an_untied_output_is_possible_and_dropped_layers_are_too() -> None:
    assert not problems({"tie_embeddings": False}, {"tie_embeddings": True}, operator="stack")
    assert not problems({"num_layers": 2}, operator="stack", layers=(3, 0))


def test_defaults_count_as_what_they_stand_for() -> None:
    spelt = model(num_query_groups=6, head_dim=4)
    assert not width_changes(spelt, model(num_query_groups=None, head_dim=None))
    assert width_changes(spelt, model(num_query_groups=None, head_dim=None, hidden_size=48)) == {
        "hidden_size": (24, 48),
        "head_dim": (4, 8),
    }
    assert zero_width_norm_epsilon(model(), 72) == pytest.approx(1e-5 / 3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(["split", "zero", "random", "hypercloning", "sparkling"]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(0, 30),
)
def test_the_nearest_possible_values_of_the_heads_are_possible(
    operator: str, groups: int, heads: int, new_groups: int, new_heads: int, channels: int, hidden: int
) -> None:
    source = model(num_attention_heads=groups * heads, num_query_groups=groups)
    sizes: dict[str, Any] = {
        "num_attention_heads": new_groups * new_heads,
        "num_query_groups": new_groups,
        "head_dim": 4 + 2 * channels,
        "hidden_size": 24 + hidden,
    }
    growth = GrowthConfig(operator=operator)
    for _ in range(4):
        found = dict(growth_problems(source, model(**sizes), growth))
        if not found:
            break
        for key, text in found.items():
            name = key.partition(".")[2]
            nearest = re.search(r"nearest(?: possible)?: (?:\d+ or )?(\d+)|at least (\d+) heads|so keep (\d+)", text)
            less = re.search(r"is less than the source's (\d+)", text)
            chosen = nearest or less
            assert chosen, text
            sizes[name] = int(next(filter(None, chosen.groups())))
        if sizes["num_attention_heads"] % sizes["num_query_groups"]:  # refused by the model itself
            sizes["num_attention_heads"] += -sizes["num_attention_heads"] % sizes["num_query_groups"]
    assert not growth_problems(source, model(**sizes), growth)


# The section itself.


def refusal(**fields: Any) -> str:
    with pytest.raises((ValidationError, GrowthError)) as caught:
        choose(GrowthConfig(**fields))
    return str(caught.value)


@pytest.mark.parametrize(
    ("operator", "says"),
    [
        ("stak", "'stak' is no operator; did you mean stack?"),
        ("lerne", "'lerne' is no operator"),
        ("hyperclone", "did you mean hypercloning?"),
        ("identity+splitt", "'splitt' is no operator; did you mean split?"),
        ("xyz", "'xyz' is no operator"),
        ("", "at least 1 character"),
        ("split+", "'' is no operator"),
        ("split+stack", "is 'split+stack'; write DEPTH+WIDTH with DEPTH out of direct, learn, masked, random"),
        ("stack+solar", "and WIDTH out of direct, learn, masked, random, zero, hypercloning, sparkling, split"),
        ("stack+split+zero", "write DEPTH+WIDTH"),
    ],
)  # fmt: skip
def test_an_operator_that_does_not_exist_is_refused_with_those_that_do(operator: str, says: str) -> None:
    message = refusal(operator=operator)
    assert says in message
    if "is no operator" in says:
        assert all(name in message for name in (*registry(), "DEPTH+WIDTH"))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"multipliers": True}, "multipliers: needs optimizer_state carry, here it is reset"),
        ({"multipliers": True, "optimizer_state": "asymmetric"}, "here it is asymmetric"),
        ({"multipliers": True, "operator": "sparkling"}, "multipliers: needs optimizer_state carry"),
        ({"operator": "hypercloning", "order": "interleaved"}, "order: hypercloning has tiled copies; remove order"),
        (
            {"operator": "sparkling", "optimizer_state": "carry"},
            "optimizer_state: sparkling has asymmetric moments, here it is carry; remove it, or use split",
        ),
        ({"operator": "stack", "order": "tiled"}, "order: is about copies along the width, and stack makes none"),
        ({"operator": "zero", "shares": "uneven"}, "shares: is about copies along the width, and zero makes none"),
        ({"operator": "stack+random", "cancelling_noise": 1}, "stack+random makes none; remove it, or use split"),
        ({"noise": 1.0}, "Input should be less than 1"),
        ({"noise": -0.1}, "Input should be greater than or equal to 0"),
        ({"noise": True}, "must be a number, not true or false"),
        ({"cancelling_noise": -1}, "Input should be greater than or equal to 0"),
        ({"cancelling_noise": float("inf")}, "Input should be a finite number"),
        ({"optimizer_state": "keep"}, "Input should be 'reset', 'carry' or 'asymmetric'"),
        ({"schedule": "again"}, "Input should be 'restart' or 'continue'"),
        ({"order": "shuffled"}, "Input should be 'interleaved' or 'tiled'"),
        ({"shares": "odd"}, "Input should be 'even' or 'uneven'"),
        ({"layers": [0, -1]}, "Input should be greater than or equal to 0"),
        ({"operator": "random", "ramp": {}}, "ramp: is about masks, and random has none; remove it, or use masked"),
        ({"operator": "masked", "ramp": {"ffn": [5, 5]}}, "ffn: [5, 5] must rise; write the first step, then the last"),
        ({"operator": "masked", "ramp": {"width": [0, 5]}}, "Extra inputs are not permitted"),
        ({"operators": "stack"}, "Extra inputs are not permitted"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(fields: dict[str, Any], says: str) -> None:
    assert says in refusal(**fields)


def test_all_wrong_options_are_named_at_once() -> None:
    message = refusal(operator="zero", order="tiled", shares="uneven", cancelling_noise=1, multipliers=True)
    assert all(f"{key}: " in message for key in ("order", "shares", "cancelling_noise", "multipliers"))


@pytest.mark.parametrize(
    ("operator", "depth", "width"),
    [
        ("direct", "stack", "split"),
        ("zero", "zero", "zero"),
        ("random", "random", "random"),
        *((name, name, None) for name in names_by_side()["depth"]),
        *((name, None, name) for name in names_by_side()["width"]),
        ("identity+split", "identity", "split"),
        ("zero+direct", "zero", "split"),
        ("direct+hypercloning", "stack", "hypercloning"),
    ],
)
def test_what_an_operator_does_to_depth_and_width(operator: str, depth: str | None, width: str | None) -> None:
    choice = choose(GrowthConfig(operator=operator))
    assert (choice.depth and choice.depth.name, choice.width and choice.width.name) == (depth, width)


def test_defaults_depend_on_the_operator() -> None:
    assert (choose(GrowthConfig()).state_policy, choose(GrowthConfig()).copy_order) == ("reset", "interleaved")
    assert choose(GrowthConfig(operator="sparkling")).state_policy == "asymmetric"
    assert choose(GrowthConfig(operator="stack+sparkling")).state_policy == "asymmetric"
    assert choose(GrowthConfig(operator="hypercloning")).copy_order == "tiled"
    assert choose(GrowthConfig(operator="stack+hypercloning", order="tiled")).copy_order == "tiled"
    assert choose(GrowthConfig(optimizer_state="carry", multipliers=True)).state_policy == "carry"
