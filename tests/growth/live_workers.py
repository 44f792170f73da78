"""What the tests of live maps run on each rank (``tests.ranks``): masked training, and the same in plain PyTorch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from growth_megatron.checkpoint.folder.manifest import read_manifest
from growth_megatron.checkpoint.torch_dist.live_model import load_from_source, load_into_model
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import OptimizerConfig, StageConfig
from growth_megatron.growth.live import MaskedWeights, live_map
from growth_megatron.growth.masks import masked_elements
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.ramps import gate
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.cost import element_bytes
from growth_megatron.model.init import InitSource
from growth_megatron.parallel import process_groups
from growth_megatron.train.engine import Engine
from tests.growth.in_memory import everything
from tests.growth.masked_llama import MaskedLlama
from tests.workers import batches, stage_of

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 12,
    "ffn_hidden_size": 64,
    "vocab_size": 120,
    "sequence_length": 16,
    "init_std": 0.08,
}
GROWN = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 12, "num_query_groups": 4, "ffn_hidden_size": 96}
RAMP = {"depth": [0, 6], "ffn": [1, 8], "hidden": [3, 12], "heads": [6, 14]}
RATE, STEPS, MASKED_STEPS = 2e-3, 30, 10
OPTIMIZER = OptimizerConfig(epsilon=1e-4)  # Adam makes much of gradients that are nothing but rounding


def growth_of(model: dict[str, Any], layout: dict[str, Any], precision: str = "fp32") -> tuple[GrowthPlan, StageConfig]:
    source = stage_of({}, {**BASE, **model}).model
    stage = stage_of(layout, {**BASE, **model, **GROWN}, precision).model_copy(update={"optimizer": OPTIMIZER})
    return plan_growth(source, stage.model, GrowthConfig(operator="masked", ramp=RAMP), 5), stage


@contextmanager
def masked_engine(plan: GrowthPlan, stage: StageConfig) -> Iterator[Engine]:
    process_groups.set_layout(stage.parallel, 7)
    engine = Engine(stage)
    load_from_source(GrownSource(InitSource(plan.source_geometry, 7), plan, "reset"), engine.models)
    engine.finish()
    engine.live = MaskedWeights(plan, engine.models)
    yield engine
    engine.close()
    del engine
    gc.collect()


def masked_runs(cases: list[dict[str, Any]], steps: int = STEPS) -> list[dict[str, list[float]]]:
    """Losses, gradient norms and validation losses of masked training; ``cases`` are arguments of ``growth_of``."""
    results = []
    for case in cases:
        plan, stage = growth_of(case.get("model", {}), case["layout"], case.get("precision", "fp32"))
        with masked_engine(plan, stage) as engine:
            result: dict[str, list[float]] = {"losses": [], "norms": [], "evaluated": []}
            for step in range(steps):
                batch = batches(step % 3, stage)
                if step % 7 == 0:
                    result["evaluated"].append(engine.evaluate(batch, step))
                done = engine.train_step(batch, RATE, stage_step=step)
                result["losses"].append(done.loss)
                result["norms"].append(done.grad_norm)
            assert (engine.live is None) == (steps == STEPS), "the map is there until the masks are open"
        results.append(result)
    return results


def direct_runs(cases: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
    """As ``masked_runs`` in plain PyTorch on one rank: explicit gates, a norm over the masked width, autograd."""
    results = []
    for case in cases:
        plan, stage = growth_of(case.get("model", {}), case["layout"])
        process_groups.set_layout(stage.parallel, 7)
        initial = everything(GrownSource(InitSource(plan.source_geometry, 7), plan, "reset"))
        weights = {key: value.clone().requires_grad_() for key, value in initial.items()}
        settings = stage.optimizer
        groups = [
            {"params": [w for w in weights.values() if (w.dim() == 2) == decays], "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ]
        adam = torch.optim.AdamW(groups, lr=RATE, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
        result: dict[str, list[float]] = {"losses": [], "norms": [], "evaluated": []}
        for step in range(STEPS):
            gates = {kind: gate(ramp, step) for kind, ramp in plan.ramps.items()}
            model = MaskedLlama(plan.source_geometry, stage.model, gates, plan.source_geometry.num_layers)
            batch = batches(step % 3, stage)
            tokens, labels = (torch.cat([part[name] for part in batch]) for name in ("tokens", "labels"))
            loss = F.cross_entropy(model.logits(weights, tokens).flatten(0, 1), labels.flatten())
            adam.zero_grad()
            loss.backward()
            result["norms"].append(float(torch.nn.utils.clip_grad_norm_(weights.values(), settings.clip_grad)))
            result["losses"].append(loss.item())
            if step % 7 == 0:
                result["evaluated"].append(loss.item())
            adam.step()
        results.append(result)
    return results


def copies(cases: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Bytes that closed masks keep aside on this rank: taken, planned."""
    results = []
    for case in cases:
        plan, stage = growth_of(case.get("model", {}), case["layout"], case.get("precision", "fp32"))
        with masked_engine(plan, stage) as engine:
            assert isinstance(engine.live, MaskedWeights)
            engine.live.pour(0)
            taken = sum(kept.nbytes for _, _, kept in engine.live._poured)
            engine.live.put_back()
        rank = parallel_state.get_pipeline_model_parallel_rank()
        results.append((taken, element_bytes(stage.training) * masked_elements(plan, stage.parallel, rank)))
    return results


def alone(cases: list[dict[str, Any]]) -> dict[str, Any]:
    plain = [{**case, "precision": "fp32"} for case in cases]
    return {"masked": masked_runs(cases), "direct": direct_runs(plain), **_broken(cases[0]), **_untouched(cases[0])}


def _broken(case: dict[str, Any]) -> dict[str, Any]:
    """Losses with the gradients left as they are, and with epsilon left as it is."""
    found = {}
    for name in ("pull_back", "_set_epsilon"):
        kept = getattr(MaskedWeights, name)
        setattr(MaskedWeights, name, lambda *_: None)
        found[f"without {name}"] = masked_runs([case], MASKED_STEPS)[0]["losses"]
        setattr(MaskedWeights, name, kept)
    return found


def _untouched(case: dict[str, Any]) -> dict[str, Any]:
    """What pour and put_back leave, and whether a module differs from those of a plain run."""
    plan, stage = growth_of({}, case["layout"])
    process_groups.set_layout(stage.parallel, 7)
    plain = Engine(stage)
    modules = [str(type(module)) for model in plain.models for module in model.modules()]
    assert plain.live is None
    plain.close()
    with masked_engine(plan, stage) as engine:
        assert engine.live is not None
        before = [param.clone() for model in engine.models for param in model.parameters()]
        engine.live.pour(0)
        poured = [param.clone() for model in engine.models for param in model.parameters()]
        engine.live.put_back()
        after = [param for model in engine.models for param in model.parameters()]
        return {
            "changed": sum(not torch.equal(a, b) for a, b in zip(before, poured, strict=True)),
            "restored": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "same modules": modules == [str(type(m)) for model in engine.models for m in model.modules()],
            "epsilons": sorted({m.eps for model in engine.models for m in model.modules() if hasattr(m, "eps")}),
        }


def loss_of(checkpoint: str) -> dict[str, Any]:
    """The loss of a stored masked model as it acts when it goes on training, and the tokens that it was measured on."""
    folder = Path(checkpoint)
    manifest = read_manifest(folder)
    stage = stage_of({}, manifest.geometry.model_dump())
    process_groups.set_layout(stage.parallel, 7)
    engine = Engine(stage)
    engine.finish()
    load_into_model(folder, engine.models, engine.optimizer)
    engine.live = live_map(manifest, engine.models)
    batch = batches(0, stage)
    tokens = [torch.cat([part["tokens"], part["labels"][:, -1:]], dim=1).tolist()[0] for part in batch]
    return {"loss": engine.evaluate(batch, manifest.stage_step), "tokens": tokens}
