"""The command ``growth-megatron``: arguments in, one library call, an exit code out.

Owns: argument parsing and how errors are printed. Does not own: any logic.

Imports of the libraries behind a subcommand are made when it runs: ``plan`` and ``--help`` need no torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growth_megatron.errors import EXIT_INTERRUPTED, EXIT_OK, GrowthMegatronError

Handler = Callable[[argparse.Namespace], int]
Commands = Any  # what add_subparsers returns; argparse keeps its class to itself


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code (``growth_megatron.errors``)."""
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    # What megatron-core lacks on this machine is known and handled; it says so once per import.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    try:
        return int(options.handler(options))
    except GrowthMegatronError as error:
        # Raised on all ranks alike: one of them tells.
        if os.environ.get("RANK", "0") == "0":
            print(f"growth-megatron {options.command}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"growth-megatron {options.command}: interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if options.command == "train":
            raise  # not a reader that has gone, but a process that it needs
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor can the interpreter flush to it
        return EXIT_OK


def _joined(arguments: list[str]) -> list[str]:
    """``plan grow`` as one word: argparse knows no subcommand of two."""
    return ["plan grow", *arguments[2:]] if arguments[:2] == ["plan", "grow"] else arguments


def _train(options: argparse.Namespace) -> int:
    from growth_megatron.growth.configuration import load_config

    loaded = load_config(options.config, options.overrides)
    from growth_megatron.train.stages import train

    return train(loaded)


def _plan(options: argparse.Namespace) -> int:
    from rich.console import Console

    from growth_megatron.commands.plan_tables import print_plan
    from growth_megatron.growth.configuration import load_config
    from growth_megatron.train.plan import plan_run, plan_to_dict

    plan = plan_run(load_config(options.config, options.overrides).config, options.world_size)
    if options.json:
        print(json.dumps(plan_to_dict(plan), indent=1))
    else:
        print_plan(plan, Console())
    return EXIT_OK


def _grow(options: argparse.Namespace) -> int:
    from growth_megatron.commands.grow import grow

    grow(options.source, options.target, _request(options), materialize=options.materialize, dry_run=options.dry_run)
    return EXIT_OK


def _plan_grow(options: argparse.Namespace) -> int:
    # Hundreds of thousands of small values and no cycles: looking for some would take longer than the plan.
    gc.disable()
    from growth_megatron.commands.grow import plan_grow

    plan_grow(options.source, options.target, _request(options), materialize=options.materialize, as_json=options.json)
    return EXIT_OK


def _request(options: argparse.Namespace) -> Any:
    from growth_megatron.commands.growth_request import read_request

    return read_request(
        Path(options.config) if options.config else None,
        settings=options.settings,
        operator=options.operator,
        layers=options.layers,
        optimizer_state=options.optimizer_state,
        seed=options.seed,
    )


def _inspect(options: argparse.Namespace) -> int:
    from growth_megatron.checkpoint.describe import describe_checkpoint, describe_tensor, render_description
    from growth_megatron.commands.tensor_statistics import render_tensor

    path = Path(options.checkpoint)
    if options.tensor is None:
        description, render = describe_checkpoint(path), render_description
    else:
        description, render = describe_tensor(path, options.tensor), render_tensor
    print(json.dumps(description, indent=1) if options.json else render(description))
    return EXIT_OK


def _verify(options: argparse.Namespace) -> int:
    from growth_megatron.growth.verify import verify

    verify(Path(options.path), full=options.full, as_json=options.json)
    return EXIT_OK


def _import_hf(options: argparse.Namespace) -> int:
    from growth_megatron.checkpoint.interchange import import_hf

    import_hf(Path(options.source), Path(options.checkpoint))
    return EXIT_OK


def _export_hf(options: argparse.Namespace) -> int:
    from growth_megatron.checkpoint.interchange import export_hf

    tokenizer = Path(options.tokenizer) if options.tokenizer else None
    target = Path(options.target)
    export_hf(Path(options.checkpoint), target, dtype=options.dtype, tokenizer=tokenizer, verify=options.verify)
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
        "state exists but none of it is valid; 130 interrupted at the keyboard",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    _add_run_commands(commands)
    _add_checkpoint_commands(commands)
    _add_interchange_commands(commands)
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
        "Write a grown copy of a checkpoint: deeper, wider or both, with its optimizer state.",
        "growth-megatron grow runs/a/latest runs/b/start --set num_layers=24",
        "growth-megatron grow runs/a/latest runs/b/start --layers '1-234*7-56' --optimizer-state carry --dry-run",
        "growth-megatron grow runs/a/latest runs/b/start --operator identity+split --set num_layers=12 "
        "hidden_size=1024 num_attention_heads=16 ffn_hidden_size=2816 shares=uneven",
        "growth-megatron grow hf:models/base hf:models/grown --operator solar --set num_layers=48",
        "torchrun --nproc-per-node 8 -m growth_megatron grow runs/a/latest runs/b/start --config growth.yaml",
    )
    grow.add_argument("source", metavar="SOURCE", help="a checkpoint, RUN/latest, a run, or hf:DIR")
    grow.add_argument("target", metavar="TARGET", help="folder to be made; hf:DIR for a Hugging Face folder")
    _add_growth_options(grow)
    grow.add_argument("--dry-run", action="store_true", help="check and print the plan, write nothing")
    plan = _command(
        commands,
        "plan grow",
        _plan_grow,
        "Say what a growth would do and cost, from metadata alone: source -> target map, bytes, memory, disk.",
        "growth-megatron plan grow runs/a/latest --set num_layers=24 hidden_size=2048",
        "growth-megatron plan grow runs/a/latest runs/b/start --operator identity --set num_layers=24 --json",
    )
    plan.add_argument("source", metavar="SOURCE", help="a checkpoint, RUN/latest, a run, or hf:DIR")
    plan.add_argument(
        "target", metavar="TARGET", nargs="?", help="where it would be written, to look at the disk there"
    )
    _add_growth_options(plan)
    plan.add_argument("--json", action="store_true", help="machine-readable, sizes in bytes")
    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "Say what a checkpoint holds: progress, geometry, layout, lineage, tensors.",
        "growth-megatron inspect runs/quickstart/latest",
        "growth-megatron inspect runs/quickstart/latest --tensor decoder.layers.0.mlp.linear_fc1.weight",
    )
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, RUN/latest or a run directory")
    inspect.add_argument("--tensor", metavar="KEY", help="statistics of one tensor: its values, chunks and files")
    inspect.add_argument("--json", action="store_true")
    verify = _command(
        commands,
        "verify",
        _verify,
        "Check that a checkpoint, or every checkpoint of a run, is whole, and a grown one what its growth gives.",
        "growth-megatron verify runs/quickstart",
        "growth-megatron verify runs/quickstart/latest --full",
    )
    verify.add_argument("path", metavar="PATH", help="a checkpoint or a run directory")
    verify.add_argument("--full", action="store_true", help="every file's checksum and every value of a grown tensor")
    verify.add_argument("--json", action="store_true", help="one object with all checks")


def _add_growth_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--operator",
        metavar="NAME",
        help="direct (default), zero, random; depth: stack, interpolate, solar, midas, gradual, identity; width: "
        "split, hypercloning, sparkling; or DEPTH+WIDTH",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        nargs="+",
        action="extend",
        default=[],
        metavar="a=b",
        help="num_layers, hidden_size, num_attention_heads, num_query_groups, head_dim, ffn_hidden_size, "
        "tie_embeddings, norm_epsilon; order=interleaved|tiled, shares=even|uneven, cancelling_noise=X, noise=X, "
        "multipliers=true",
    )
    parser.add_argument("--layers", metavar="LIST", help="source layers: 0,1,0,1 from 0, or the paper's 1-234*7-56")
    parser.add_argument(
        "--optimizer-state", choices=["reset", "carry", "asymmetric"], help="default: reset (sparkling: asymmetric)"
    )
    parser.add_argument("--seed", type=int, help="of new weights, noise and uneven shares; default: 0")
    parser.add_argument("--config", metavar="GROWTH.yaml", help="model:, growth: and seed: as above; options go first")
    parser.add_argument("--materialize", action="store_true", help="write all data, also where links would do")


def _add_interchange_commands(commands: Commands) -> None:
    importer = _command(
        commands,
        "import-hf",
        _import_hf,
        "Write a Hugging Face LLaMA (config.json, safetensors) as a checkpoint that train resumes from.",
        "growth-megatron import-hf models/tiny-llama runs/imported/start",
    )
    importer.add_argument("source", metavar="DIR", help="Hugging Face folder")
    importer.add_argument("checkpoint", metavar="CHECKPOINT", help="folder to be made")
    exporter = _command(
        commands,
        "export-hf",
        _export_hf,
        "Write a checkpoint as a Hugging Face LlamaForCausalLM, with its tokenizer.",
        "growth-megatron export-hf runs/quickstart/latest models/quickstart --verify",
        "growth-megatron export-hf runs/a models/a --dtype bfloat16 --tokenizer data/tokenizer.model",
    )
    exporter.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, RUN/latest or a run directory")
    exporter.add_argument("target", metavar="DIR", help="folder to be made")
    exporter.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored")
    exporter.add_argument(
        "--tokenizer", metavar="PATH", help="SentencePiece model or Hugging Face folder; default: the run's own"
    )
    exporter.add_argument("--verify", action="store_true", help="compare logits and token ids with transformers")


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
