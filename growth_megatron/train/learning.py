"""Learning the maps of a growth: the phase between the end of a stage and the grown checkpoint of the next one.

Owns: the engine whose update acts on maps, the steps of the phase, what is kept of it for a resume.
Does not own: the maps (``growth.learned``), the checkpoint made of them (``growth.execute``), when the phase comes
(``train.stages``).

Samples, tokens and FLOPs of the phase count for the run, its steps do not. Rank 0 keeps maps and Adam's state in
RUN/learning until the grown checkpoint is there: killed, the phase goes on. A file's name has the digest of its growth
and of its content.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from typing_extensions import override

from growth_megatron.checkpoint.folder.files import FileOperations
from growth_megatron.checkpoint.huggingface.safetensors_file import SafetensorsFile, packed
from growth_megatron.checkpoint.origin import Origin
from growth_megatron.config.lines import compact_layers
from growth_megatron.config.schema import StageConfig
from growth_megatron.data.loader import BatchLoader
from growth_megatron.errors import GrowthMegatronError
from growth_megatron.growth.learned import initial_maps
from growth_megatron.growth.learned_maps import map_costs, phase_of
from growth_megatron.growth.live_learned import LearnedWeights
from growth_megatron.growth.rules import GrowthPlan
from growth_megatron.parallel import collectives, process_groups
from growth_megatron.train.batches import read_step, step_loader, validation_set
from growth_megatron.train.counters import Counters
from growth_megatron.train.engine import Engine
from growth_megatron.train.health import fault
from growth_megatron.train.loop import RunContext, memory_bytes, raise_it
from growth_megatron.train.schedule import learning_rate

FOLDER = "learning"
_FIRST, _SECOND, _STEP, _LOSS = "exp_avg.", "exp_avg_sq.", "step", "loss_before"


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a phase comes to: the plan with its maps, where the run stands then, validation losses before and after."""

    plan: GrowthPlan
    counters: Counters
    loss_before: float | None
    loss_after: float | None


class LearningEngine(Engine):
    """The target's model whose weights are what maps make of a source; the maps are trained by AdamW, on every rank."""

    def __init__(self, stage: StageConfig, plan: GrowthPlan, origin: Origin, maps: Mapping[str, torch.Tensor]) -> None:
        super().__init__(stage)
        self._wrap(use_distributed_optimizer=False)
        self.learned = LearnedWeights(plan, origin.tensors, self.models, maps)
        self.live = self.learned
        settings = stage.optimizer
        self.adam = torch.optim.AdamW(
            self.learned.maps.values(),
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=0.0,  # towards zero would be away from the source
        )

    @override
    def _update(self, learning_rate: float, stage_step: int, measures: bool) -> tuple[float, dict[str, float]]:
        clip = self.stage.optimizer.clip_grad or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.learned.maps.values(), clip))
        if math.isfinite(norm):
            self.adam.param_groups[0]["lr"] = learning_rate
            self.adam.step()
        return norm, {}

    def state(self) -> dict[str, torch.Tensor]:
        """Maps, moments and step, on the CPU."""
        found = {}
        for name, value in self.learned.maps.items():
            found[name] = value.detach().cpu()
            if moments := self.adam.state.get(value):
                found |= {_FIRST + name: moments["exp_avg"].cpu(), _SECOND + name: moments["exp_avg_sq"].cpu()}
        return found

    def set_moments(self, state: Mapping[str, torch.Tensor]) -> None:
        """Adam's state as ``state`` gave it, after its ``step`` steps."""
        for name, value in self.learned.maps.items():
            self.adam.state[value] = {
                "step": state[_STEP][0].clone(),
                "exp_avg": state[_FIRST + name].to(value.device),
                "exp_avg_sq": state[_SECOND + name].to(value.device),
            }


def forget_phase(run_directory: Path) -> None:
    """Remove what was kept of a phase."""
    files = FileOperations()
    if (run_directory / FOLDER).exists():
        files.remove_tree(run_directory / FOLDER)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class LearningPhase:
    """Every method is called on all ranks alike."""

    def __init__(
        self, context: RunContext, origin: Origin, plan: GrowthPlan, stage: StageConfig, counters: Counters
    ) -> None:
        self._context, self._plan, self._start = context, plan, counters
        self._data = context.data.of(stage)
        self._learn, self._stage = phase_of(stage)
        self._map_flops = map_costs(plan.source_geometry, plan.target_geometry, plan.layers or ()).flops
        of_plan = [dict(plan.options), plan.layers, plan.seed, plan.target_geometry.model_dump()]
        text = json.dumps([origin.identity, *of_plan, self._stage.tokens_per_step], sort_keys=True)
        name = _digest(text.encode())
        self._folder, self._name = context.directory.path / FOLDER, name
        kept, damaged = collectives.on_rank_zero(self._kept)
        self.step = int(kept[_STEP]) if kept else 0
        self._loss_before = float(kept[_LOSS]) if kept else math.nan
        self._reported = (0.0, 0)  # when, and at which step
        process_groups.set_layout(self._stage.parallel, context.loaded.config.run.seed)
        maps = {name: kept[name] for name in initial_maps(plan)} if kept else initial_maps(plan)
        self._engine = LearningEngine(self._stage, plan, origin, maps)
        if kept:
            self._engine.set_moments(kept)
        rewind = partial(context.metrics.rewind, counters.step, before_growth=True, learned=self.step)
        collectives.on_rank_zero(rewind)
        for path in damaged:
            message = f"{path} is damaged and not used: maps are learned from what else was kept, or anew"
            context.metrics.log("event", step=counters.step, event="damaged", message=message)

    def run(self) -> Learned | None:
        """Learn to the end of the phase; None if stopped before it."""
        validation = collectives.on_all_ranks(lambda: validation_set(self._data.validation, self._stage))
        self._say_start()
        if self.step == 0 and validation:
            self._loss_before = self._validate(validation)
        if not self._train():
            self._say_stop()
            self._engine.close()
            return None
        after = self._validate(validation) if validation else None
        maps = {name: value.detach().cpu() for name, value in self._engine.learned.maps.items()}
        self._engine.close()
        del self._engine  # before the next stage allocates
        gc.collect()
        before = self._loss_before if math.isfinite(self._loss_before) else None
        return Learned(dataclasses.replace(self._plan, maps=maps), self._counters(), before, after)

    def _train(self) -> bool:
        context = self._context
        with step_loader(self._data.train, self._stage) as loader:
            stopped = collectives.any_rank(context.stop.requested)
            self._reported = time.perf_counter(), self.step
            while self.step < self._learn.steps and not stopped:
                stopped = self._step(loader)
                last = stopped or self.step == self._learn.steps
                if last or self.step % self._learn.save_interval_steps == 0:
                    self._keep()
        return self.step == self._learn.steps

    def _step(self, loader: BatchLoader) -> bool:
        context = self._context
        context.watchdog.alive("waiting for data", self._start.step)
        batches, error = read_step(loader, self._counters().next_sample, self._stage)
        rate = learning_rate(self._learn.schedule, self.step, self._learn.steps)
        context.watchdog.alive(step=self._start.step)
        result = self._engine.train_step(batches, rate, context.stop.requested, error is not None)
        if result.failed:
            collectives.on_all_ranks(partial(raise_it, error))
        if not result.taken:
            raise GrowthMegatronError(
                f"{fault(result.loss, result.grad_norm, math.inf)} at step {self.step + 1} of learning the maps of "
                f"stage {self._stage.name}: the update was not made. Give the command again with a lower "
                f"stages.{self._stage.name}.growth.learn.schedule.learning_rate: the maps are learned anew with it"
            )
        self.step += 1
        context.watchdog.alive("between steps", self._start.step)
        if self.step % context.loaded.config.logging.interval_steps == 0 or self.step == self._learn.steps:
            self._report(result.loss, result.grad_norm, rate)
        return result.stop_requested

    def _counters(self) -> Counters:
        return self._start.after_learning(self._stage, self._map_flops, self.step)

    def _validate(self, validation: list[dict[str, torch.Tensor]]) -> float:
        self._context.watchdog.alive("validating", self._start.step)
        return self._engine.evaluate(validation)

    def _kept(self) -> tuple[dict[str, torch.Tensor], list[Path]]:
        """On rank 0: what an earlier process kept last of this very phase, and files that are not what was written."""
        found, damaged = [], []
        for path in self._folder.glob(f"{self._name}-*.safetensors"):
            if path.stem.endswith(f"-{_digest(path.read_bytes())}"):
                found.append(SafetensorsFile(path).read_all())
            else:
                damaged.append(path)
        return max(found, key=lambda state: float(state[_STEP]), default={}), damaged

    def _keep(self) -> None:
        """Once all ranks are seen to have the same maps."""
        digests = collectives.all_gather(self._engine.learned.digest())
        if differing := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise GrowthMegatronError(
                f"ranks {differing} have other maps than rank 0 after step {self.step} of learning: a device or its "
                "memory is faulty. Nothing was saved of it; re-run the same command on other machines to resume"
            )
        collectives.on_rank_zero(self._write)

    def _write(self) -> None:
        state = self._engine.state()
        state |= {_STEP: torch.tensor([float(self.step)]), _LOSS: torch.tensor([self._loss_before])}
        content = packed(state)
        path = self._folder / f"{self._name}-{_digest(content)}.safetensors"
        self._folder.mkdir(exist_ok=True)
        FileOperations().replace(path, content)
        for other in self._folder.glob("*.safetensors"):
            if other != path:
                other.unlink()

    def _report(self, loss: float, grad_norm: float, rate: float) -> None:
        counters, (before, step), now = self._counters(), self._reported, time.perf_counter()
        seconds, self._reported = (now - before) / (self.step - step), (now, self.step)
        self._context.metrics.log(
            "learn",
            step=counters.step,
            stage=self._stage.name,
            phase_step=self.step,
            phase_steps=self._learn.steps,
            consumed_tokens=counters.consumed_tokens,
            consumed_samples=counters.consumed_samples,
            flops=counters.flops,
            flops_6nd=counters.flops_6nd,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            tokens_per_s=self._stage.tokens_per_step / seconds,
            step_time_s=seconds,
            memory_bytes=int(collectives.largest(memory_bytes())),
        )

    def _say_start(self) -> None:
        entries = sum(value.numel() for value in self._engine.learned.maps.values())
        message = (
            f"learning {len(self._engine.learned.maps)} maps of {entries:,} entries for stage {self._stage.name}, "
            f"steps {self.step} to {self._learn.steps} of {self._stage.tokens_per_step:,} tokens; layers start as "
            f"{compact_layers(self._plan.layers or ())}"
        )
        self._context.metrics.log("event", step=self._start.step, event="learn", message=message)

    def _say_stop(self) -> None:
        message = f"stopped early on request at step {self.step} of learning; re-run the same command to resume"
        self._context.metrics.log("event", step=self._start.step, event="stop", message=message)
