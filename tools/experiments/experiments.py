"""Which runs the experiments are: each a name, what goes into its YAML, and the runs that it begins from.

Owns: sizes, budgets, columns, seeds, learning rates that are tried. Pure: nothing is read, written or started.
Does not own: starting runs (``run.py``), figures (``results.py``), what all runs share (``common.yaml``).

Every column may spend the FLOPs of ``SCRATCH_STEPS`` steps of the target: what its base, and learning its maps, takes
of them, its grown stage has less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.learned_maps import map_costs
from growth_megatron.growth.operators import choose
from growth_megatron.model.cost import flops_per_token

COMMON = Path(__file__).resolve().with_name("common.yaml")
_COMMON = yaml.safe_load(COMMON.read_text(encoding="utf-8"))
TOKENS_PER_STEP = _COMMON["training"]["global_batch_size"] * _COMMON["model"]["sequence_length"]

SCRATCH_STEPS, BASE_STEPS, LATE_STEPS, LEARN_STEPS, RAMP_STEPS = 1000, 240, 960, 50, 90
TUNING_BUDGET = 0.75
KEEP_STEPS = BASE_STEPS // 4
SEEDS, TUNING_SEED = (1, 2, 3), 7
RATES = (3e-3, 6e-3, 1.2e-2)
BASE_RATE = 6e-3
KINDS = ("scratch", "depth", "width")

Model = Mapping[str, int]
Content = dict[str, Any]

BASES: Mapping[str, Model] = {
    "depth": {"num_layers": 2},  # g = 4
    "depth_g2": {"num_layers": 4},
    "depth_g8": {"num_layers": 1},
    "width": {"hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 2, "ffn_hidden_size": 88},
}
TARGET: Model = {
    "num_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "ffn_hidden_size": 176,
}
RAMP = {
    "depth": [0, RAMP_STEPS],
    "ffn": [0, RAMP_STEPS],
    "hidden": [RAMP_STEPS, 2 * RAMP_STEPS],
    "heads": [2 * RAMP_STEPS, 3 * RAMP_STEPS],
}
OPERATORS: Mapping[str, Mapping[str, Content]] = {
    "depth": {
        "direct": {"operator": "stack"},
        "learn": {"operator": "learn"},
        "zero": {"operator": "zero"},
        "random": {"operator": "masked", "ramp": {"depth": RAMP["depth"]}},
    },
    "width": {
        "direct": {"operator": "split", "shares": "uneven"},  # equal copies would stay equal for ever
        "learn": {"operator": "learn"},
        "zero": {"operator": "zero"},
        "random": {"operator": "masked", "ramp": {key: RAMP[key] for key in ("ffn", "hidden", "heads")}},
    },
}


@dataclass(frozen=True)
class Experiment:
    """One run: ``content`` is its YAML over ``common.yaml``; ``needs`` are runs whose checkpoints it begins from."""

    name: str
    group: str
    column: str
    seed: int
    content: Content
    needs: tuple[str, ...] = ()

    @property
    def is_base(self) -> bool:
        """Whether it is only there to be grown."""
        return self.group == "bases"

    @property
    def is_compared(self) -> bool:
        """Whether it belongs into the table of results."""
        return self.group in ("nine_way", "ablations")


def schedule(rate: float, kind: str = "cosine", **others: Any) -> Content:
    """To a tenth of ``rate`` at the end; a constant one stays where it is."""
    return {"kind": kind, "learning_rate": rate, "min_learning_rate": rate / 10, **others}


def base_run(base: str, seed: int, steps: int = BASE_STEPS, every: int | None = None) -> Experiment:
    """A small model at a constant rate; with ``every``, checkpoints are kept so often."""
    suffix = "" if steps == BASE_STEPS else f"_{steps}"
    stage = {
        "name": "base",
        "model": dict(BASES[base]),
        "schedule": schedule(BASE_RATE, "constant"),
        "training": {"steps": steps},
    }
    content: Content = {"stages": [stage]}
    if every:
        content["checkpoint"] = {"interval_steps": every, "keep_every_steps": every}
    return _run("bases", f"base_{base}{suffix}", seed, content)


def scratch_run(group: str, column: str, seed: int, plan: Content, budget: float = 1.0) -> Experiment:
    """The target from its initial weights, for ``budget`` times the FLOPs."""
    stage = {"name": "scratch", "schedule": plan, "training": {"steps": round(budget * SCRATCH_STEPS)}}
    return _run(group, column, seed, {"stages": [stage]})


def grown_run(
    group: str,
    column: str,
    base: Experiment,
    growth: Mapping[str, Any],
    plan: Content,
    *,
    at: int | None = None,
    budget: float = 1.0,
) -> Experiment:
    """The target out of ``base`` at its step ``at`` (its last one), at equal FLOPs in all."""
    small = base.content["stages"][0]
    at = small["training"]["steps"] if at is None else at
    full = {"optimizer_state": "reset", **growth}
    if growth["operator"] == "learn":
        full["learn"] = {"steps": LEARN_STEPS}
    before = {**small, "training": {"steps": at}}
    steps = steps_left(before, full, budget * SCRATCH_STEPS)
    stage = {
        "from": f"runs/{base.name}@{at}",
        "name": "grown",
        "model": dict(TARGET),
        "growth": full,
        "schedule": plan,
        "training": {"steps": steps},
    }
    return _run(group, column, base.seed, {"stages": [stage]}, (base.name,))


def chained_run(group: str, column: str, seed: int, base: str, steps: int, plans: tuple[Content, Content],
                growth: Mapping[str, Any]) -> Experiment:  # fmt: skip
    """Base and growth in one run, for what two runs cannot say: no steps before it, one schedule over both."""
    small = {"name": "base", "model": dict(BASES[base]), "schedule": plans[0], "training": {"steps": steps}}
    full = {"operator": "stack", "optimizer_state": "reset", **growth}
    left = steps_left(small, full, SCRATCH_STEPS)
    stage = {"name": "grown", "model": dict(TARGET), "growth": full, "schedule": plans[1], "training": {"steps": left}}
    return _run(group, column, seed, {"stages": [small, stage]})


def steps_left(base: Content, growth: Mapping[str, Any], scratch_steps: float) -> int:
    """Steps of the target after ``base`` and ``growth``, so that all takes the FLOPs of ``scratch_steps`` of it."""
    source, target = model_of(base["model"]), model_of(TARGET)
    spent = base["training"]["steps"] * flops_per_token(source) / flops_per_token(target)  # in steps of the target
    if growth["operator"] == "learn":
        layers = choose(GrowthConfig(operator="learn")).layers(source.num_layers, target.num_layers)
        per_step = TOKENS_PER_STEP * flops_per_token(target)
        spent += LEARN_STEPS * (1 + map_costs(source, target, layers).flops / per_step)
    steps: int = round(scratch_steps - spent)
    return steps


def model_of(sizes: Model) -> ModelConfig:
    """The model of ``common.yaml`` at other sizes."""
    return ModelConfig(**{**_COMMON["model"], **sizes})


def tuning() -> Iterator[Experiment]:
    """Each rate for each kind at three quarters of the budget, with a seed that is not used again."""
    bases = {kind: base_run(kind, TUNING_SEED, round(TUNING_BUDGET * BASE_STEPS)) for kind in ("depth", "width")}
    yield from bases.values()
    for rate in RATES:
        yield scratch_run("tuning", f"scratch_{rate:g}", TUNING_SEED, schedule(rate), TUNING_BUDGET)
        for kind, base in bases.items():
            direct = OPERATORS[kind]["direct"]
            yield grown_run("tuning", f"{kind}_{rate:g}", base, direct, schedule(rate), budget=TUNING_BUDGET)


def nine_way(rates: Mapping[str, float]) -> Iterator[Experiment]:
    """Four operators in two directions and scratch, seed by seed; scratch also at budgets around the others'."""
    for seed in SEEDS:
        bases = {"depth": base_run("depth", seed, every=KEEP_STEPS), "width": base_run("width", seed)}
        yield from bases.values()
        yield scratch_run("nine_way", "scratch", seed, schedule(rates["scratch"]))
        for operator in OPERATORS["depth"]:
            for kind, base in bases.items():
                growth, plan = OPERATORS[kind][operator], schedule(rates[kind])
                yield grown_run("nine_way", f"{kind}_{operator}", base, growth, plan)
        yield scratch_run("nine_way", "scratch_0.6x", seed, schedule(rates["scratch"]), 0.6)
        yield scratch_run("nine_way", "scratch_1.5x", seed, schedule(rates["scratch"]), 1.5)


def ablations(rates: Mapping[str, float]) -> Iterator[Experiment]:
    """One thing changed at a time; ``random`` without masks with all seeds, the others with the first."""
    plans = {kind: schedule(rate) for kind, rate in rates.items()}
    depth, width = ({seed: base_run(kind, seed, every=KEEP_STEPS if kind == "depth" else None) for seed in SEEDS}
                    for kind in ("depth", "width"))  # fmt: skip
    for seed in SEEDS:
        yield grown_run("ablations", "depth_random_unmasked", depth[seed], {"operator": "random"}, plans["depth"])
        yield grown_run("ablations", "width_random_unmasked", width[seed], {"operator": "random"}, plans["width"])
    yield from _of_warm_up(depth[1], width[1], rates)
    yield from _of_timing(depth[1], plans)
    yield from _of_less_growth(plans["depth"])
    yield from _of_factor_and_layers(depth[1], plans["depth"])
    yield from _of_optimizer(depth[1], width[1], plans)
    yield from _of_late_growth(rates)


def _of_less_growth(plan: Content) -> Iterator[Experiment]:
    """Added when seed 1 of it had been seen, the best of all in depth: g = 2 with the other seeds."""
    for seed in SEEDS[1:]:
        half = base_run("depth_g2", seed)
        yield half
        yield grown_run("ablations", "g_2", half, {"operator": "stack"}, plan)


def _of_warm_up(depth: Experiment, width: Experiment, rates: Mapping[str, float]) -> Iterator[Experiment]:
    """Controls, added when results had been seen: a warm-up as long as a base's training, for scratch and for grown."""
    for rate in (rates["scratch"], RATES[-1]):
        yield scratch_run("ablations", f"scratch_{rate:g}_warmup", 1, schedule(rate, warmup_steps=BASE_STEPS))
    plans = {kind: schedule(rate, warmup_steps=BASE_STEPS) for kind, rate in rates.items()}
    for kind, operator, base in (("width", "zero", width), ("depth", "direct", depth), ("width", "direct", width)):
        yield grown_run("ablations", f"{kind}_{operator}_warmup", base, OPERATORS[kind][operator], plans[kind])
    for seed in SEEDS[1:]:
        yield scratch_run("ablations", f"scratch_{rates['scratch']:g}_warmup", seed, plans["scratch"])


def _of_timing(base: Experiment, plans: Mapping[str, Content]) -> Iterator[Experiment]:
    """d: how long the base is trained, at equal FLOPs in all; 240 steps are the nine-way's."""
    plan, stack = plans["depth"], {"operator": "stack"}
    yield chained_run("ablations", "d_0", base.seed, "depth", 0, (schedule(BASE_RATE, "constant"), plan), {})
    for at in (BASE_STEPS // 4, BASE_STEPS // 2):
        yield grown_run("ablations", f"d_{at}", base, stack, plan, at=at)
    longer = base_run("depth", base.seed, LATE_STEPS, every=2 * BASE_STEPS)
    yield longer
    for at in (2 * BASE_STEPS, LATE_STEPS):
        yield grown_run("ablations", f"d_{at}", longer, stack, plan, at=at)


def _of_factor_and_layers(base: Experiment, plan: Content) -> Iterator[Experiment]:
    """g = 2 and 8 (4 is the nine-way's), 112233, and which of four layers are repeated."""
    half, eighth = (base_run(name, base.seed) for name in ("depth_g2", "depth_g8"))
    yield half
    yield grown_run("ablations", "g_2", half, {"operator": "stack"}, plan)
    yield eighth
    yield grown_run("ablations", "g_8", eighth, {"operator": "stack"}, plan)
    yield grown_run("ablations", "interleaved", base, {"operator": "interpolate"}, plan)
    partial = {"front": [0, 1, 0, 1, 0, 1, 2, 3], "middle": [0, 1, 2, 1, 2, 1, 2, 3], "back": [0, 1, 2, 3, 2, 3, 2, 3]}
    for name, layers in partial.items():
        yield grown_run("ablations", f"partial_{name}", half, {"operator": "stack", "layers": layers}, plan)
    yield grown_run("ablations", "noise_0.2", base, {"operator": "stack", "noise": 0.2}, plan)


def _of_optimizer(depth: Experiment, width: Experiment, plans: Mapping[str, Content]) -> Iterator[Experiment]:
    """What becomes of the moments and of the schedule, and how copies in width come apart."""
    stack, carry = {"operator": "stack"}, {"optimizer_state": "carry"}
    split = OPERATORS["width"]["direct"]
    yield grown_run("ablations", "depth_carry", depth, {**stack, **carry}, plans["depth"])
    yield grown_run("ablations", "width_carry", width, {**split, **carry}, plans["width"])
    yield grown_run("ablations", "width_even", width, {"operator": "split"}, plans["width"])
    yield grown_run("ablations", "width_noise", width, {"operator": "split", "cancelling_noise": 0.5}, plans["width"])
    both = (plans["depth"], plans["depth"])
    continued = {"schedule": "continue"}
    yield chained_run("ablations", "schedule_continue", depth.seed, "depth", BASE_STEPS, both, continued)


def _of_late_growth(rates: Mapping[str, float]) -> Iterator[Experiment]:
    """Warm-up, constant, then down over a fifth of the steps: from scratch, grown early, grown late."""
    wsd = {kind: schedule(rate, "wsd", decay_steps=SCRATCH_STEPS // 5) for kind, rate in rates.items()}
    early, late = base_run("depth", 1, every=KEEP_STEPS), base_run("depth", 1, LATE_STEPS, every=2 * BASE_STEPS)
    yield scratch_run("ablations", "wsd_scratch", 1, wsd["scratch"])
    yield grown_run("ablations", "wsd_early", early, {"operator": "stack"}, wsd["depth"])
    yield grown_run("ablations", "wsd_late", late, {"operator": "stack"}, wsd["depth"])


def _run(group: str, column: str, seed: int, content: Content, needs: tuple[str, ...] = ()) -> Experiment:
    name = f"{group}_{column}_s{seed}" if group != "bases" else f"{column}_s{seed}"
    return Experiment(name, group, column, seed, {"run": {"directory": f"runs/{name}", "seed": seed}, **content}, needs)
