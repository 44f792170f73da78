"""``growth-megatron evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth_megatron.commands.parsing import (
    Subparsers,
    add_command,
    add_live_model,
    announce,
    output_file,
    require_lm_eval,
)
from growth_megatron.errors import EXIT_OK, ConfigError

if TYPE_CHECKING:
    from growth_megatron.checkpoint.origin import Origin
    from growth_megatron.data.tokenizer import Tokenizer
    from growth_megatron.evaluate.live_model import LiveModel


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "evaluate",
        "growth-megatron evaluate runs/a --tasks growth_paper --include-path data/benchmarks",
        "growth-megatron evaluate hf:models/base --tasks arc_easy,sciq --limit 100 --json base.json",
        "torchrun --nproc-per-node 8 -m growth_megatron evaluate runs/a/latest --tasks growth_paper --tp 2 --pp 2",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,...",
        help="of lm-eval: tasks, groups, tags, YAML files; or growth_paper, the eight tasks of arXiv 2405.15319",
    )
    parser.add_argument("--limit", type=float, metavar="N", help="documents a task; below 1 a share; default: all")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples before each document; default: as each task says"
    )
    parser.add_argument(
        "--include-path",
        metavar="DIR",
        help="folder with more tasks (*.yaml); what `!function` names in them is Python code, which is run",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures, versions and settings there")
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, metavar="N", help="of a forward pass on a rank; default: %(default)s"
    )
    add_live_model(parser)


def run(options: argparse.Namespace) -> int:
    _check(options)
    require_lm_eval("evaluate")
    announce(f"reading {options.checkpoint}")
    from growth_megatron.evaluate.opened import opened  # seconds of imports, which a wrong option need not wait for
    from growth_megatron.parallel import collectives

    with opened(options, options.batch_tokens) as (origin, model, tokenizer):
        found = _evaluate(options, model, tokenizer)
        if collectives.rank() == 0:
            _tell(options, origin, found)
    return EXIT_OK


def _check(options: argparse.Namespace) -> None:
    limit = options.limit
    if limit is not None and (limit <= 0 or (limit > 1 and limit % 1)):
        raise ConfigError(f"--limit {limit:g} is no number of documents; give a whole number, or a share below 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ConfigError(f"--num-fewshot {options.num_fewshot} is negative; give 0 or more, or leave it out")
    if options.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {options.batch_tokens} is not positive; give 1 or more, or leave it out")
    if not _names(options.tasks):
        raise ConfigError("--tasks names no task; give names with commas between them, as arc_easy,sciq")
    if options.json:
        output_file(options.json, "--json")


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]


def _evaluate(options: argparse.Namespace, model: LiveModel, tokenizer: Tokenizer) -> dict[str, Any]:
    from growth_megatron.evaluate.harness import DistributedLM, run_harness
    from growth_megatron.evaluate.tasks import load_tasks

    include_path = Path(options.include_path) if options.include_path else None
    announce("reading tasks")
    loaded = load_tasks(_names(options.tasks), include_path, options.num_fewshot)
    return run_harness(DistributedLM(model, tokenizer), loaded, limit=options.limit)


def _tell(options: argparse.Namespace, origin: Origin, found: dict[str, Any]) -> None:
    """The table; all figures into the file asked for; a line into the metrics of the run, if it is of one."""
    from growth_megatron.checkpoint.origin import run_of_checkpoint
    from growth_megatron.evaluate.results import figures, table
    from growth_megatron.train.metrics import FILE_NAME, append_record

    print("\n".join(table(found)))
    settings = {"checkpoint": str(origin.path), "limit": options.limit, "num_fewshot": options.num_fewshot}
    results = figures(found)
    if options.json:
        parts = ("versions", "n-shot", "n-samples", "higher_is_better", "configs")
        content = {**settings, "step": origin.manifest.step, "results": results, **{key: found[key] for key in parts}}
        Path(options.json).write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")
    run = run_of_checkpoint(origin.path)
    if run is not None and (run / FILE_NAME).is_file():
        manifest = origin.manifest
        counts = {"consumed_tokens": manifest.consumed_tokens, "flops": manifest.flops, "flops_6nd": manifest.flops_6nd}
        append_record(run, "evaluation", step=manifest.step, **counts, results=results, **settings)
        print(f"added to {run / FILE_NAME}")
