"""A law that is known is recovered within the interval, and a curve that cannot settle one gives a sentence instead."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from growth_megatron.errors import ConfigError
from growth_megatron.report import power_law
from growth_megatron.report.power_law import Law, Part, fit_law, law_part

Record = dict[str, Any]
Rate = Callable[[int, int], float]


def law(e: float, b: float) -> Callable[[float], float]:
    """3 nats above E at 1e18 FLOPs."""
    return lambda flops: e + 3.0 * (flops / 1e18) ** b


def constant(step: int, steps: int) -> float:
    return 1e-3


def curve(
    of: Callable[[float], float], steps: int = 400, noise: float = 0.02, rate: Rate = constant, seed: int = 1
) -> list[Record]:
    """Training records of stage ``main``, 1e16 FLOPs a step."""
    draw = random.Random(seed)
    return [
        {
            "kind": "train", "step": step, "stage": "main", "stage_step": step, "consumed_tokens": 1000 * step,
            "flops": 1e16 * step, "loss": of(1e16 * step) + draw.gauss(0, noise), "learning_rate": rate(step, steps),
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip


def part_of(records: list[Record]) -> Part:
    part = law_part(records, "main")
    assert isinstance(part, Part), part
    return part


def fitted(records: list[Record], irreducible: bool) -> Law:
    found = fit_law(part_of(records), irreducible=irreducible)
    assert found is not None
    return found


def test_the_intervals_hold_the_law_as_often_as_they_say() -> None:
    """Of 20 curves at 95 %: 16 or fewer would be seen in one of 400."""
    pure = [fitted(curve(law(0.0, -0.2), seed=seed), False) for seed in range(20)]
    assert sum(low <= -0.2 <= high for low, high in (each.b_interval for each in pure)) > 16
    true = law(0.0, -0.2)(8e18)
    assert sum(low <= true <= high for _, low, high in (each.at(8e18) for each in pure)) > 16
    assert all(each.a == pytest.approx(3.0 * 1e18**0.2, rel=0.2) for each in pure)


def test_an_irreducible_loss_is_recovered_where_the_curve_settles_it() -> None:
    found = fitted(curve(law(1.8, -0.4), noise=0.005), True)
    assert found.irreducible_interval is not None
    assert found.irreducible_interval[0] <= 1.8 <= found.irreducible_interval[1]
    assert found.b_interval[0] <= -0.4 <= found.b_interval[1]
    assert found.irreducible == pytest.approx(1.8, abs=0.1)
    pure = fitted(curve(law(1.8, -0.4), noise=0.005), False)  # the form that does not hold shows it
    assert pure.residual > 2 * found.residual


def test_an_irreducible_loss_that_the_curve_does_not_settle_is_none() -> None:
    assert fit_law(part_of(curve(law(0.0, -0.1), noise=0.05)), irreducible=True) is None
    assert fit_law(part_of(curve(lambda flops: 3.0 + flops / 1e19)), irreducible=False) is None  # it rises


def test_annealed_steps_are_left_out_and_counted() -> None:
    def wsd(step: int, steps: int) -> float:
        return 1e-3 * min(1.0, 10 * (1 - (step - 1) / steps), step / 20)

    records = curve(law(0.0, -0.2), rate=wsd)
    for record in records:  # what annealing does to a loss
        record["loss"] -= 0.3 * (record["step"] > 360)
    part = part_of(records)
    assert part.annealed == pytest.approx(39, abs=1)
    assert part.steps[0] >= 36  # neither the warm-up, nor what is older than a tenth of the FLOPs
    clean = fitted(records, False)
    assert clean.b_interval[0] <= -0.2 <= clean.b_interval[1]
    mixed = fitted([record | {"learning_rate": 1e-3} for record in records], False)  # as if they were not known to be
    assert mixed.b < clean.b
    assert mixed.residual > 2 * clean.residual


def test_a_cosine_schedule_gives_a_sentence_and_no_figure() -> None:
    found = law_part(curve(law(0.0, -0.2), rate=lambda step, steps: 1e-3 * (1 - 0.9 * step / steps)), "main")
    assert isinstance(found, str)
    assert "falls from early on" in found


@pytest.mark.parametrize("steps", [10, 19])
def test_a_curve_that_is_too_short_says_how_long_it_should_be(steps: int) -> None:
    found = law_part(curve(law(0.0, -0.2), steps=steps), "main")
    assert isinstance(found, str)
    assert "records over a factor of" in found
    assert "needed are 20 over a factor of 3" in found


def test_a_grown_stage_counts_from_where_its_loss_was_back_and_not_before() -> None:
    records = curve(law(0.0, -0.2), steps=100, noise=0.0)
    growth = {"kind": "growth", "step": 100}
    later = [
        r | {"step": r["step"] + 100, "stage": "grown", "flops": 1e18 + 5 * r["flops"], "loss": 3.5 - 0.01 * r["step"]}
        for r in records
    ]
    found = law_part([*records, growth, *later[:40]], "grown")
    assert isinstance(found, str)
    assert "has not come back" in found
    wide = [r | {"flops": 1e18 * 1.04 ** r["stage_step"]} for r in later]
    whole = law_part([*records, growth, *wide], "grown")
    assert isinstance(whole, Part)
    assert max(whole.losses) < 3.2  # the grown stage began at 3.5, where its base had ended at 3.0


def test_many_validations_are_fitted_and_not_the_training_losses() -> None:
    records = curve(law(0.0, -0.2))
    held = [
        {"kind": "validation", "step": r["step"], "stage": "main", "flops": r["flops"], "validation_loss": 2.0}
        for r in records[::20]
    ]
    assert part_of(records).kind == "training"
    part = part_of([*records, *held])
    assert part.kind == "validation"
    assert set(part.losses) == {2.0}


def test_without_scipy_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(curve(law(0.0, -0.2)))
    monkeypatch.setattr(power_law.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"growth-megatron\[advise\]"):
        fit_law(part, irreducible=False)
