"""What the tests of the adapter run on each rank."""

from __future__ import annotations

import torch
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32


def norm_of_constants(elements: int) -> float:
    """megatron-core's norm of a gradient of equal numbers, a share of it on each rank."""
    share = elements // torch.distributed.get_world_size()
    sizes = [share // 3, share - share // 3]  # of two tensors
    return float(get_grad_norm_fp32([torch.full((size,), 1.3e-3) for size in sizes]))
