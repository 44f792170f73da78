"""A stage's model, optimizer and pipeline schedule, ready to step.

Owns: building and wrapping them, one training step, one evaluation.
Does not own: the order of steps (``train.loop``), where weights come from (``train.stages``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    ParamWithNamePredicate,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from growth_megatron.checkpoint.folder.manifest import Multipliers
from growth_megatron.checkpoint.torch_dist.live_model import FORMAT
from growth_megatron.checkpoint.torch_dist.optimizer_groups import (
    EPSILON,
    LEARNING_RATE,
    check_multipliers,
    group_overrides,
)
from growth_megatron.config.schema import StageConfig
from growth_megatron.growth.live import LiveMap
from growth_megatron.model.architecture import row_of, without_layer_number
from growth_megatron.model.llama import build_model_chunks
from growth_megatron.train.parameter_groups import ParameterGroups, is_counted

Batch = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step measured, the same on every rank."""

    loss: float
    grad_norm: float
    stop_requested: bool
    taken: bool = True
    """Whether the update was made."""
    failed: bool = False
    """Whether a rank said so."""
    norms: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of weights, gradients and updates of old and new parameters, where they were asked for."""


class Engine:
    """Model chunks in DistributedDataParallel with a DistributedOptimizer, at the current process groups."""

    def __init__(self, stage: StageConfig, multipliers: Mapping[str, Multipliers] = MappingProxyType({})) -> None:
        """``multipliers``: as in a manifest, by model key with the layer number written ``*``.

        A grown run follows its source by them. The norm that is clipped is the source's: a weight in c copies of a
        times itself has gradients 1 / (a c) of the source's, a times its learning rate and 1 / (a c) of its epsilon,
        and c (g / (a c))^2 times a / (1 / (a c)) is g^2.

        Raises: CheckpointError if one is of no tensor of the model.
        """
        check_multipliers(multipliers, stage.model)
        self.stage, self.multipliers = stage, multipliers
        torch.use_deterministic_algorithms(stage.training.deterministic)
        self.models: list[GPTModel] = build_model_chunks(stage.model, stage.parallel, stage.training)
        self.wrapped: list[DistributedDataParallel] = []
        self._optimizer: MegatronOptimizer | None = None
        self._epsilon_multipliers: list[float] = []
        self.live: LiveMap | None = None
        """Between the parameters as they are trained and saved and as the modules use them; None: there is one kind."""
        self.groups: ParameterGroups | None = None
        """Parameters that are trained otherwise than others; None: there are none."""

    def finish(self) -> None:
        """Wrap the models and build the optimizer: after initial weights are in, since it copies its masters here."""
        self._wrap(use_distributed_optimizer=True)
        settings, config = self.stage.optimizer, self.models[0].config
        optimizer_config = OptimizerConfig(
            optimizer="adam",
            lr=self.stage.schedule.learning_rate,
            min_lr=self.stage.schedule.min_learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad or math.inf,  # without clipping the norm is still wanted
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=self.stage.parallel.overlap_param_gather,
        )
        self._optimizer = get_megatron_optimizer(
            optimizer_config, self.wrapped, self._overrides(optimizer_config), use_gloo_process_groups=False
        )
        self._epsilon_multipliers = [group.get(EPSILON, 1.0) for group in self.optimizer.param_groups]
        config.grad_scale_func = self.optimizer.scale_loss

    def _wrap(self, use_distributed_optimizer: bool) -> None:
        """Gradient buffers and their reduction."""
        parallel, config = self.stage.parallel, self.models[0].config
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            check_for_nan_in_grad=False,
        )
        self.wrapped = [
            # Buckets follow the order of backward; of a later chunk or pipeline stage nothing is to be overlapped.
            DistributedDataParallel(
                config,
                ddp,
                model,
                disable_bucketing=index > 0 or not parallel_state.is_pipeline_first_stage(ignore_virtual=True),
            )
            for index, model in enumerate(self.models)
        ]
        config.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            no_sync = [model.no_sync for model in self.wrapped]
            config.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync

    def _overrides(self, config: OptimizerConfig) -> dict[ParamKey, Any]:
        """megatron-core's standard overrides and those of the multipliers: one group for each distinct combination."""
        overrides: dict[ParamKey, Any] = get_standard_config_overrides(config)
        members: dict[tuple[tuple[str, float], ...], set[int]] = {}
        for param, key in _parameter_keys(self.models) if self.multipliers else ():
            multipliers = self.multipliers.get(without_layer_number(key), Multipliers())
            if changes := group_overrides(multipliers, decays=row_of(key).decays):
                members.setdefault(tuple(sorted(changes.items())), set()).add(id(param))
        for changed, ids in members.items():
            belongs = ParamWithNamePredicate(str(changed), lambda param, _, ids=ids: id(param) in ids)
            overrides[ParamKey(with_name_predicate=belongs)] = dict(changed)
        return overrides

    def close(self) -> None:
        """Let go of model, buffers and optimizer state: the configuration ties them into a cycle through autograd's
        hooks, which Python's collector cannot see through, so that they would live on beside the next stage's.
        """
        config = self.models[0].config
        config.grad_scale_func = config.finalize_model_grads_func = config.no_sync_func = None
        self.models, self.wrapped, self._optimizer, self.live, self.groups = [], [], None, None, None

    @property
    def optimizer(self) -> MegatronOptimizer:
        """The optimizer, once ``finish`` has built it."""
        assert self._optimizer is not None, "finish() has not been called"
        return self._optimizer

    def set_optimizer_settings(self, learning_rate: float) -> None:
        """Put the configured settings into every parameter group; what a checkpoint stored of them is not used."""
        settings = self.stage.optimizer
        for group, epsilon in zip(self.optimizer.param_groups, self._epsilon_multipliers, strict=True):
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
            group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
            group["betas"] = (settings.beta1, settings.beta2)
            group["eps"] = settings.epsilon * epsilon
            # A load may have given it the values of another group that differs in nothing else.
            group.pop(EPSILON, None)
            if epsilon != 1.0:
                group[EPSILON] = epsilon

    def train_step(
        self,
        batches: Sequence[Batch],
        learning_rate: float,
        stop_requested: bool = False,
        failed: bool = False,
        highest_loss: float = math.inf,
        stage_step: int = 0,
        measures: bool = False,
    ) -> StepResult:
        """One update from this rank's micro-batches.

        It is not made where the loss is above ``highest_loss``, or it or the gradient's norm are not finite.
        ``stage_step`` is the number of steps that the stage has made, by which a live map and parameter groups go;
        ``measures`` asks for the norms of old and new parameters.
        ``stop_requested`` and ``failed`` (this rank has no batches; it was given some to take part) of any rank come
        back on all of them, so that all leave at the same step.
        """
        self._clear_gradients()
        if self.live is not None and self.live.is_over(stage_step):
            self.live = None
        if self.live is None:
            sums = self._run(batches, forward_only=False)
        else:
            with self.gathered_parameters(), self._live_weights(stage_step):
                sums = self._run(batches, forward_only=False)
                self.live.pull_back()
        loss, stop, failed = _world_mean_loss(sums, stop_requested, failed)
        if failed or not math.isfinite(loss) or loss > highest_loss:
            return StepResult(loss, math.nan, stop, taken=False, failed=failed)
        grad_norm, norms = self._update(learning_rate, stage_step, measures)
        return StepResult(loss, grad_norm, stop, taken=math.isfinite(grad_norm), norms=norms)

    def _clear_gradients(self) -> None:
        for model in self.wrapped:
            model.zero_grad_buffer()
        if self._optimizer is not None:
            self._optimizer.zero_grad()

    @torch.no_grad()
    def _update(self, learning_rate: float, stage_step: int, measures: bool) -> tuple[float, dict[str, float]]:
        """``ChainedOptimizer.step`` with a look between its parts; the gradient's norm, those of old and new."""
        self.set_optimizer_settings(learning_rate)
        self.optimizer.prepare_grads()
        if self.groups is not None:
            self.groups.begin(stage_step)
        grad_norm = self._source_grad_norm() if self.multipliers else float(self.optimizer.get_grad_norm())
        is_taken = math.isfinite(grad_norm)
        if is_taken:
            for optimizer in self.own_optimizers():
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), optimizer.config.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
        return grad_norm, self.groups.end(measures and is_taken) if self.groups is not None else {}

    def _source_grad_norm(self) -> float:
        """The norm of the gradient that the ungrown run would have, over all ranks; see ``__init__``."""
        total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        for part in self.own_optimizers():
            for group in part.param_groups:
                weight = group.get(LEARNING_RATE, 1.0) / group.get(EPSILON, 1.0)
                for param in group["params"]:
                    if param.grad is not None and is_counted(param):
                        total += weight * torch.linalg.vector_norm(param.grad, dtype=torch.float64) ** 2
        dist.all_reduce(total)
        return math.sqrt(float(total))

    def own_optimizers(self) -> list[MegatronOptimizer]:
        """Those that hold anything on this rank."""
        chained: list[MegatronOptimizer] = self.optimizer.chained_optimizers
        return [part for part in chained if not part.is_stub_optimizer and part.get_parameters()]

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all weights, masters and moments of this rank are."""
        tensors = [param for model in self.models for param in model.parameters()]
        for optimizer in self.own_optimizers():
            tensors += [param for group in optimizer.param_groups for param in group["params"]]
            tensors += [value for state in optimizer.optimizer.state.values() for value in state.values()]
        ends = [end.float() for tensor in tensors if tensor.numel() for end in tensor.aminmax()]
        return bool(torch.stack(ends).isfinite().all())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], stage_step: int = 0) -> float:
        """Mean loss (nats per token) of this rank's micro-batches and those of all data-parallel peers."""
        with self.evaluating(stage_step):
            sums = self._run(batches, forward_only=True)
        return _world_mean_loss(sums)[0]

    @contextmanager
    def evaluating(self, stage_step: int) -> Iterator[None]:
        """The models complete, in evaluation mode and as they act after ``stage_step`` steps of the stage."""
        for model in self.models:
            model.eval()
        with self.gathered_parameters(), self._live_weights(stage_step):
            yield
        for model in self.models:
            model.train()

    @contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """All parameters complete on every rank, also where their gathering is deferred to the next forward."""
        deferred = self.stage.parallel.overlap_param_gather
        if deferred:
            for model in self.wrapped:
                model.disable_forward_pre_hook()
        yield
        if deferred:
            for model in self.wrapped:
                model.enable_forward_pre_hook()

    @contextmanager
    def _live_weights(self, stage_step: int) -> Iterator[None]:
        """The modules' parameters as they act after ``stage_step`` steps of the stage."""
        if self.live is not None:
            self.live.pour(stage_step)
        yield
        if self.live is not None:
            self.live.put_back()

    def _run(self, batches: Sequence[Batch], forward_only: bool) -> list[torch.Tensor]:
        iterators = [iter(batches) for _ in self.wrapped]
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.wrapped if len(self.wrapped) > 1 else self.wrapped[0],
            num_microbatches=len(batches),
            seq_length=self.stage.model.sequence_length,
            micro_batch_size=self.stage.training.micro_batch_size,
            forward_only=forward_only,
        )
        return [output["sums"] for output in outputs]  # empty except on the last pipeline stage


def _parameter_keys(models: Sequence[GPTModel]) -> Iterator[tuple[torch.nn.Parameter, str]]:
    """This rank's parameters and the keys under which checkpoints hold them.

    The sharded state knows them: it renames gains, numbers layers over the whole model, and gives the second copy of
    a tied embedding, on the last pipeline stage, the key of the first.
    """
    for model in models:
        state = nested_values(model.sharded_state_dict(metadata=dict(FORMAT)))
        keys = {id(part.data): part.key for part in state if isinstance(part, (ShardedTensor, ShardedTensorFactory))}
        for param in model.parameters():
            yield param, keys[id(param)]


def _forward_step(iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, token_losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over the micro-batch's tokens, and their sum and number for the report; losses ``[b, s]``."""
    total, tokens = (token_losses.float() * mask).sum(), mask.sum()
    report = torch.stack([total.detach(), tokens])
    return total / tokens.clamp(min=1.0), {"sums": report}


def _world_mean_loss(
    sums: Sequence[torch.Tensor], stop_requested: bool = False, failed: bool = False
) -> tuple[float, bool, bool]:
    """Mean loss over all tokens of the world, and whether any rank wants to stop or failed, in one reduction."""
    packed = torch.zeros(4, dtype=torch.float64, device=torch.cuda.current_device())
    if sums and parallel_state.get_tensor_model_parallel_rank() == 0:
        packed[:2] = torch.stack([pair.double() for pair in sums]).sum(dim=0)
    packed[2], packed[3] = float(stop_requested), float(failed)
    dist.all_reduce(packed)
    total, tokens, stop, failures = packed.tolist()
    return total / max(tokens, 1.0), stop > 0, failures > 0
