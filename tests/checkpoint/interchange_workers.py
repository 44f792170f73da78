"""What the tests of import and export run on each rank (``tests.ranks``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from growth_megatron.train.health import RollBack
from growth_megatron.train.loop import StageLoop

FIRST_VALIDATION = "first_validation.json"


def train_after_validation(runs: list[dict[str, Any]]) -> list[int]:
    """As ``tests.workers.train_all``, but each run validates before its first step.

    ``RUN/first_validation.json`` has that loss and the samples it was computed on.
    """
    from tests.workers import train_all

    real = StageLoop.run

    def run(self: StageLoop) -> bool | RollBack:
        loss, data = self.validate(), self.context.data.of(self.stage).validation
        assert data is not None
        samples = [{name: data[i][name].tolist() for name in ("tokens", "labels")} for i in range(len(data))]
        path = Path(self.context.loaded.config.run.directory) / FIRST_VALIDATION
        if dist.get_rank() == 0 and not path.exists():
            path.write_text(json.dumps({"loss": loss, "samples": samples}))
        return real(self)

    StageLoop.run = run  # type: ignore[method-assign]
    try:
        return train_all(runs)
    finally:
        StageLoop.run = real  # type: ignore[method-assign]
