"""Train a configuration with changes, as `growth-megatron train` does; under torchrun on any number of ranks."""

import sys

from growth_megatron.growth.configuration import load_config
from growth_megatron.train.plan import plan_run
from growth_megatron.train.stages import train

if __name__ == "__main__":
    path, directory = sys.argv[1:]
    changes = [f"run.directory={directory}", "stages.base.training.steps=60", "stages.grown.training.steps=60"]
    loaded = load_config(path, changes)
    for stage in plan_run(loaded.config).stages:  # pure: no process group, no file
        print(f"{stage.name}: {stage.model.num_layers} layers, {stage.steps} steps, {stage.flops:.3g} FLOPs")
    sys.exit(train(loaded))
