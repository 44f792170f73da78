"""Initial weights, computed per region of a global tensor: bit-equal at every layout.

Owns: the values of a freshly initialised model's global tensors.
Does not own: which distribution a tensor has, names and shapes (``model.architecture``), who reads the regions.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from growth_megatron.config.schema import ModelConfig
from growth_megatron.model.architecture import model_rows
from growth_megatron.model.tensors import Region, TensorSpec
from growth_megatron.parallel.counter_rng import normal_rows


class InitSource:
    """A freshly initialised model as a source of global tensors, in float32.

    Rows beyond the tokenizer's vocabulary are initialised like the others.
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self._model, self._seed = model, seed
        self._rows = model_rows(model)

    def keys(self) -> list[str]:
        """All tensors, in the model's order."""
        return list(self._rows)

    def spec(self, key: str) -> TensorSpec:
        """Global shape; float32."""
        return TensorSpec(self._rows[key].shape(self._model), torch.float32)

    def read(self, key: str, region: Region) -> torch.Tensor:
        """The values of one region, of its shape, ``float32``."""
        row = self._rows[key]
        if not row.is_matrix:
            return torch.full((region[0].stop - region[0].start,), 1.0 if row.initial == "ones" else 0.0)
        std = self._model.init_std
        if row.initial == "normal_deep":
            std /= math.sqrt(2 * self._model.num_layers)
        columns = row.shape(self._model)[1]
        values = normal_rows(self._seed, key, range(region[0].start, region[0].stop), columns)
        values = values[:, region[1]] * np.float32(std)
        return torch.from_numpy(np.ascontiguousarray(values))
