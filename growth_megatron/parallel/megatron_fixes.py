"""Repairs of megatron-core 0.16.1 that are needed on any device.

Owns: corrections of upstream faults, each named with its symptom and the condition under which it can go.
Does not own: running without CUDA (``parallel.cpu_adapter``).

Three concern ``DistributedOptimizer`` around ``torch.optim.AdamW``, which is taken whatever else is installed.
"""

from __future__ import annotations

import queue
from typing import Any

import torch

_fixed = False


def fix_megatron() -> None:
    """Apply the repairs, once per process."""
    global _fixed
    if _fixed:
        return
    from megatron.core import optimizer
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
    from megatron.core.optimizer import distrib_optimizer

    _report_writes_within_the_process(filesystem_async)
    _load_objects_as_data(MCoreLoadPlanner)
    _take_torchs_adam(optimizer, distrib_optimizer)
    optimizer_class = distrib_optimizer.DistributedOptimizer
    _allocate_state_before_state_dict(optimizer_class)
    _own_step_per_parameter(optimizer_class)
    _set_states_without_step(optimizer_class)
    _fixed = True


def _report_writes_within_the_process(writer_module: Any) -> None:
    """The first save starts a ``multiprocessing`` manager for one queue, a process of 270 MB on every rank.

    Threads write here (``checkpoint.torch_dist.saver``). Can go when ``filesystem_async`` takes the queue it is given.
    """
    writer_module._results_queue = queue.SimpleQueue()


def _take_torchs_adam(optimizer_module: Any, distrib_module: Any) -> None:
    """Where Transformer Engine or apex is installed megatron-core takes its Adam, whose state has another form
    (``step`` per group) and whose branches have not been tested with growth.

    Can go when the other Adams have passed the tests of the optimizer's state.
    """
    optimizer_module.USING_PYTORCH_OPTIMIZER = True
    distrib_module.HAVE_APEX_OR_TE = False


def _load_objects_as_data(planner_class: Any) -> None:
    """``load_bytes`` unpickles a checkpoint's byte objects (``_extra_state``) freely, so they can run any code.

    Can go when torch's ``DefaultLoadPlanner.load_bytes`` loads with ``weights_only=True``.
    """
    from torch.distributed.checkpoint._nested_dict import set_element

    def load_bytes(self: Any, read_item: Any, value: Any) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))

    planner_class.load_bytes = load_bytes


def allocate_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter of a fresh Adam its zero state, as its first step would."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


def _allocate_state_before_state_dict(optimizer_class: Any) -> None:
    """``state_dict`` of an optimizer that has not stepped fails ``assert len(steps) == 1``.

    Can go when a fresh DistributedOptimizer over torch.optim.AdamW can be saved and loaded.
    """
    original = optimizer_class.state_dict

    def state_dict(self: Any) -> dict[str, Any]:
        if not self.is_stub_optimizer:
            allocate_adam_state(self.optimizer)
        return dict(original(self))

    optimizer_class.state_dict = state_dict


def _own_step_per_parameter(optimizer_class: Any) -> None:
    """``load_state_dict`` puts one shared ``step`` tensor into every state, which each parameter then increments.

    With 16 parameters one update takes the step from 2 to 18 and the bias correction goes with it, silently.
    Can go when upstream clones the tensor per parameter.
    """
    original = optimizer_class.load_state_dict

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    optimizer_class.load_state_dict = load_state_dict


def _set_states_without_step(optimizer_class: Any) -> None:
    """Loading looks for a per-parameter ``step`` that is never saved, and copies into a leaf that requires grad.

    Can go when ``_set_main_param_and_optimizer_states`` skips ``step`` and runs under ``no_grad``.
    """

    @torch.no_grad()
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        state = self.optimizer.state[main_param]
        main_param.copy_(tensors["param"])
        state["exp_avg"].copy_(tensors["exp_avg"])
        state["exp_avg_sq"].copy_(tensors["exp_avg_sq"])

    optimizer_class._set_main_param_and_optimizer_states = set_states
