"""The paper's guideline gives the paper's rows, and says where it does not hold."""

from __future__ import annotations

import pytest

from growth_megatron.report.guideline import guideline
from tests.command_line import run_command


@pytest.mark.parametrize(
    ("parameters", "tokens", "billions"),
    [(8e9, 15e12, 6.58), (7e9, 2e12, 11.11), (13e9, 2e12, 15.84)],
)
def test_the_published_rows_come_out(parameters: float, tokens: float, billions: float) -> None:
    found = guideline(parameters, tokens)
    assert found.growth_tokens / 1e9 == pytest.approx(billions, abs=0.005)
    assert found.growth_factor == 4
    assert any("parameters are outside" in text for text in found.warnings)


def test_within_the_fitted_range_nothing_is_warned_of() -> None:
    assert guideline(1.1e9, 1e11).warnings == ()


def test_far_below_the_range_the_fit_is_cut_to_a_share_of_the_tokens() -> None:
    found = guideline(50e6, 1e9)
    assert found.fitted_growth_tokens / 1e9 == pytest.approx(23.8, abs=0.1)
    assert found.growth_tokens == 0.25e9
    assert any("cut to that" in text for text in found.warnings)


def test_the_command_says_it_and_refuses_what_is_no_size() -> None:
    said = run_command("guideline", "--params", "7e9", "--tokens", "2e12")
    assert said.code == 0
    assert "11.11 B tokens" in said.out
    assert "warning" in said.out
    assert "no advice" not in said.out
    assert "no advice for so small a target" in run_command("guideline", "--params", "1e6", "--tokens", "6e5").out
    for wrong in ("0", "-1", "nan", "inf", "0.3", "1e308"):
        outcome = run_command("guideline", "--params", wrong, "--tokens", "2e12")
        assert outcome.code == 2, outcome.printed
        assert "Traceback" not in outcome.printed
