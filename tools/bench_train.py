"""What this package costs on top of megatron-core, what `plan` is worth, and what a growth costs, on this machine.

    python tools/bench_train.py                                   a model of 8 layers x 256, one process
    python tools/bench_train.py model.hidden_size=512 training.precision=bf16
    torchrun --nproc-per-node 2 tools/bench_train.py parallel.tensor_parallel_size=2
    python tools/bench_train.py --config configs/quickstart.yaml --stage grown --output bench.json
    python tools/bench_train.py --quick                           seconds: shows that it runs, measures nothing

Three things are measured in one session, what is compared in turn (A B, B A, ...), so that ratios hold on a machine
with other work on it:

1. `train`: StageLoop.run as in a run (data loader, metrics.jsonl and console at every step) against a bare loop over
   the same megatron-core model and optimizer, its batches preloaded. Each turn is one StageLoop.run, which ends with a
   save; that is no part of the step and has its own line. FLOP/s are set against a large matrix product in the same
   precision on the same threads.
   Steps while a checkpoint is written in the background are set against steps alone.
2. `plan`: bytes of weights, gradients and optimizer state against what is allocated.
3. Growth: save of a model with 1/FACTOR of the layers + stack + load into the whole model, against save + load of the
   whole model, through the run directory with all its checksums and flushes.

The tokens are random and made here; of a configuration the data section is not used.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import yaml

# Run as a script, so this folder is on the path.
from bench_measures import (  # type: ignore[import-not-found]
    Bench,
    fresh,
    growth_against_resume,
    memory_against_plan,
    steps_beside_a_save,
    train_against_bare,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from growth_megatron.config.checks import check_world_size
from growth_megatron.config.run_schema import EvaluationConfig
from growth_megatron.config.schema import (
    DataConfig,
)
from growth_megatron.errors import ConfigError, GrowthMegatronError
from growth_megatron.growth.configuration import load_config
from growth_megatron.model.cost import parameter_count
from growth_megatron.parallel import collectives, process_groups

Figures = dict[str, Any]

DEFAULT: Figures = {
    "model": {
        "num_layers": 8,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 704,
        "vocab_size": 4096,
        "sequence_length": 256,
    },
    "schedule": {"learning_rate": 1e-4},
    "training": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
}
QUICK = ["model.hidden_size=64", "model.ffn_hidden_size=128", "model.sequence_length=32", "model.vocab_size=512"]
LIMITS = {"train_to_bare": 1.05, "plan_error": 0.10, "step_beside_a_save": 1.10, "growth_to_resume": 1.5}


def write_tokens(prefix: Path, vocab_size: int, sequence_length: int) -> None:
    """A prepared dataset of random tokens, 512 samples in documents of about 3 to a sample."""
    generator = numpy.random.default_rng(1)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    length = max(sequence_length // 3, 1)
    for _ in range(3 * 512 + 8):
        builder.add_document(generator.integers(0, vocab_size, length, dtype=numpy.int32), [length])
    builder.finalize(f"{prefix}.idx")


def load_bench(options: argparse.Namespace, folder: Path) -> Bench:
    """The configuration to measure, on all ranks, and the tokens to measure it with.

    Raises: ConfigError
    """
    path = options.config or folder / "default.yaml"
    data = {"train": [{"path": str(folder / "tokens")}]}
    if options.config is None:
        precision = {"precision": "bf16" if torch.cuda.is_available() else "fp32"}
        default = {**DEFAULT, "training": {**DEFAULT["training"], **precision}}
        content = {"run": {"directory": str(folder)}, "data": data, **default}
        collectives.on_rank_zero(lambda: path.write_text(yaml.safe_dump(content)))
    loaded = load_config(path, [*(QUICK if options.quick and options.config is None else ()), *options.overrides])
    stages = {stage.name: stage for stage in loaded.config.stages}
    name = options.stage or loaded.config.stages[-1].name
    if name not in stages:
        raise ConfigError(f"--stage {name} is no stage of {path}; allowed: {', '.join(stages)}")
    check_world_size(loaded.config, list(stages).index(name), dist.get_world_size())
    turns, steps = (1, 2) if options.quick else (options.turns, options.steps)
    wanted = stages[name]
    chunks = wanted.parallel.pipeline_parallel_size * wanted.parallel.model_chunks
    if "growth" not in options.skip and wanted.model.num_layers % (options.factor * chunks):
        raise ConfigError(
            f"--factor {options.factor} does not leave a multiple of {chunks} of the model's {wanted.model.num_layers} "
            "layers; give another factor, another model.num_layers, or --skip growth"
        )
    training = wanted.training.model_copy(update={"steps": steps + 1, "tokens": None})
    config = loaded.config.model_copy(
        update={
            "evaluation": EvaluationConfig(),
            "checkpoint": loaded.config.checkpoint.model_copy(update={"interval_steps": None, "resume": "auto"}),
            "logging": loaded.config.logging.model_copy(update={"interval_steps": 1}),
        }
    )
    model = wanted.model
    collectives.on_rank_zero(lambda: write_tokens(folder / "tokens", model.vocab_size, model.sequence_length))
    stage = wanted.model_copy(update={"training": training, "growth": None, "data": DataConfig.model_validate(data)})
    return Bench(config, stage, folder, turns, steps, options.live)


def measure(bench: Bench, options: argparse.Namespace) -> Figures:
    stage = bench.stage
    figures: Figures = {
        "world_size": dist.get_world_size(),
        "threads_per_rank": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "parameters": parameter_count(stage.model).total,
        "load_average_before": os.getloadavg()[0],
        "turns": bench.turns,
        "steps_per_turn": bench.steps,
        "stage": stage.model_dump(mode="json"),
    }
    if "train" not in options.skip:
        engine = fresh(stage, bench.config.run.seed)
        figures |= train_against_bare(bench, engine)
        figures |= memory_against_plan(engine)
        figures |= steps_beside_a_save(bench, engine)
        del engine
        gc.collect()
    if "growth" not in options.skip:
        figures |= growth_against_resume(bench, options.factor, options.optimizer_state)
    return figures


def print_figures(figures: Figures) -> None:
    rows = {
        "train_to_bare": "train / bare loop, step time, medians of all steps",
        "train_to_bare_undisturbed": "  lower quartiles, which other work on the machine hardly moves",
        "train_to_bare_of_turns": "  of turns, quartiles",
        "train_to_bare_cpu_time": "  CPU time, of turns, quartiles",
        "share_of_matmul": "train / matrix product, FLOP/s",
        "bare_share_of_matmul": "bare loop / matrix product, FLOP/s",
        "save_to_step": "a save / a step (no part of the above)",
        "step_beside_a_save": "a step while a checkpoint is written / a step alone, median of turns",
        "step_beside_a_save_of_turns": "  of turns, quartiles",
        "tokens_per_s": "tokens/s",
        "tflops_per_s_per_rank": "TFLOP/s per rank",
        "peak_memory_bytes": "peak memory of rank 0, bytes",
        "plan_error": "plan's weights, gradients, optimizer: largest error",
        "growth_to_resume": "save + grow + resume / save + resume, medians",
        "growth_to_resume_of_turns": "  of turns, quartiles",
        "growth_to_resume_with_build": "  with building the model on both sides",
        "growth_to_own_save_and_load": "  to the same save and load without the growth",
    }
    print(
        f"{figures['parameters']:,} parameters, {figures['world_size']} rank(s) x {figures['threads_per_rank']} "
        f"thread(s), {figures['device']}, {figures['turns']} turns of {figures['steps_per_turn']} steps, "
        f"load average {figures['load_average_before']:.1f} before and {os.getloadavg()[0]:.1f} after"
    )
    for name, label in rows.items():
        value, limit = figures.get(name), LIMITS.get(name)
        if value is None:
            continue
        text = "  ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else f"{value:,.4g}"
        verdict = "" if limit is None else f"at most {limit:g}: {'ok' if value <= limit else 'ABOVE'}"
        print(f"{label:<63} {text:<22} {verdict}".rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to the configuration")
    parser.add_argument("--config", type=Path, help="a run's YAML; default: the model above")
    parser.add_argument("--stage", help="stage of the configuration; default: the last")
    parser.add_argument("--turns", type=int, default=10, help="turns of each side, after one to warm up")
    parser.add_argument("--steps", type=int, default=5, help="steps measured in a turn")
    parser.add_argument("--factor", type=int, default=4, help="how much the growth deepens")
    parser.add_argument("--optimizer-state", choices=("reset", "carry"), default="reset")
    parser.add_argument("--skip", choices=("train", "growth"), action="append", default=[])
    parser.add_argument("--live", action="store_true", help="the terminal's live view instead of lines")
    parser.add_argument("--folder", type=Path, help="where to write checkpoints; default: the temporary folder")
    parser.add_argument("--output", type=Path, help="file for all figures as JSON")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one turn")
    options = parser.parse_intermixed_args(arguments)
    warnings.filterwarnings("ignore", module=r"megatron\.")  # what megatron-core lacks here is known
    started = process_groups.start()
    try:
        folder = collectives.on_rank_zero(lambda: Path(tempfile.mkdtemp(prefix="bench_train_", dir=options.folder)))
        try:
            figures = measure(load_bench(options, folder), options)
        finally:
            if not dist.get_rank():
                shutil.rmtree(folder)
    except GrowthMegatronError as error:
        if not collectives.rank_from_environment():
            print(f"bench_train.py: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if started:
            process_groups.stop()
    if not collectives.rank_from_environment():
        print_figures(figures)
        if options.output:
            options.output.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
