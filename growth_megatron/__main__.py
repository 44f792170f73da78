"""The command ``growth-megatron``: a subcommand's module found and run, its errors printed, an exit code out.

Owns: the dispatch and how errors are printed. Does not own: the subcommands (``growth_megatron.commands``).

Only the module of the subcommand asked for is imported, so that what needs no torch does not wait for it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from growth_megatron import __version__
from growth_megatron.commands import COMMANDS
from growth_megatron.errors import EXIT_INTERRUPTED, EXIT_OK, GrowthMegatronError


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code (``growth_megatron.errors``)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # What megatron-core lacks on this machine is known and handled; it says so whenever it is imported.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    parser = parser_for(arguments)
    options, rest = parser.parse_known_args(arguments)
    # Overrides may stand behind an option, where argparse no longer looks for them.
    if wrong := [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides += rest
    try:
        return int(_module(options.command).run(options))
    except GrowthMegatronError as error:
        # Raised on all ranks alike: one of them tells, and one whose RANK is no rank.
        rank = os.environ.get("RANK", "0")
        if not rank.isdecimal() or int(rank) == 0:
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


def parser_for(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser: whole for the subcommand that ``arguments`` begin with, the others by name alone."""
    parser = argparse.ArgumentParser(
        prog="growth-megatron",
        description="Pretrain LLaMA models on megatron-core and grow them while they train.",
        epilog="exit codes: 0 done; 1 run-time fault; 2 bad configuration, usage or input; 75 stopped early and saved, "
        "re-run the same command to resume; 76 the next stage needs another world size (RUN/next_layout.json); 77 "
        "saved state exists but none of it is valid; 130 interrupted at the keyboard",
    )
    parser.add_argument("--version", action="version", version=f"growth-megatron {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for name, text in COMMANDS.items():
        if arguments[:1] == [name]:
            _module(name).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"growth_megatron.commands.{command.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
