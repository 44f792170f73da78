"""Initial weights, computed per region of a global tensor: bit-equal at every layout.

Owns: the initial distribution of a LLaMA's global tensors.
Does not own: their names and shapes (``model.architecture``), who reads the regions (a live model in
``checkpoint.torch_dist.live_model``).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.architecture import tensor_shapes
from growth_megatron.model.tensors import TensorSpec
from growth_megatron.parallel.counter_rng import normal_rows


class InitSource:
    """A freshly initialised model as a source of global tensors, in float32.

    Gains are 1; matrices are normal with deviation ``init_std``, those that write to the residual stream with
    ``init_std / sqrt(2 num_layers)``. Rows beyond the tokenizer's vocabulary are initialised like the others.
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._model, self._seed = model, seed
        self._shapes = tensor_shapes(model)

    def keys(self) -> list[str]:
        return list(self._shapes)

    def spec(self, key: str) -> TensorSpec:
        return TensorSpec(self._shapes[key], torch.float32)

    def read(self, key: str, region: tuple[slice, ...]) -> torch.Tensor:
        """The values of one region (a slice with explicit bounds per axis), ``float32``."""
        shape = self._shapes[key]
        if len(shape) == 1:
            return torch.ones(region[0].stop - region[0].start)
        writes_residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = self._model.init_std / math.sqrt(2 * self._model.num_layers) if writes_residual else self._model.init_std
        values = normal_rows(self._seed, key, range(region[0].start, region[0].stop), shape[1])
        values = values[:, region[1]] * np.float32(std)
        return torch.from_numpy(np.ascontiguousarray(values))
