"""Which operators keep the function? Logits of the grown model against the source's, nothing written."""

import sys

import torch

from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.config.growth_schema import GrowthConfig
from growth_megatron.config.schema import ModelConfig
from growth_megatron.growth.plan import plan_growth
from growth_megatron.growth.view import GrownSource
from growth_megatron.model.reference import reference_logits

if __name__ == "__main__":
    origin = find_origin(sys.argv[1])
    small = origin.geometry
    changes = {"num_layers": 2 * small.num_layers, "ffn_hidden_size": 3 * small.ffn_hidden_size // 2}
    large = ModelConfig.model_validate(small.model_dump() | changes)
    tokens = torch.arange(16)[None]  # [b, s]
    before = reference_logits(origin.tensors, small, tokens)
    for operator in ("identity+split", "zero", "stack+split", "random"):
        plan = plan_growth(small, large, GrowthConfig(operator=operator), seed=1)
        after = reference_logits(GrownSource(origin.tensors, plan, "reset"), large, tokens)
        print(f"{operator:15s} largest difference of a logit {(after - before).abs().max():.1e}")
