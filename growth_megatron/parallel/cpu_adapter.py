"""Runs megatron-core's own code on a machine without CUDA.

Owns: the few places of megatron-core 0.16 that name CUDA literally. Does nothing where CUDA is available.
Does not own: faults of megatron-core that are not about the device (``parallel.megatron_fixes``).

Four kinds of places are adapted: calls that ask for the current device, random-number helpers, the gradient's norm, and
the literals ``"cuda"`` / ``"torch.cuda.FloatTensor"`` compiled into functions. The literals are replaced in the code
objects of the modules named below and nowhere else, so ``torch.cuda.is_available`` and torch's factories keep their
meaning.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_MODULES_WITH_LITERALS = (
    "megatron.core.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
_NORM_PIECE = 8192  # elements that torch may sum in one go
_adapted = False


def adapt_megatron_to_cpu() -> None:
    """Adapt megatron-core to the CPU, once per process; no-op where CUDA is available."""
    global _adapted
    if _adapted or torch.cuda.is_available():
        return
    _adapt_device_calls()
    _adapt_random_state()
    _adapt_norm()
    for name in _MODULES_WITH_LITERALS:
        for function in _functions_of(importlib.import_module(name)):
            function.__code__ = _without_cuda(function.__code__)
    _adapted = True


def _adapt_device_calls() -> None:
    # Each gets a function object of its own: Dynamo refuses one object registered under two names.
    def current_device() -> torch.device:
        return torch.device("cpu")

    def synchronize(device: Any = None) -> None:
        return None

    def empty_cache() -> None:
        return None

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.synchronize = synchronize
    torch.cuda.empty_cache = empty_cache
    torch.Tensor.cuda = tensor_cuda  # type: ignore[method-assign, assignment]


def _adapt_random_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def add(self: Any, name: str, seed: int) -> None:
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"random state {name} (seed {seed}) exists already")
        self.seeds_.add(seed)
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    megatron_random.CudaRNGStatesTracker.add = add


def _adapt_norm() -> None:
    """torch's float32 norm on a CPU adds one number after another: 0.5 to 4 % too small at 67M elements."""
    from megatron.core.optimizer import clip_grads

    def l2_norm(chunk: int, overflow: Any, tensors: list[list[torch.Tensor]], *rest: Any) -> tuple[torch.Tensor, None]:
        pieces = [piece for tensor in tensors[0] for piece in torch.split(tensor.flatten(), _NORM_PIECE)]
        norms = torch.stack(torch._foreach_norm(pieces))
        return torch.linalg.vector_norm(norms, dtype=torch.float64).float().reshape(1), None

    clip_grads.l2_norm_impl = l2_norm


def _functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """The functions and methods defined in ``module``, decorated ones unwrapped."""
    owners: list[Any] = [module]
    owners += [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for owner in owners:
        for value in vars(owner).values():
            if isinstance(value, property):
                value = value.fget
            value = getattr(value, "__func__", value)
            value = inspect.unwrap(value) if callable(value) else value
            if isinstance(value, FunctionType) and value.__module__ == module.__name__:
                yield value


def _without_cuda(code: CodeType) -> CodeType:
    return code.replace(co_consts=tuple(_replaced(constant) for constant in code.co_consts))


def _replaced(constant: Any) -> Any:
    if isinstance(constant, CodeType):
        return _without_cuda(constant)
    if isinstance(constant, tuple):
        return tuple(_replaced(item) for item in constant)
    if isinstance(constant, str):
        return _LITERALS.get(constant, constant)
    return constant
