"""``growth-megatron prepare-data``."""

from __future__ import annotations

import argparse

from growth_megatron.commands.parsing import Subparsers, add_command, add_text_inputs
from growth_megatron.data.prepare import prepare_data
from growth_megatron.errors import EXIT_OK


def add_parser(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "prepare-data",
        "growth-megatron prepare-data data/train --tokenizer data/tokenizer.model --output data/train_8k",
        "growth-megatron prepare-data corpus.jsonl.zst --tokenizer t.model --output data/c --validation-every 100",
    )
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="SentencePiece model, tokenizer.json, or a folder with one"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    parser.add_argument("--validation-every", type=int, metavar="N", help="every N-th document to PREFIX_validation")
    add_text_inputs(parser)


def run(options: argparse.Namespace) -> int:
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
