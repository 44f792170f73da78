"""What the subcommands share: the form of their help, arguments of several, packages asked for by name."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from growth_megatron.commands import COMMANDS
from growth_megatron.errors import ConfigError

Subparsers = Any  # what add_subparsers returns; argparse keeps its class to itself


def add_command(subparsers: Subparsers, name: str, *examples: str) -> argparse.ArgumentParser:
    """The parser of subcommand ``name``, with its text and ``examples`` in its help."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=COMMANDS[name],
        description=COMMANDS[name],
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_config(parser: argparse.ArgumentParser, **options: Any) -> None:
    """The arguments ``CONFIG.yaml [a.b=c ...]``."""
    parser.add_argument("config", metavar="CONFIG.yaml", **options)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values in YAML; a stage by name or number")


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """``--overwrite`` of the subcommands that write a checkpoint."""
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what stands there, if it is a checkpoint of ours"
    )


def add_dtype(parser: argparse.ArgumentParser, help: str) -> None:
    """``--dtype`` of the subcommands that write a Hugging Face folder."""
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help=help)


def add_text_inputs(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommands that read text."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files or folders")
    parser.add_argument("--output", required=True, metavar="PATH", help="file or prefix to be written")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of records; default: %(default)s")
    parser.add_argument(
        "--where", action="append", default=[], metavar="FIELD[!]=VALUE",
        help="records to read, as in meta.set!=code; may be repeated, then all must hold",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")


def announce(text: str) -> None:
    """What a command that prints its results does meanwhile, on standard error; of rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{text} ...", file=sys.stderr, flush=True)


def output_file(path: str, option: str) -> Path:
    """The file that an option names, which can be written.

    Raises: ConfigError if it cannot.
    """
    folder = Path(path).absolute().parent
    problem = (
        "it is a folder; name a file" if Path(path).is_dir()
        else f"{folder} is no folder; make it, or name another file" if not folder.is_dir()
        else "it may not be written to; name another file"
        if not os.access(path if Path(path).exists() else folder, os.W_OK)
        else None
    )  # fmt: skip
    if problem is not None:
        raise ConfigError(f"{option} {path}: {problem}")
    return Path(path)


def output_folder(path: str, option: str) -> Path:
    """The folder that an option names, made where it is missing.

    Raises: ConfigError if it cannot be.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be made ({error.strerror}); name another folder") from None
    if not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {path} may not be written to; name another folder")
    return Path(path)


def require_lm_eval(asked_for_by: str) -> None:
    """Raises ConfigError with the command that installs lm-eval, if it is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"{asked_for_by} needs the package lm-eval: pip install 'growth-megatron[eval]', or lm-eval")


def add_live_model(parser: argparse.ArgumentParser) -> None:
    """The arguments of the subcommands that ask a model: which one, at which layout."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, RUN/latest, a run, or hf:DIR")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's")
    parser.add_argument(
        "--tp", type=int, default=1, metavar="N", help="tensor-parallel size under torchrun; default: 1"
    )
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size; default: 1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: as stored")
