"""The loss of finished models on held-out documents: of the sources that they were trained on, and of another one.

    python tools/experiments/held_out.py RUN        (in the folder of the experiments, whose data/ it reads)

Prints one JSON object: loss in nats per token on ``SAMPLES`` samples of each. A run's own validation is on fewer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from growth_megatron.checkpoint.origin import find_origin
from growth_megatron.config.schema import DataConfig, DatasetConfig
from growth_megatron.data.dataset import build_validation_dataset
from growth_megatron.evaluate.live_model import LiveModel
from growth_megatron.evaluate.opened import open_model
from growth_megatron.growth.configuration import load_config
from growth_megatron.parallel import process_groups

SAMPLES = 384
OTHER = DatasetConfig(path="data/git_validation")


def loss(model: LiveModel, data: DataConfig, length: int, cache: Path) -> float:
    """Nats per token over the first ``SAMPLES`` samples of ``data``'s validation set, of ``length`` tokens each."""
    found = build_validation_dataset(data, length, SAMPLES, cache)
    assert found is not None
    samples = [found[index] for index in range(len(found))]
    rows, labels = ([sample[name].tolist() for sample in samples] for name in ("tokens", "labels"))
    return -sum(total for total, _ in model.score(rows, labels)) / sum(map(len, labels))


def main(run: str) -> None:
    stage = load_config(Path(run) / "config.yaml").config.stages[-1]
    cache = Path(run) / "data_cache"
    process_groups.start()
    try:
        model = open_model(find_origin(run), batch_tokens=1024)
        other = stage.data.model_copy(update={"validation": (OTHER,)})
        losses = {
            name: loss(model, data, stage.model.sequence_length, cache)
            for name, data in (("same_sources", stage.data), ("other_source", other))
        }
    finally:
        process_groups.stop()
    print(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1])
