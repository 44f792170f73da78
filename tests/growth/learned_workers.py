"""What the tests of learned growth run on each rank (``tests.ranks``): maps learned over megatron-core's modules, and
the same in plain PyTorch.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from growth_megatron.checkpoint.torch_dist.live_model import model_shards
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import OptimizerConfig, StageConfig
from growth_megatron.growth.learned import initial_maps
from growth_megatron.growth.live_learned import LearnedWeights
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.model.reference import reference_logits
from growth_megatron.parallel import process_groups
from growth_megatron.train.learning import LearningEngine
from tests.growth.in_memory import Tensors, everything
from tests.growth.learned_llama import grown_weights
from tests.growth.live_workers import BASE, GROWN
from tests.workers import Varied, batches, stage_of

RATE, STEPS = 1e-2, 10
OPTIMIZER = OptimizerConfig(epsilon=1e-4)  # Adam makes much of gradients that are nothing but rounding


@dataclasses.dataclass
class Base:
    """As much of an origin as learning takes."""

    tensors: Tensors


def growth_of(case: dict[str, Any]) -> tuple[GrowthPlan, StageConfig, Base]:
    """``case``: layout, model: what all models have in common, grown: sizes of the target."""
    model = case.get("model", {})
    source = stage_of({}, {**BASE, **model}).model
    grown = case.get("grown", GROWN)
    stage = stage_of(case.get("layout", {}), {**BASE, **model, **grown}, case.get("precision", "fp32"))
    stage = stage.model_copy(update={"optimizer": OPTIMIZER})
    plan = plan_growth(source, stage.model, GrowthConfig(operator="learn"), 5)
    return plan, stage, Base(Tensors(everything(Varied(source, 7))))


@contextmanager
def learning_engine(case: dict[str, Any]) -> Iterator[LearningEngine]:
    plan, stage, base = growth_of(case)
    process_groups.set_layout(stage.parallel, 7)
    engine = LearningEngine(stage, plan, base, initial_maps(plan))  # type: ignore[arg-type]
    yield engine
    engine.close()
    del engine
    gc.collect()


def learned(cases: list[dict[str, Any]], steps: int = STEPS) -> list[dict[str, Any]]:
    """Losses, gradient norms, gradients of the first step and maps of the last one."""
    results = []
    for case in cases:
        with learning_engine(case) as engine:
            result: dict[str, Any] = {"losses": [], "norms": [], "first": {}}
            result["evaluated"] = [engine.evaluate(batches(0, engine.stage))]
            for step in range(steps):
                done = engine.train_step(batches(step % 3, engine.stage), RATE)
                result["losses"].append(done.loss)
                result["norms"].append(done.grad_norm)
                if step == 0:
                    clip = min(1.0, OPTIMIZER.clip_grad / (done.grad_norm + 1e-6))  # as torch does
                    result["first"] = _gradients(engine.learned.maps, clip)
            result["maps"] = {name: value.flatten().tolist() for name, value in engine.learned.maps.items()}
            results.append(result)
    return results


def direct(cases: list[dict[str, Any]], dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """As ``learned`` on one rank: autograd straight through the grown weights."""
    results = []
    for case in cases:
        plan, stage, base = growth_of(case)
        process_groups.set_layout(stage.parallel, 7)
        source = {key: value.to(dtype) for key, value in base.tensors.tensors.items()}
        maps = {name: value.to(dtype).requires_grad_() for name, value in initial_maps(plan).items()}
        adam = torch.optim.AdamW(
            maps.values(), lr=RATE, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.epsilon, weight_decay=0.0
        )
        result: dict[str, Any] = {"losses": [], "norms": [], "first": {}}
        for step in range(STEPS):
            batch = batches(step % 3, stage)
            tokens, labels = (torch.cat([part[name] for part in batch]) for name in ("tokens", "labels"))
            grown = Tensors(grown_weights(plan, source, maps))
            logits = reference_logits(grown, stage.model, tokens, dtype)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            adam.zero_grad()
            loss.backward()
            if step == 0:
                result["evaluated"] = [loss.item()]
                result["first"] = _gradients(maps)
            result["norms"].append(float(torch.nn.utils.clip_grad_norm_(maps.values(), OPTIMIZER.clip_grad)))
            result["losses"].append(loss.item())
            adam.step()
        result["maps"] = {name: value.flatten().tolist() for name, value in maps.items()}
        results.append(result)
    return results


def _gradients(maps: dict[str, torch.Tensor], clipped_by: float = 1.0) -> dict[str, list[float]]:
    gradients = {name: value.grad for name, value in maps.items()}
    return {name: (grad / clipped_by).flatten().tolist() for name, grad in gradients.items() if grad is not None}


def alone(cases: list[dict[str, Any]]) -> dict[str, Any]:
    broken = {name: _with_broken(name, replacement, cases[0]) for name, replacement in BROKEN.items()}
    return {"learned": learned(cases), "direct": direct(cases, torch.float64), "broken": broken}


BROKEN: dict[str, Callable[..., Any]] = {
    "pull_back": lambda self: [value.mul(1e-3).sum().backward() for value in self.maps.values()],
    "_gradient": lambda self, shard: torch.ones_like(shard.data),
}


def _with_broken(name: str, replacement: Callable[..., Any], case: dict[str, Any]) -> dict[str, Any]:
    kept = getattr(LearnedWeights, name)
    setattr(LearnedWeights, name, replacement)
    found = learned([case], 1)[0]
    setattr(LearnedWeights, name, kept)
    return found


def counting_copies(case: dict[str, Any]) -> dict[str, Any]:
    """As ``learned``, with every copy of a tensor counted: what a layout must not do."""
    from growth_megatron.growth import live_learned

    live_learned.model_shards = lambda models: (shard._replace(is_first=True) for shard in model_shards(models))  # type: ignore[assignment]
    found = learned([case], 1)[0]
    live_learned.model_shards = model_shards
    return found
