"""The adapter changes the named modules of megatron-core and nothing of torch that others rely on."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.pool import ROOT, environment
from tests.ranks import run_ranks

UNCHANGED_UNDER_CUDA = """
import torch
before = (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda)
torch.cuda.is_available = lambda: True
from growth_megatron.parallel.cpu_adapter import adapt_megatron_to_cpu
adapt_megatron_to_cpu()
assert before == (torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda)
import sys
assert not any(name.startswith("megatron") for name in sys.modules)
"""

ADAPTED = """
import torch
from growth_megatron.parallel.cpu_adapter import adapt_megatron_to_cpu
adapt_megatron_to_cpu()
adapt_megatron_to_cpu()  # twice is once
from megatron.core.optimizer import distrib_optimizer, clip_grads
from megatron.core import distributed
def literals(code):
    for constant in code.co_consts:
        if hasattr(constant, "co_consts"):
            yield from literals(constant)
        else:
            yield from constant if isinstance(constant, tuple) else [constant]
build = distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups
assert "torch.FloatTensor" in set(literals(build.__code__))
for function in (build, clip_grads.clip_grad_by_total_norm_fp32, clip_grads.get_grad_norm_fp32):
    assert not {"cuda", "torch.cuda.FloatTensor"} & {c for c in literals(function.__code__) if isinstance(c, str)}
assert not torch.cuda.is_available()
assert torch.device("cuda").type == "cuda"
assert torch.cuda.current_device() == torch.device("cpu")
assert torch.zeros(2).cuda().device.type == "cpu"
"""


@pytest.mark.parametrize("script", [UNCHANGED_UNDER_CUDA, ADAPTED], ids=["no-op under CUDA", "adapted on CPU"])
def test_the_adapter_touches_what_it_should(script: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


def test_the_gradients_norm_is_right_at_67_million_elements_and_the_same_however_they_are_spread() -> None:
    exact = torch.linalg.vector_norm(torch.full((67_000_000,), 1.3e-3), dtype=torch.float64).item()
    whole = run_ranks("tests.parallel.norm_workers:norm_of_constants", 1, {"elements": 67_000_000})
    spread = run_ranks("tests.parallel.norm_workers:norm_of_constants", 2, {"elements": 67_000_000})
    assert [*whole, *spread] == pytest.approx([exact] * 3, rel=1e-6)
