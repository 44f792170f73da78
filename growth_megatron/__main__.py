"""The command ``growth-megatron``: arguments in, one library call, an exit code out.

Owns: argument parsing and how errors are printed. Does not own: any logic.

Imports of the libraries behind a subcommand are made when it runs: ``plan`` and ``--help`` need no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growth_megatron.errors import EXIT_OK, GrowthMegatronError

Handler = Callable[[argparse.Namespace], int]
Commands = Any  # what add_subparsers returns; argparse keeps its class to itself


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code (``growth_megatron.errors``)."""
    options = _parser().parse_args(arguments)
    # What megatron-core lacks on this machine is known and handled; it says so once per import.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        return int(options.handler(options))
    except GrowthMegatronError as error:
        # Raised on all ranks alike: one of them tells.
        if os.environ.get("RANK", "0") == "0":
            print(f"growth-megatron {options.command}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        if options.command == "train":
            raise  # not a reader that has gone, but a process that it needs
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor can the interpreter flush to it
        return EXIT_OK


def _train(options: argparse.Namespace) -> int:
    from growth_megatron.config.load import load_config

    loaded = load_config(options.config, options.overrides)
    from growth_megatron.train.stages import train

    return train(loaded)


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from growth_megatron.config.load import load_config
    from growth_megatron.config.plan import plan_run, plan_to_dict
    from growth_megatron.config.render import print_plan

    plan = plan_run(load_config(options.config, options.overrides).config, options.world_size)
    if options.json:
        print(json.dumps(plan_to_dict(plan), indent=1))
    else:
        print_plan(plan, Console())
    return EXIT_OK


def _grow(options: argparse.Namespace) -> int:
    from growth_megatron.growth.command import grow

    grow(
        Path(options.source),
        Path(options.target),
        settings=options.settings,
        layers=options.layers,
        optimizer_state=options.optimizer_state,
        seed=options.seed,
        dry_run=options.dry_run,
    )
    return EXIT_OK


def _inspect(options: argparse.Namespace) -> int:
    from growth_megatron.checkpoint.describe import describe_checkpoint, render_description

    description = describe_checkpoint(Path(options.checkpoint))
    print(json.dumps(description, indent=1) if options.json else render_description(description))
    return EXIT_OK


def _verify(options: argparse.Namespace) -> int:
    from growth_megatron.checkpoint.describe import verify_path

    for line in verify_path(Path(options.path), options.full):
        print(line)
    return EXIT_OK


def _report(options: argparse.Namespace) -> int:
    from growth_megatron.report.curves import plot_loss, render_summary, summarise

    run = Path(options.run)
    print(render_summary(summarise(run)))
    if not options.no_plot:
        output = run / "plots" / "loss.png"
        output.parent.mkdir(parents=True, exist_ok=True)
        plot_loss(run, output)
        print(f"plot: {output}")
    return EXIT_OK


def _train_tokenizer(options: argparse.Namespace) -> int:
    from growth_megatron.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(
        options.inputs,
        options.output,
        options.vocab_size,
        max_bytes=options.max_bytes,
        text_field=options.text_field,
        overwrite=options.overwrite,
    )
    print(f"{options.output}: {tokenizer.vocab_size} entries")
    return EXIT_OK


def _prepare_data(options: argparse.Namespace) -> int:
    from growth_megatron.data.prepare import prepare_data

    prepared = prepare_data(
        options.inputs,
        options.tokenizer,
        options.output,
        workers=options.workers,
        validation_every=options.validation_every,
        text_field=options.text_field,
        overwrite=options.overwrite,
    )
    for prefix, description in prepared.outputs.items():
        print(f"{prefix}: {description.documents:,} documents, {description.tokens:,} tokens")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="growth-megatron",
        description="Pretrain LLaMA models on megatron-core and grow them while they train.",
        epilog="exit codes: 0 done; 1 run-time fault; 2 bad configuration, usage or input; 75 stopped early and saved, "
        "give the same command again; 76 the next stage needs another world size (RUN/next_layout.json); 77 saved "
        "state exists but none of it is valid",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    _add_run_commands(commands)
    _add_checkpoint_commands(commands)
    _add_data_commands(commands)
    return parser


def _command(commands: Commands, name: str, handler: Handler, text: str, *examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_run_commands(commands: Commands) -> None:
    train = _command(
        commands,
        "train",
        _train,
        "Run or continue the run in run.directory.",
        "growth-megatron train configs/quickstart.yaml",
        "torchrun --nproc-per-node 8 -m growth_megatron train configs/experiments/gstack_1b.yaml",
        "growth-megatron train configs/quickstart.yaml run.directory=runs/b stages.base.training.steps=50",
    )
    plan = _command(
        commands,
        "plan",
        _plan,
        "Say what a run would cost: parameters, FLOPs, memory per rank, bubble. No GPU, no processes.",
        "growth-megatron plan configs/experiments/gstack_7b.yaml --world-size 64",
        "growth-megatron plan configs/quickstart.yaml --json",
    )
    for parser in (train, plan):
        parser.add_argument("config", metavar="CONFIG.yaml")
        parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values in YAML; a stage by name or number")
    plan.add_argument("--world-size", type=int, metavar="N", help="ranks; default: the smallest the layout allows")
    plan.add_argument("--json", action="store_true", help="machine-readable, sizes in bytes")
    report = _command(
        commands,
        "report",
        _report,
        "Final figures of a run and its loss curve (RUN/plots/loss.png).",
        "growth-megatron report runs/quickstart",
    )
    report.add_argument("run", metavar="RUN", help="run directory")
    report.add_argument("--no-plot", action="store_true", help="figures only; needs no matplotlib")


def _add_checkpoint_commands(commands: Commands) -> None:
    grow = _command(
        commands,
        "grow",
        _grow,
        "Write a grown copy of a checkpoint; tensors are linked, not copied.",
        "growth-megatron grow runs/a/latest runs/b/start --set num_layers=24",
        "growth-megatron grow runs/a/latest runs/b/start --layers '1-234*7-56' --optimizer-state carry --dry-run",
    )
    grow.add_argument("source", metavar="SOURCE", help="a checkpoint, RUN/latest or a run directory")
    grow.add_argument("target", metavar="TARGET", help="folder to be made")
    grow.add_argument("--operator", choices=["stack"], default="stack", help="stack: layer j copies layer j mod l")
    grow.add_argument("--set", dest="settings", nargs="+", default=[], metavar="a=b", help="num_layers=N")
    grow.add_argument("--layers", metavar="LIST", help="source layers: 0,1,0,1 from 0, or the paper's 1-234*7-56")
    grow.add_argument("--optimizer-state", choices=["reset", "carry"], default="reset", help="default: %(default)s")
    grow.add_argument("--seed", type=int, default=0, help="recorded; stacking draws no random numbers")
    grow.add_argument("--dry-run", action="store_true", help="check and print the plan, write nothing")
    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "Say what a checkpoint holds: progress, geometry, layout, lineage, tensors.",
        "growth-megatron inspect runs/quickstart/latest",
    )
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, RUN/latest or a run directory")
    inspect.add_argument("--json", action="store_true")
    verify = _command(
        commands,
        "verify",
        _verify,
        "Check that a checkpoint, or every checkpoint of a run, is whole.",
        "growth-megatron verify runs/quickstart",
        "growth-megatron verify runs/quickstart/latest --full",
    )
    verify.add_argument("path", metavar="PATH", help="a checkpoint or a run directory")
    verify.add_argument("--full", action="store_true", help="read every file and compare its checksum")


def _add_data_commands(commands: Commands) -> None:
    tokenizer = _command(
        commands,
        "train-tokenizer",
        _train_tokenizer,
        "Train a SentencePiece tokenizer (BPE, byte fallback).",
        "growth-megatron train-tokenizer data/train --output data/tokenizer.model --vocab-size 8000",
    )
    tokenizer.add_argument("--vocab-size", type=int, required=True, metavar="N")
    tokenizer.add_argument("--max-bytes", type=int, default=200_000_000, metavar="BYTES", help="of text, at most")
    prepare = _command(
        commands,
        "prepare-data",
        _prepare_data,
        "Tokenize text (.txt, .jsonl, also .gz and .zst; folders) into Megatron's .bin and .idx.",
        "growth-megatron prepare-data data/train --tokenizer data/tokenizer.model --output data/train_8k",
        "growth-megatron prepare-data corpus.jsonl.zst --tokenizer t.model --output data/c --validation-every 100",
    )
    prepare.add_argument("--tokenizer", required=True, metavar="MODEL")
    prepare.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    prepare.add_argument("--validation-every", type=int, metavar="N", help="every N-th document to PREFIX_validation")
    for parser in (tokenizer, prepare):
        parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders")
        parser.add_argument("--output", required=True, metavar="PATH", help="file or prefix to be written")
        parser.add_argument("--text-field", default="text", metavar="NAME", help="of .jsonl; default: %(default)s")
        parser.add_argument("--overwrite", action="store_true", help="replace existing output")


if __name__ == "__main__":
    sys.exit(main())
