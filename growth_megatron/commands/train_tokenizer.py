"""``growth-megatron train-tokenizer``."""

from __future__ import annotations

import argparse

from growth_megatron.commands.parsing import Subparsers, add_command, add_text_inputs
from growth_megatron.data.records import Fields
from growth_megatron.data.tokenizer import train_tokenizer
from growth_megatron.errors import EXIT_OK


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "train-tokenizer",
        "growth-megatron train-tokenizer data/train --output data/tokenizer.model --vocab-size 8000",
    )
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N")
    parser.add_argument("--max-bytes", type=int, default=200_000_000, metavar="BYTES", help="of text, at most")
    add_text_inputs(parser)


def run(options: argparse.Namespace) -> int:
    tokenizer = train_tokenizer(
        options.inputs,
        options.output,
        options.vocab_size,
        max_bytes=options.max_bytes,
        fields=Fields.parse(options.text_field, options.where),
        overwrite=options.overwrite,
    )
    print(f"{options.output}: {tokenizer.vocab_size} entries")
    return EXIT_OK
