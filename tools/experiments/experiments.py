"""Which runs the experiments are: each a name, what goes into its YAML, and the runs that it begins from.

Owns: sizes, budgets, columns, seeds, learning rates that are tried. Pure: nothing is read, written or started.
Does not own: starting runs (``run.py``), figures (``results.py``), what all runs share (``common.yaml``).

Every column may spend the FLOPs of ``SCRATCH_STEPS`` steps of the target, the longer ones ``LONGER`` times of it: what
its base, and learning its maps, takes of them, its grown stage has less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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

SCRATCH_STEPS, BASE_STEPS, LATE_STEPS, LEARN_STEPS, RAMP_STEPS = 1200, 300, 1200, 60, 100
TUNING_BUDGET = 0.5
LONGER = 5.0  # budgets
LOWER_RATE = 4e-3
SEEDS, TUNING_SEED = (1, 2, 3), 7
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
WARM_UPS = (0.02, 0.05, 0.2, 0.4, 0.6)  # of the steps of a run
BASE_KINDS = ("depth", "width")
KINDS = ("scratch", *BASE_KINDS)

Model = Mapping[str, float]
Content = dict[str, Any]

BASES: Mapping[str, Model] = {
    "depth": {"num_layers": 3},  # g = 4
    "depth_g2": {"num_layers": 6},
    "depth_g3": {"num_layers": 4},
    "depth_g6": {"num_layers": 2},
    "width": {
        "hidden_size": 36,
        "num_attention_heads": 2,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "init_std": 0.105,
    },
}
TARGET: Model = {
    "num_layers": 12,
    "hidden_size": 72,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "ffn_hidden_size": 192,
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


PARTIAL = {
    "front": [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4, 5],
    "middle": [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5],
    "back": [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5],
}


@dataclass(frozen=True)
class Plan:
    """A learning rate over a run of any length: ``warm_up`` is a part of its steps."""

    rate: float
    warm_up: float
    kind: str = "cosine"
    options: tuple[tuple[str, int], ...] = ()

    def of(self, steps: int) -> Content:
        """The schedule of a run of so many steps; to a tenth of the rate at the end."""
        return schedule(self.rate, self.kind, warmup_steps=round(self.warm_up * steps), **dict(self.options))


@dataclass(frozen=True)
class Tuned:
    """What tuning has chosen: the rate of the bases of each kind, and the plan of each kind of run."""

    bases: Mapping[str, float]
    plans: Mapping[str, Plan]


@dataclass(frozen=True)
class Experiment:
    """One run: ``content`` is its YAML over ``common.yaml``; ``needs`` are runs whose checkpoints it begins from.

    ``before`` is a script of this folder, with arguments, that makes what the run begins from; ``unseen_flops`` is what
    such a beginning has cost.
    """

    name: str
    group: str
    column: str
    seed: int
    content: Content
    needs: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    unseen_flops: float = 0.0

    @property
    def is_base(self) -> bool:
        """Whether it is only there to be grown."""
        return self.group == "bases"

    @property
    def is_compared(self) -> bool:
        """Whether it belongs into the table of results."""
        return self.group in ("nine_way", "ablations", "longer")


def schedule(rate: float, kind: str = "cosine", **others: Any) -> Content:
    """To a tenth of ``rate`` at the end; a constant one stays where it is."""
    return {"kind": kind, "learning_rate": rate, "min_learning_rate": rate / 10, **others}


def base_run(
    base: str, seed: int, rate: float, steps: int = BASE_STEPS, every: int | None = None, suffix: str = ""
) -> Experiment:
    """A small model at a constant rate; with ``every``, checkpoints are kept so often."""
    suffix = f"_{rate:g}" if seed == TUNING_SEED else suffix
    stage = {
        "name": "base",
        "model": dict(BASES[base]),
        "schedule": schedule(rate, "constant"),
        "training": {"steps": steps},
    }
    content: Content = {"stages": [stage]}
    if every:
        content["checkpoint"] = {"interval_steps": every, "keep_every_steps": every}
    return _run("bases", f"base_{base}{suffix}", seed, content)


def scratch_run(group: str, column: str, seed: int, plan: Plan, budget: float = 1.0) -> Experiment:
    """The target from its initial weights, for ``budget`` times the FLOPs."""
    steps = round(budget * SCRATCH_STEPS)
    stage = {"name": "scratch", "schedule": plan.of(steps), "training": {"steps": steps}}
    return _run(group, column, seed, {"stages": [stage]})


def grown_run(
    group: str,
    column: str,
    base: Experiment,
    growth: Mapping[str, Any],
    plan: Plan,
    *,
    at: int = BASE_STEPS,
    budget: float = 1.0,
) -> Experiment:
    """The target out of ``base`` at its step ``at``, at equal FLOPs in all."""
    small = base.content["stages"][0]
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
        "schedule": plan.of(steps),
        "training": {"steps": steps},
    }
    return _run(group, column, base.seed, {"stages": [stage]}, (base.name,))


def released_run(base: Experiment, plan: Plan) -> Experiment:
    """The width mapping of the paper's released code, made by a script of its own out of ``base``'s last step."""
    small = base.content["stages"][0]
    steps = steps_left(small, {"operator": "split"}, SCRATCH_STEPS)
    start = f"released/s{base.seed}"
    stage = {
        "from": start,
        "name": "grown",
        "model": dict(TARGET),
        "schedule": plan.of(steps),
        "training": {"steps": steps},
        "growth": {"operator": "direct", "optimizer_state": "reset"},
    }
    run = _run("ablations", "width_released", base.seed, {"stages": [stage]}, (base.name,))
    cost = small["training"]["steps"] * TOKENS_PER_STEP * flops_per_token(model_of(small["model"]))
    return replace(run, before=("released_width.py", f"runs/{base.name}", start), unseen_flops=float(cost))


def chained_run(group: str, column: str, seed: int, base: Content, plans: tuple[Plan, Plan],
                growth: Mapping[str, Any]) -> Experiment:  # fmt: skip
    """``base``'s stage and growth in one run, for what two runs cannot say: no steps before it, one schedule for both.

    Under ``schedule: continue`` the second of ``plans`` is over the steps of both stages.
    """
    full = {"operator": "stack", "optimizer_state": "reset", **growth}
    left = steps_left(base, full, SCRATCH_STEPS)
    both = left + base["training"]["steps"] if growth.get("schedule") == "continue" else left
    small = {**base, "schedule": plans[0].of(both)}
    stage = {"name": "grown", "model": dict(TARGET), "growth": full, "schedule": plans[1].of(both),
             "training": {"steps": left}}  # fmt: skip
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


def tuning_bases() -> Iterator[Experiment]:
    """Each rate for the bases of each kind, with a seed that is not used again."""
    for kind in BASE_KINDS:
        for rate in RATES:
            yield base_run(kind, TUNING_SEED, rate)


def tuning_run(kind: str, plan: Plan, base_rates: Mapping[str, float]) -> Experiment:
    """``plan`` for scratch or the direct operator of ``kind``, at a part of the budget."""
    column = f"{kind}_{plan.rate:g}_warmup_{plan.warm_up:g}"
    if kind == "scratch":
        return scratch_run("tuning", column, TUNING_SEED, plan, TUNING_BUDGET)
    base = base_run(kind, TUNING_SEED, base_rates[kind])
    return grown_run("tuning", column, base, OPERATORS[kind]["direct"], plan, budget=TUNING_BUDGET)


def longer_tuning_run(plan: Plan) -> Experiment:
    """``plan`` for scratch at the whole of the longer budget."""
    column = f"scratch_{plan.rate:g}_warmup_{plan.warm_up:g}"
    return scratch_run("tuning_longer", column, TUNING_SEED, plan, LONGER)


def neighbours(plan: Plan) -> list[Plan]:
    """``plan``, then those one rate or one warm-up away from it."""
    rate, warm_up = RATES.index(plan.rate), WARM_UPS.index(plan.warm_up)
    rates = [Plan(RATES[i], plan.warm_up) for i in (rate - 1, rate + 1) if 0 <= i < len(RATES)]
    warm_ups = [Plan(plan.rate, WARM_UPS[i]) for i in (warm_up - 1, warm_up + 1) if 0 <= i < len(WARM_UPS)]
    return [plan, *rates, *warm_ups]


def untuned() -> Tuned:
    """Middle values: where tuning begins."""
    plan = Plan(RATES[2], WARM_UPS[2])
    return Tuned(dict.fromkeys(BASE_KINDS, RATES[2]), dict.fromkeys(KINDS, plan))


def nine_way(tuned: Tuned) -> Iterator[Experiment]:
    """Four operators in two directions and scratch, seed by seed; scratch also at budgets around the others'."""
    for seed in SEEDS:
        bases = nine_way_bases(tuned, seed)
        yield from bases.values()
        scratch = tuned.plans["scratch"]
        yield scratch_run("nine_way", "scratch", seed, scratch)
        for operator in OPERATORS["depth"]:
            for kind, base in bases.items():
                growth, plan = OPERATORS[kind][operator], tuned.plans[kind]
                yield grown_run("nine_way", f"{kind}_{operator}", base, growth, plan)
        yield scratch_run("nine_way", "scratch_0.6x", seed, scratch, 0.6)
        yield scratch_run("nine_way", "scratch_1.4x", seed, scratch, 1.4)


def nine_way_bases(tuned: Tuned, seed: int) -> dict[str, Experiment]:
    """The bases that all columns of a seed share; that of depth goes on, for later growth."""
    depth = base_run("depth", seed, tuned.bases["depth"], LATE_STEPS, every=BASE_STEPS // 2)
    return {"depth": depth, "width": base_run("width", seed, tuned.bases["width"])}


def ablations(tuned: Tuned) -> Iterator[Experiment]:
    """One thing changed at a time, with all seeds; what matters most comes first."""
    for part in (_of_warm_up, _of_factor, _of_timing, _of_optimizer, _of_late_growth, _of_layers):
        for seed in SEEDS:
            yield from part(tuned, seed)


def longer(tuned: Tuned, scratch: Plan) -> Iterator[Experiment]:
    """Scratch by a plan of its own and what paid in the nine-way, as it was there, at ``LONGER`` times the FLOPs.

    Bases and growth take the same parts of them.
    """
    early, late = round(LONGER * BASE_STEPS), round(LONGER * LATE_STEPS)
    for seed in SEEDS:
        base = base_run("depth", seed, tuned.bases["depth"], late, early, "_longer")
        yield base
        yield scratch_run("longer", "scratch", seed, scratch, LONGER)
        for column, at in (("depth_direct", early), ("depth_late", late)):
            growth, plan = OPERATORS["depth"]["direct"], tuned.plans["depth"]
            yield grown_run("longer", column, base, growth, plan, at=at, budget=LONGER)
    for seed in SEEDS:  # added when the above had been seen
        base = base_run("depth", seed, tuned.bases["depth"], late, early, "_longer")
        plan = replace(tuned.plans["depth"], rate=LOWER_RATE)
        growth, column = OPERATORS["depth"]["direct"], f"depth_direct_{LOWER_RATE:g}"
        yield grown_run("longer", column, base, growth, plan, at=early, budget=LONGER)
    for seed in SEEDS:
        base = base_run("width", seed, tuned.bases["width"], early, suffix="_longer")
        yield base
        for operator in ("zero", "direct"):
            growth, plan = OPERATORS["width"][operator], tuned.plans["width"]
            yield grown_run("longer", f"width_{operator}", base, growth, plan, at=early, budget=LONGER)


def _of_warm_up(tuned: Tuned, seed: int) -> Iterator[Experiment]:
    """Scratch at the whole budget with other warm-ups, since its best one at half of it need not be the best here."""
    plan = tuned.plans["scratch"]
    for warm_up in WARM_UPS[2:]:
        if warm_up != plan.warm_up:
            yield scratch_run("ablations", f"scratch_warmup_{warm_up:g}", seed, replace(plan, warm_up=warm_up))


def _of_factor(tuned: Tuned, seed: int) -> Iterator[Experiment]:
    """g = 2, 3 and 6; 4 is the nine-way's."""
    for g in (2, 3, 6):
        base = base_run(f"depth_g{g}", seed, tuned.bases["depth"])
        yield base
        yield grown_run("ablations", f"g_{g}", base, {"operator": "stack"}, tuned.plans["depth"])


def _of_timing(tuned: Tuned, seed: int) -> Iterator[Experiment]:
    """d: how long the base is trained, at equal FLOPs in all; ``BASE_STEPS`` are the nine-way's."""
    base, plan = nine_way_bases(tuned, seed)["depth"], tuned.plans["depth"]
    none = {**base.content["stages"][0], "training": {"steps": 0}}
    yield chained_run("ablations", "d_0", seed, none, (plan, plan), {})
    for at in (BASE_STEPS // 2, 2 * BASE_STEPS, LATE_STEPS):
        yield grown_run("ablations", f"d_{at}", base, {"operator": "stack"}, plan, at=at)


def _of_optimizer(tuned: Tuned, seed: int) -> Iterator[Experiment]:
    """What becomes of the moments and of the schedule, how copies in width come apart, and the released mapping."""
    bases, plans = nine_way_bases(tuned, seed), tuned.plans
    depth, width = bases["depth"], bases["width"]
    stack, carry = {"operator": "stack"}, {"optimizer_state": "carry"}
    split = OPERATORS["width"]["direct"]
    yield released_run(width, plans["width"])
    yield grown_run("ablations", "depth_carry", depth, {**stack, **carry}, plans["depth"])
    yield grown_run("ablations", "width_carry", width, {**split, **carry}, plans["width"])
    yield grown_run("ablations", "width_even", width, {"operator": "split"}, plans["width"])
    small = {**depth.content["stages"][0], "training": {"steps": BASE_STEPS}}
    both = (plans["depth"], plans["depth"])
    yield chained_run("ablations", "schedule_continue", seed, small, both, {"schedule": "continue"})


def _of_late_growth(tuned: Tuned, seed: int) -> Iterator[Experiment]:
    """Warm-up, constant, then down over a fifth of the steps: from scratch, grown late."""
    options = (("decay_steps", SCRATCH_STEPS // 5),)
    wsd = {kind: replace(plan, kind="wsd", options=options) for kind, plan in tuned.plans.items()}
    base = nine_way_bases(tuned, seed)["depth"]
    yield scratch_run("ablations", "wsd_scratch", seed, wsd["scratch"])
    yield grown_run("ablations", "wsd_late", base, {"operator": "stack"}, wsd["depth"], at=LATE_STEPS)


def _of_layers(tuned: Tuned, seed: int) -> Iterator[Experiment]:
    """112233, noise, and which of six layers are repeated."""
    base, plan = nine_way_bases(tuned, seed)["depth"], tuned.plans["depth"]
    yield grown_run("ablations", "interleaved", base, {"operator": "interpolate"}, plan)
    yield grown_run("ablations", "noise_0.2", base, {"operator": "stack", "noise": 0.2}, plan)
    half = base_run("depth_g2", seed, tuned.bases["depth"])
    for name, layers in PARTIAL.items():
        yield grown_run("ablations", f"partial_{name}", half, {"operator": "stack", "layers": layers}, plan)


def _run(group: str, column: str, seed: int, content: Content, needs: tuple[str, ...] = ()) -> Experiment:
    name = f"{group}_{column}_s{seed}" if group != "bases" else f"{column}_s{seed}"
    return Experiment(name, group, column, seed, {"run": {"directory": f"runs/{name}", "seed": seed}, **content}, needs)
