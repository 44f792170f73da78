"""Layer lists: the paper's notation, comma lists, stacking and the connection rate."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth_megatron.config.lines import compact_layers
from growth_megatron.errors import GrowthError
from growth_megatron.growth.layers import (
    MAX_LAYERS,
    connection_rate,
    parse_layers,
    resolve_layers,
)
from growth_megatron.growth.operators.stack import stack_layers

PAPER = {
    "123456*4": "123456" * 4,
    "12-3456*5-56": "12" + "3456" * 5 + "56",
    "12-345*7-6": "12" + "345" * 7 + "6",
    "123-456*7": "123" + "456" * 7,
    "1234-56*10": "1234" + "56" * 10,
    "12-34*10-56": "12" + "34" * 10 + "56",
    "1-234*7-56": "1" + "234" * 7 + "56",
    "123*7-456": "123" * 7 + "456",
}


@pytest.mark.parametrize("notation", PAPER)
def test_the_papers_partial_stackings_give_24_layers(notation: str) -> None:
    layers = parse_layers(notation, 6)
    assert layers == tuple(int(digit) - 1 for digit in PAPER[notation])
    assert len(layers) == 24


def test_a_list_with_commas_counts_from_0_and_reaches_beyond_9() -> None:
    assert parse_layers("0,1,0,1", 2) == (0, 1, 0, 1)
    assert parse_layers("0, 11 ,10", 12) == (0, 11, 10)


def test_a_list_takes_ranges_and_repeats() -> None:
    assert parse_layers("0-23,6-29", 30) == (*range(24), *range(6, 30))  # SOLAR-like
    assert parse_layers("0-3 x2, 1*2,3-3", 4) == (0, 1, 2, 3, 0, 1, 2, 3, 1, 1, 3)
    assert parse_layers("0-11", 12) == tuple(range(12))
    assert parse_layers("1-3 x1", 12) == (1, 2, 3)
    assert parse_layers("1-3", 12) == (0, 2)  # the paper's


@settings(deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_what_is_printed_of_a_list_reads_as_that_list(layers: list[int]) -> None:
    assert parse_layers(compact_layers(layers), 13) == tuple(layers)


@pytest.mark.parametrize(
    ("notation", "column", "says"),
    [
        ("", 1, "a segment without layers"),
        ("12--34", 4, "a segment without layers"),
        ("12-", 4, "a segment without layers"),
        ("*3", 1, "a segment without layers"),
        ("120", 3, "'0' is not a layer digit"),
        ("12-7", 4, "there is no layer 7; allowed: 1 to 6"),
        ("1 2", 2, "' ' is not a layer digit"),
        ("12*", 4, "'' is not a repeat count"),
        ("12*0", 4, "'0' is not a repeat count"),
        ("12*-3", 4, "'' is not a repeat count"),
        ("12*2*2", 4, "'2*2' is not a repeat count"),
        ("1²", 2, "not a layer digit"),
        ("12*²", 4, "not a repeat count"),
        ("12*99999", 4, "more than 4096 layers"),
        ("12*" + "9" * 5000, 4, "more than 4096 layers"),
        ("0,1,", 5, "'' is not a layer number"),
        ("0, 6", 4, "there is no layer 6; allowed: 0 to 5"),
        ("0,-1", 3, "'-1' is not a layer number"),
        ("0,5-6", 3, "there is no layer 6; allowed: 0 to 5"),
        ("0, 4-2", 4, "'4-2' holds no layer"),
        ("0-2 x0", 1, "'0-2 x0' holds no layer"),
        ("0,1-5 x1000", 3, "more than 4096 layers"),
        ("0 x", 1, "'0 x' is not a layer number or a range"),
    ],
)
def test_a_wrong_notation_is_refused_with_its_column(notation: str, column: int, says: str) -> None:
    with pytest.raises(GrowthError) as caught:
        parse_layers(notation, 6)
    message = str(caught.value)
    assert repr(notation) in message
    assert f"column {column}:" in message
    assert says in message


segments = st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 8))


@settings(deadline=None)
@given(st.lists(segments, min_size=1, max_size=6))
def test_notation_round_trips(parts: list[tuple[list[int], int]]) -> None:
    notation = "-".join("".join(map(str, digits)) + (f"*{count}" if count > 1 else "") for digits, count in parts)
    expected = tuple(digit - 1 for digits, count in parts for digit in digits * count)
    assert parse_layers(notation, 6) == expected
    if len(expected) > 1:
        assert parse_layers(",".join(map(str, expected)), 6) == expected


@settings(deadline=None)
@given(st.text(max_size=20), st.integers(1, 12))
def test_any_text_gives_layers_of_the_source_or_a_config_error(notation: str, source_layers: int) -> None:
    try:
        layers = parse_layers(notation, source_layers)
    except GrowthError:
        return
    assert layers
    assert all(0 <= layer < source_layers for layer in layers)
    assert len(layers) <= MAX_LAYERS


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 100))
def test_stacking_repeats_the_source_in_order(source_layers: int, more: int) -> None:
    layers = stack_layers(source_layers, source_layers + more)
    assert layers[:source_layers] == tuple(range(source_layers))
    assert all(layers[j] == layers[j - source_layers] for j in range(source_layers, len(layers)))


def test_stacking_to_fewer_layers_is_refused() -> None:
    with pytest.raises(GrowthError, match="cannot stack 6 layers to 5"):
        stack_layers(6, 5)


def test_connection_rates_of_the_paper() -> None:
    interpolation = tuple(j // 3 for j in range(24))
    assert round(100 * connection_rate(stack_layers(8, 24)), 1) == 91.3
    assert round(100 * connection_rate(interpolation), 1) == 30.4
    assert connection_rate((0,)) == 1.0


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=30))
def test_connection_rate_is_a_share(layers: list[int]) -> None:
    assert 0 <= connection_rate(layers) <= 1


def test_configured_layers_are_resolved_and_checked_against_the_target() -> None:
    assert resolve_layers(None, 2, 5, stack_layers) == (0, 1, 0, 1, 0)
    assert resolve_layers("12*2", 2, 4, stack_layers) == (0, 1, 0, 1)
    assert resolve_layers([0, 0, 1], 2, 3, stack_layers) == (0, 0, 1)
    with pytest.raises(GrowthError, match="gives 4 layers but the target model has 6.*num_layers to 4"):
        resolve_layers("12*2", 2, 6, stack_layers)
    with pytest.raises(GrowthError, match="entry 1 is 2; allowed: 0 to 1"):
        resolve_layers((0, 2), 2, 2, stack_layers)
